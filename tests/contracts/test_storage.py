"""What every store keeps, run against local files, memory and a real S3 server."""

from __future__ import annotations

import io
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
from stores import keys_of

from segpipe.errors import (
    InputError,
    ObjectChanged,
    ObjectMissing,
    StorageRefused,
)
from segpipe.storage import Storage, api, join_uri, open_object, open_storage, read_uri

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

    def test_a_file_replaces_an_object(self, store: Storage, tmp_path: Path) -> None:
        source = tmp_path / "source.bin"
        for data in (np.random.default_rng(7).bytes(3_000_000), b"", b"shorter"):
            source.write_bytes(data)
            store.put_file("reports/a.parquet", source)
            assert store.read("reports/a.parquet") == data
        assert keys_of(store) == ["reports/a.parquet"]

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
            lambda: store.put_file(key, source),
            lambda: store.delete(key),
            lambda: store.local_path(key),
        ):
            with pytest.raises(InputError):
                act()
        assert keys_of(store) == []

    def test_a_bad_prefix_is_refused(self, store: Storage) -> None:
        for prefix in ("/", "../", "a/../", "a//", "a\0"):
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
