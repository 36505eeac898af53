"""What only a store on S3 meets: its answers, its credentials, and faults on the way."""

from __future__ import annotations

import gc
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from s3_server import Fault, FaultProxy, S3Server
from stores import keys_of
from tenacity import stop_after_attempt

from segpipe.errors import (
    ObjectChanged,
    SegpipeError,
    StorageError,
    StorageRefused,
)
from segpipe.storage import Storage, open_storage, read_uri
from segpipe.storage import retry as retry_module


def _read_in_child(uri: str, answers: multiprocessing.Queue[bytes]) -> None:
    gc.collect()  # what the parent's client left in this process must not reach the parent's connections
    answers.put(read_uri(uri))


@pytest.mark.s3
class TestS3:
    def test_a_forked_child_has_its_own_client_and_leaves_the_parents_alone(
        self, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retry_module, "_STOP", stop_after_attempt(1))  # a broken connection must show
        store = open_storage(s3_prefix)
        store.put("k", b"from the parent")
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=_read_in_child, args=(store.uri("k"), answers))
        child.start()
        try:
            assert answers.get(timeout=20) == b"from the parent"
        finally:
            child.join(10)
            child.kill()
        assert store.read("k") == b"from the parent"

    def test_a_missing_bucket_is_refused_by_name_whatever_is_asked(
        self, s3_prefix: str, tmp_path: Path
    ) -> None:
        source = tmp_path / "f"
        source.write_bytes(b"1")
        store = open_storage("s3://no-such-bucket-here/prefix")
        for act in (
            lambda: store.stat("k"),
            lambda: store.read("k"),
            lambda: list(store.list()),
            lambda: store.put("k", b""),
            lambda: store.put_if_absent("k", b""),
            lambda: store.put_file_if_absent("k", source),
            lambda: store.delete("k"),
        ):
            with pytest.raises(StorageRefused, match="no such bucket"):
                act()

    def test_a_reader_may_read_and_is_refused_a_put(
        self, s3_prefix: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        open_storage(s3_prefix).put("k", b"1")
        for name, value in s3_server.read_only_env.items():
            monkeypatch.setenv(name, value)
        store = open_storage(s3_prefix)
        assert store.read("k") == b"1"
        with pytest.raises(StorageRefused, match="access denied"):
            store.put_if_absent("l", b"1")
        assert store.stat("l") is None
        with pytest.raises(StorageRefused, match="access denied"):
            store.delete("k")
        assert store.read("k") == b"1"

    @pytest.mark.parametrize(
        ("name", "value"),
        [("AWS_SECRET_ACCESS_KEY", "wrong-secret-value"), ("AWS_ACCESS_KEY_ID", "unknown-key-value")],
    )
    def test_wrong_credentials_are_refused_at_once_and_not_repeated(
        self, s3_prefix: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        monkeypatch.setenv(name, value)
        store = open_storage(s3_prefix)
        for act in (lambda: store.read("k"), lambda: store.stat("k"), lambda: store.put("k", b"")):
            with pytest.raises(
                StorageRefused, match=r"\((InvalidAccessKeyId|SignatureDoesNotMatch)\)"
            ) as caught:
                act()
            assert value not in str(caught.value) + repr(caught.value) + repr(store)

    def test_without_credentials_the_message_says_what_to_set(
        self, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(StorageRefused, match="AWS_ACCESS_KEY_ID"):
            open_storage(s3_prefix).read("k")

    def test_a_long_file_is_sent_in_parts_create_only(self, s3_prefix: str, tmp_path: Path) -> None:
        source = tmp_path / "long.bin"
        source.write_bytes(np.random.default_rng(8).bytes(35 << 20))
        store = open_storage(s3_prefix)
        assert store.put_file_if_absent("long.bin", source)
        found = store.stat("long.bin")
        assert found is not None
        assert found.size_bytes == 35 << 20
        assert store.read("long.bin") == source.read_bytes()
        assert not store.put_file_if_absent("long.bin", source)
        source.write_bytes(np.random.default_rng(9).bytes(17 << 20))
        store.put_file("long.bin", source)
        assert store.read("long.bin") == source.read_bytes()


@pytest.mark.s3
class TestS3WithFaults:
    @pytest.fixture(autouse=True)
    def _short_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(retry_module, "_WAIT", lambda state: 0.01)

    @pytest.fixture
    def store(self, s3_prefix: str, s3_proxy: FaultProxy) -> Storage:  # the proxy sets the environment last
        store = open_storage(s3_prefix)
        store.put("seed", b"0123456789" * 1000)
        s3_proxy.seen.clear()
        return store

    @pytest.mark.parametrize(
        ("kind", "code"),
        [
            ("503", "SlowDown"),
            ("500", "InternalError"),
            ("429", "TooManyRequests"),
            ("400", "RequestTimeout"),
        ],
    )
    def test_throttling_and_server_errors_are_tried_again(
        self, store: Storage, s3_proxy: FaultProxy, kind: str, code: str
    ) -> None:
        s3_proxy.faults = [Fault(method, ".", kind, code, times=2) for method in ("PUT", "GET", "HEAD")]
        assert store.put_if_absent("k", b"data")
        assert store.stat("k") is not None
        assert store.read_range("k", 1, 2) == b"at"
        assert s3_proxy.count("PUT", kind) == s3_proxy.count("GET", kind) == s3_proxy.count("HEAD", kind) == 2

    @pytest.mark.parametrize("kind", ["lost", "reset"])
    def test_a_put_whose_reply_is_lost_counts_as_ours(
        self, store: Storage, s3_proxy: FaultProxy, kind: str
    ) -> None:
        s3_proxy.faults = [Fault("PUT", "/unit", kind)]
        assert store.put_if_absent("unit", b"our bytes")
        assert store.read("unit") == b"our bytes"
        assert keys_of(store, "unit") == ["unit"]
        assert s3_proxy.count("PUT") == 2
        assert not store.put_if_absent("unit", b"our bytes")

    def test_a_lost_reply_does_not_hide_that_another_writer_was_first(
        self, store: Storage, s3_proxy: FaultProxy
    ) -> None:
        assert store.put_if_absent("unit", b"other bytes")
        s3_proxy.faults = [Fault("PUT", "/unit", "lost")]
        assert not store.put_if_absent("unit", b"our bytes")
        assert store.read("unit") == b"other bytes"

    @pytest.mark.parametrize("kind", ["lost", "reset", "503", "409"])
    def test_a_delete_that_fails_or_whose_reply_is_lost_is_sent_again(
        self, store: Storage, s3_proxy: FaultProxy, kind: str
    ) -> None:
        s3_proxy.faults = [Fault("DELETE", "/seed", kind, "SlowDown")]
        store.delete("seed")
        assert (s3_proxy.count("DELETE", kind), s3_proxy.count("DELETE")) == (1, 2)
        assert store.stat("seed") is None

    def test_a_store_that_answers_404_to_a_delete_has_no_such_object(
        self, store: Storage, s3_proxy: FaultProxy
    ) -> None:
        s3_proxy.faults = [Fault("DELETE", "/seed", "404", "NoSuchKey")]
        store.delete("seed")
        assert s3_proxy.count("DELETE") == 1

    def test_a_conflict_proves_nothing_and_is_tried_again(self, store: Storage, s3_proxy: FaultProxy) -> None:
        s3_proxy.faults = [Fault("PUT", "/unit", "409", "ConditionalRequestConflict")]
        assert store.put_if_absent("unit", b"our bytes")
        assert store.read("unit") == b"our bytes"
        assert store.put_if_absent("other", b"theirs")
        s3_proxy.faults = [Fault("PUT", "/other", "409", "ConditionalRequestConflict")]
        assert not store.put_if_absent("other", b"ours")
        assert store.read("other") == b"theirs"

    @pytest.mark.parametrize("kind", ["short", "chunked", "reset", "lost"])
    def test_a_body_that_is_cut_is_read_again_and_never_padded(
        self, store: Storage, s3_proxy: FaultProxy, kind: str
    ) -> None:
        seed = b"0123456789" * 1000
        s3_proxy.faults = [Fault("GET", "/seed", kind, times=2)]
        assert store.read_range("seed", 5, 3000) == seed[5:3005]
        s3_proxy.faults = [Fault("GET", "/seed", kind, times=2)]
        assert store.read("seed") == seed
        s3_proxy.faults = [Fault("GET", "/seed", kind, times=3, after=1)]
        ranges = [(index * 100, 100) for index in range(20)]
        assert store.read_ranges("seed", ranges) == [seed[start : start + 100] for start, _ in ranges]
        assert all(fault.times == 0 for fault in s3_proxy.faults)

    def test_a_listing_goes_on_after_faults(self, store: Storage, s3_proxy: FaultProxy) -> None:
        s3_proxy.faults = [Fault("GET", "list-type=2", "503", times=2), Fault("GET", "list-type=2", "short")]
        assert keys_of(store) == ["seed"]

    @pytest.mark.parametrize(("kind", "code"), [("403", "AccessDenied"), ("403", "InvalidAccessKeyId")])
    def test_a_refusal_is_final_at_once(
        self, store: Storage, s3_proxy: FaultProxy, kind: str, code: str
    ) -> None:
        s3_proxy.faults = [Fault("PUT", "/k", kind, code)]
        with pytest.raises(StorageRefused, match=code):
            store.put_if_absent("k", b"")
        assert s3_proxy.count("PUT") == 1

    def test_a_full_store_is_named_as_full(self, store: Storage, s3_proxy: FaultProxy) -> None:
        s3_proxy.faults = [Fault("PUT", "/k", "507", "XMinioStorageFull")]
        with pytest.raises(StorageError, match="full"):
            store.put_if_absent("k", b"")

    def test_a_fault_that_stays_ends_as_a_storage_error_after_eight_tries(
        self, store: Storage, s3_proxy: FaultProxy
    ) -> None:
        s3_proxy.faults = [Fault("PUT", "/k", "503", times=99)]
        with pytest.raises(StorageError, match="SlowDown") as caught:
            store.put_if_absent("k", b"")
        assert s3_proxy.count("PUT") == retry_module.ATTEMPTS == 8
        assert "/k" in str(caught.value)
        assert type(caught.value) is StorageError

    def test_a_long_file_survives_faults_in_its_parts_and_a_lost_completion(
        self, store: Storage, s3_proxy: FaultProxy, tmp_path: Path
    ) -> None:
        source = tmp_path / "long.bin"
        source.write_bytes(np.random.default_rng(9).bytes(17 << 20))
        s3_proxy.faults = [
            Fault("POST", r"\?uploads", "503"),
            Fault("PUT", "partNumber=2", "503"),
            Fault("PUT", "partNumber=1", "reset"),
            Fault("POST", "uploadId=", "lost"),
        ]
        assert store.put_file_if_absent("long.bin", source)
        assert all(fault.times == 0 for fault in s3_proxy.faults)
        assert store.read("long.bin") == source.read_bytes()

    def test_a_long_file_that_replaces_survives_a_lost_completion_and_another_writer(
        self, store: Storage, s3_proxy: FaultProxy, tmp_path: Path
    ) -> None:
        source = tmp_path / "long.bin"
        source.write_bytes(np.random.default_rng(9).bytes(17 << 20))
        store.put("long.bin", b"theirs")
        s3_proxy.faults = [
            Fault("POST", "uploadId=", "lost"),
            Fault("PUT", "partNumber=1", "404", "NoSuchUpload"),
        ]
        store.put_file("long.bin", source)
        assert all(fault.times == 0 for fault in s3_proxy.faults)
        assert store.read("long.bin") == source.read_bytes()

    def test_a_long_file_that_comes_second_is_given_up_and_its_parts_are_dropped(
        self, store: Storage, s3_proxy: FaultProxy, tmp_path: Path
    ) -> None:
        source = tmp_path / "long.bin"
        source.write_bytes(bytes(17 << 20))
        store.put("long.bin", b"theirs")
        s3_proxy.faults = [Fault("HEAD", "/long.bin", "404", "NoSuchKey")]  # not there yet when it began
        assert not store.put_file_if_absent("long.bin", source)
        assert store.read("long.bin") == b"theirs"
        assert s3_proxy.count("DELETE") == 1

    def test_windows_of_an_open_file_fetch_little_more_than_they_touch(
        self, store: Storage, s3_proxy: FaultProxy
    ) -> None:
        data = np.random.default_rng(10).bytes(8 << 20)
        store.put("scene", data)
        s3_proxy.seen.clear()
        with store.open_range("scene") as file:
            for start in range(1 << 20, 7 << 20, 1 << 20):
                file.seek(start)
                assert file.read(400_000) == data[start : start + 400_000]
        fetched = sum(seen.body_bytes for seen in s3_proxy.seen if seen.method == "GET")
        assert fetched <= 1.3 * 6 * 400_000

    def test_a_version_that_changes_between_two_windows_is_found(self, store: Storage) -> None:
        store.put("scene", b"a" * 500_000)
        with store.open_range("scene") as file:
            file.read(10)
            store.put("scene", b"b" * 500_000)
            file.seek(400_000)
            with pytest.raises(ObjectChanged):
                file.read(10)


@pytest.mark.s3
def test_an_endpoint_that_does_not_answer_ends_as_a_storage_error(
    s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_module, "_WAIT", lambda state: 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden@127.0.0.1:9")
    with pytest.raises(SegpipeError) as caught:
        open_storage(s3_prefix).read("k")
    assert isinstance(caught.value, StorageError)
    assert "hidden" not in str(caught.value)
