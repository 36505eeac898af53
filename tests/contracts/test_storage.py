"""What every store keeps, run against local files, memory and a real S3 server; then S3 with faults."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import pickle
import sys
import tarfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import Fault, FaultProxy, S3Server
from tenacity import stop_after_attempt

from segpipe.errors import (
    InputError,
    ObjectChanged,
    ObjectMissing,
    SegpipeError,
    StorageError,
    StorageRefused,
)
from segpipe.storage import Storage, api, join_uri, open_object, open_storage, read_uri
from segpipe.storage import retry as retry_module

ODD_KEYS = (
    "a b.tif",
    "ü/日本.tif",
    "100%/x%20y.tif",
    "p+q&r=s?t#u.tif",
    "quote'\"[1]{2}*.tif",
    "-dash/~tilde@at:colon;.tif",
)


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "root"))
    if request.param == "memory":
        return open_storage(f"memory://{uuid.uuid4().hex}/root")
    return open_storage(f"{request.getfixturevalue('s3_prefix')}/some root")


def keys_of(store: Storage, prefix: str = "") -> list[str]:
    return [info.key for page in store.list(prefix) for info in page]


class TestEveryStore:
    def test_a_put_object_reads_back_by_key_by_range_and_by_uri(self, store: Storage) -> None:
        data = bytes(range(256)) * 40
        assert store.put_if_absent("deep/er/object.bin", data)
        assert store.read("deep/er/object.bin") == data
        assert store.read_range("deep/er/object.bin", 300, 500) == data[300:800]
        assert read_uri(store.uri("deep/er/object.bin")) == data
        again, key = open_object(store.uri("deep/er/object.bin"))
        assert (again.root, key) == (join_uri(store.root, "deep/er"), "object.bin")

    def test_put_if_absent_leaves_an_object_that_is_there(self, store: Storage) -> None:
        assert store.put_if_absent("k", b"first")
        assert not store.put_if_absent("k", b"second")
        assert not store.put_if_absent("k", b"first")
        assert store.read("k") == b"first"

    def test_of_many_writers_exactly_one_wins_each_key(self, store: Storage) -> None:
        keys = [f"race/{index}" for index in range(20)]

        def write(writer: int) -> list[str]:
            return [key for key in keys if store.put_if_absent(key, f"writer {writer}".encode())]

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert sorted(key for each in won for key in each) == sorted(keys)
        for writer, mine in enumerate(won):
            assert all(store.read(key) == f"writer {writer}".encode() for key in mine)

    def test_put_replaces_the_whole_object(self, store: Storage) -> None:
        store.put("report.json", b"a longer first version")
        store.put("report.json", b"short")
        assert store.read("report.json") == b"short"
        assert keys_of(store) == ["report.json"]

    def test_an_empty_object_is_an_object(self, store: Storage) -> None:
        assert store.put_if_absent("empty", b"")
        assert store.read("empty") == b""
        found = store.stat("empty")
        assert found is not None
        assert found.size_bytes == 0
        assert store.read_range("empty", 0, 10) == b""
        assert store.open_range("empty").read() == b""

    def test_stat_tells_size_and_an_etag_that_a_new_version_changes(self, store: Storage) -> None:
        store.put("k", b"12345")
        first = store.stat("k")
        assert first is not None
        assert (first.key, first.size_bytes) == ("k", 5)
        assert first.etag
        assert '"' not in first.etag
        assert store.stat("k") == first
        time.sleep(0.01)
        store.put("k", b"54321")
        second = store.stat("k")
        assert second is not None
        assert second.etag != first.etag

    def test_stat_of_what_is_not_there_or_only_a_folder_is_none(self, store: Storage) -> None:
        store.put("folder/k", b"1")
        assert store.stat("nothing") is None
        assert store.stat("folder") is None
        assert store.stat("folder/k/below") is None

    @pytest.mark.parametrize("key", ["nothing", "no/such/folder/k", "folder"])
    def test_reading_what_is_not_there_raises_object_missing(self, store: Storage, key: str) -> None:
        store.put("folder/k", b"1")
        for read in (
            lambda: store.read(key),
            lambda: store.read_range(key, 0, 4),
            lambda: store.read_ranges(key, [(0, 1), (2, 3)]),
            lambda: store.open_range(key),
        ):
            with pytest.raises(ObjectMissing) as caught:
                read()
            assert key in str(caught.value)

    def test_a_range_is_short_only_where_the_object_ends(self, store: Storage) -> None:
        data = np.random.default_rng(1).bytes(5000)
        store.put("k", data)
        ranges = [(0, 1), (4999, 1), (4990, 100), (5000, 10), (9000, 10), (17, 0), (0, 5000), (0, 9999)]
        assert store.read_ranges("k", ranges) == [data[start : start + length] for start, length in ranges]
        assert store.read_ranges("k", []) == []

    def test_many_ranges_come_back_in_their_order(self, store: Storage) -> None:
        data = np.random.default_rng(2).bytes(100_000)
        store.put("k", data)
        starts = np.random.default_rng(3).integers(0, 99_000, 40).tolist()
        found = store.read_ranges("k", [(start, 700) for start in starts])
        assert found == [data[start : start + 700] for start in starts]

    def test_a_range_with_the_pinned_etag_of_an_older_version_raises_object_changed(
        self, store: Storage
    ) -> None:
        store.put("k", b"old bytes")
        pinned = store.stat("k")
        assert pinned is not None
        assert store.read_range("k", 0, 3, pinned.etag) == b"old"
        time.sleep(0.01)
        store.put("k", b"new bytes")
        with pytest.raises(ObjectChanged):
            store.read_range("k", 0, 3, pinned.etag)
        with pytest.raises(ObjectChanged):
            store.read_ranges("k", [(0, 3), (4, 2)], pinned.etag)
        with pytest.raises(ObjectChanged):
            store.open_range("k", pinned.etag)
        with pytest.raises(ObjectChanged):
            store.open_range("k", pinned.etag, pinned.size_bytes).read()

    def test_an_open_file_never_mixes_two_versions(self, store: Storage) -> None:
        old, new = b"o" * 300_000, b"n" * 300_000
        store.put("k", old)
        with store.open_range("k") as file:
            assert file.read(10) == old[:10]
            store.put("k", new)
            file.seek(200_000)
            with suppress(ObjectChanged):  # allowed instead of the old bytes; new ones never are
                assert file.read(100_000) == old[200_000:]

    def test_an_open_file_reads_as_the_bytes_themselves(self, store: Storage) -> None:
        data = np.random.default_rng(4).bytes(700_001)
        store.put("k", data)
        rng = np.random.default_rng(5)
        with store.open_range("k") as file:
            plain = io.BytesIO(data)
            assert file.seekable()
            assert file.readable()
            for _ in range(100):
                position, length = int(rng.integers(0, 700_100)), int(rng.choice([1, 100, 70_000, 300_000]))
                assert file.seek(position) == plain.seek(position)
                assert file.read(length) == plain.read(length)
                assert file.read(length) == plain.read(length)  # goes straight on: read ahead
                assert file.tell() == min(plain.tell(), 700_001) or position > 700_001
            assert file.seek(-5, io.SEEK_END) == 699_996
            assert file.read() == data[-5:]

    def test_pyarrow_and_tarfile_read_through_open_range(self, store: Storage) -> None:
        table = pa.table({"n": np.arange(50_000), "x": np.random.default_rng(6).random(50_000)})
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=10_000)
        store.put("t.parquet", sink.getvalue())
        with store.open_range("t.parquet") as file:
            parquet = pq.ParquetFile(file)
            assert parquet.read_row_group(3, columns=["x"])["x"].equals(table["x"].slice(30_000, 10_000))
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for index in range(5):
                member = tarfile.TarInfo(f"{index}.bin")
                member.size = 1000
                tar.addfile(member, io.BytesIO(bytes([index]) * 1000))
        store.put("t.tar", archive.getvalue())
        with store.open_range("t.tar") as file, tarfile.open(fileobj=file) as tar:
            names = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert names == {f"{index}.bin": bytes([index]) * 1000 for index in range(5)}

    def test_keys_with_any_characters_round_trip_through_put_list_and_read(self, store: Storage) -> None:
        for key in ODD_KEYS:
            assert store.put_if_absent(key, key.encode())
            assert not store.put_if_absent(key, b"x")
        assert keys_of(store) == sorted(ODD_KEYS, key=str.encode)
        for key in ODD_KEYS:
            assert store.read(key) == key.encode()
            found = store.stat(key)
            assert found is not None
            assert found.size_bytes == len(key.encode())

    def test_a_listing_is_sorted_by_whole_key_as_an_object_store_sorts(self, store: Storage) -> None:
        keys = ["a", "a.b", "a/c", "a0", "ab/x", "a-b/y", "b/1/2/3", "b/10", "b/2", "é", "z"]
        keys.remove("a")  # a file and a folder of one name do not fit on a local disk
        for key in reversed(keys):
            store.put(key, key.encode())
        found = keys_of(store)
        if store.root.startswith("s3:"):  # SeaweedFS sorts folder by folder
            found = sorted(found, key=str.encode)
        assert found == sorted(keys, key=str.encode)
        sizes = {info.key: info.size_bytes for page in store.list() for info in page}
        assert sizes == {key: len(key.encode()) for key in keys}
        assert all(info == store.stat(info.key) for page in store.list() for info in page)

    def test_a_prefix_may_end_within_or_after_a_part(self, store: Storage) -> None:
        for key in ("masks/part-0/u1", "masks/part-0/u2", "masks/part-01/u3", "maskx", "plan/p"):
            store.put(key, b"1")
        assert keys_of(store, "masks/") == ["masks/part-0/u1", "masks/part-0/u2", "masks/part-01/u3"]
        assert keys_of(store, "masks/part-0") == ["masks/part-0/u1", "masks/part-0/u2", "masks/part-01/u3"]
        assert keys_of(store, "masks/part-0/") == ["masks/part-0/u1", "masks/part-0/u2"]
        assert keys_of(store, "mask") == [
            "masks/part-0/u1",
            "masks/part-0/u2",
            "masks/part-01/u3",
            "maskx",
        ]
        assert keys_of(store, "none/") == []
        assert keys_of(store, "plan/p/") == []

    def test_a_listing_comes_in_pages(self, store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        assert api.PAGE_ITEMS == 1000
        monkeypatch.setattr(sys.modules[type(store).__module__], "PAGE_ITEMS", 10)
        keys = [f"many/{index:05d}" for index in range(25)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put_if_absent(key, b""), keys))
        pages = list(store.list("many/"))
        assert [info.key for page in pages for info in page] == keys
        assert [len(page) for page in pages] == [10, 10, 5]

    def test_a_listing_and_a_stat_see_what_another_client_just_wrote(self, store: Storage) -> None:
        assert keys_of(store) == []
        assert store.stat("late") is None
        other = pickle.loads(pickle.dumps(store))  # noqa: S301
        other.put("late", b"1")
        assert keys_of(store) == ["late"]
        assert store.stat("late") is not None

    def test_a_file_is_put_create_only(self, store: Storage, tmp_path: Path) -> None:
        source = tmp_path / "source.bin"
        source.write_bytes(np.random.default_rng(7).bytes(3_000_000))
        assert store.put_file_if_absent("exports/a.tif", source)
        assert store.read("exports/a.tif") == source.read_bytes()
        before = store.read("exports/a.tif")
        source.write_bytes(b"other")
        assert not store.put_file_if_absent("exports/a.tif", source)
        assert store.read("exports/a.tif") == before
        assert keys_of(store) == ["exports/a.tif"]

    def test_a_deleted_object_is_gone_and_may_be_made_anew(self, store: Storage) -> None:
        for key in (*ODD_KEYS, "a/b", "a/c", "ab"):
            store.put(key, b"old")
        for key in ODD_KEYS:
            store.delete(key)
        store.delete("a/b")
        assert keys_of(store) == ["a/c", "ab"]
        assert store.stat("a/b") is None
        with pytest.raises(ObjectMissing):
            store.read("a/b")
        assert store.put_if_absent("a/b", b"new")
        assert store.read("a/b") == b"new"

    def test_deleting_what_is_not_there_is_no_error(self, store: Storage) -> None:
        store.delete("never")
        store.delete("no/such/folder/k")
        store.put("k", b"1")
        store.delete("k")
        store.delete("k")
        store.delete("k/below")
        assert keys_of(store) == []

    def test_deleting_a_folders_name_leaves_what_is_in_it(self, store: Storage) -> None:
        store.put("folder/k", b"1")
        store.delete("folder")
        assert store.read("folder/k") == b"1"

    def test_of_many_that_delete_at_once_none_fails(self, store: Storage) -> None:
        keys = [f"race/{index}" for index in range(10)]
        for key in keys:
            store.put(key, b"1")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(store.delete, keys * 8))
        assert keys_of(store) == []

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/..", ".", "./a", "a\0b"])
    def test_a_key_that_could_leave_the_root_is_refused(
        self, store: Storage, key: str, tmp_path: Path
    ) -> None:
        source = tmp_path / "source.bin"
        source.write_bytes(b"1")
        for act in (
            lambda: store.uri(key),
            lambda: store.stat(key),
            lambda: store.read(key),
            lambda: store.read_range(key, 0, 1),
            lambda: store.open_range(key),
            lambda: store.put(key, b""),
            lambda: store.put_if_absent(key, b""),
            lambda: store.put_file_if_absent(key, source),
            lambda: store.delete(key),
            lambda: store.local_path(key),
        ):
            with pytest.raises(InputError):
                act()
        assert keys_of(store) == []

    def test_a_bad_prefix_is_refused(self, store: Storage) -> None:
        for prefix in ("/", "../", "a/../", "a//"):
            with pytest.raises(InputError):
                list(store.list(prefix))

    def test_a_negative_range_is_the_callers_slip(self, store: Storage) -> None:
        store.put("k", b"123")
        with pytest.raises(ValueError, match="range"):
            store.read_range("k", -1, 2)

    def test_an_instance_pickles_as_its_root(self, store: Storage) -> None:
        store.put("k", b"1")
        copy = pickle.loads(pickle.dumps(store))  # noqa: S301
        assert copy.root == store.root
        assert copy.read("k") == b"1"
        assert isinstance(copy, Storage)

    def test_local_path_is_given_for_local_files_only(self, store: Storage) -> None:
        store.put("a/b", b"1")
        path = store.local_path("a/b")
        assert (path is not None) == (not store.root.startswith(("s3:", "memory:")))
        assert path is None or path.read_bytes() == b"1"

    def test_errors_survive_pickling(self, store: Storage) -> None:
        with pytest.raises(ObjectMissing) as caught:
            store.read("nothing")
        copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
        assert (type(copy), str(copy)) == (ObjectMissing, str(caught.value))


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


def test_nothing_is_deleted_over_http() -> None:
    with pytest.raises(StorageRefused, match="can only be read"):
        open_storage("http://127.0.0.1:9/folder").delete("k")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may delete anything")
def test_a_local_file_in_a_folder_without_write_permission_is_not_deleted(tmp_path: Path) -> None:
    store = open_storage(str(tmp_path / "root"))
    store.put("folder/k", b"1")
    folder = tmp_path / "root" / "folder"
    folder.chmod(0o500)
    try:
        with pytest.raises(StorageRefused, match="Check the permissions"):
            store.delete("folder/k")
    finally:
        folder.chmod(0o700)
    assert store.read("folder/k") == b"1"


def test_deleting_a_link_to_a_folder_or_a_file_leaves_what_it_points_to(tmp_path: Path) -> None:
    store = open_storage(str(tmp_path / "root"))
    store.put("k", b"1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"2")
    (tmp_path / "root" / "to_folder").symlink_to(elsewhere)
    (tmp_path / "root" / "to_file").symlink_to(elsewhere / "file")
    store.delete("to_folder")
    store.delete("to_file")
    assert (elsewhere / "file").read_bytes() == b"2"
    assert (tmp_path / "root" / "to_folder").is_symlink()
    assert keys_of(store) == ["k", "to_folder/file"]


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
