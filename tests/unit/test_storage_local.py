"""Local files: whole or absent, also where the kernel or the disk does not play along."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peak_memory import peak_growth_bytes

from segpipe.errors import ObjectChanged, StorageError, StorageFull, StorageRefused
from segpipe.storage import open_storage
from segpipe.storage.local import LocalStorage


@pytest.fixture
def store(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "root"))


def files_below(root: str) -> list[str]:
    """Everything that is there, temporary files and folders too."""
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*"))


def failing(real: Callable[..., Any], code: int, when: Callable[..., bool]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return wrapper


def without_tmpfile(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "open", failing(os.open, code, lambda path, flags, *_, **__: is_unnamed(flags)))


def is_unnamed(flags: int) -> bool:
    return flags & os.O_TMPFILE == os.O_TMPFILE


def unnamed_files_work(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except OSError:
        return False
    return True


def without_proc_link(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(
        os, "link", failing(os.link, code, lambda source, *_, **__: str(source).startswith("/proc/"))
    )


def test_opening_a_root_makes_nothing_and_the_first_put_makes_the_folders(store: LocalStorage) -> None:
    assert list(store.list()) == []
    assert store.stat("a") is None
    assert not os.path.exists(store.root)
    assert store.put_if_absent("a/b/c", b"1")
    assert files_below(store.root) == ["a", "a/b", "a/b/c"]


def test_a_new_file_is_never_seen_in_part_and_leaves_nothing_beside_it(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        seen.append(files_below(store.root))
        return real(descriptor, data[:3])

    monkeypatch.setattr(os, "write", write)
    assert store.put_if_absent("folder/k", b"0123456789")
    assert len(seen) == 4
    assert all("folder/k" not in names for names in seen)
    assert store.read("folder/k") == b"0123456789"
    assert files_below(store.root) == ["folder", "folder/k"]


def test_a_kill_in_the_middle_of_a_put_leaves_no_object_and_no_stray_file(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from segpipe.storage import open_storage\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "open_storage(sys.argv[1]).put_if_absent('k', b'x' * 1000)\n"
    )
    (tmp_path / "root").mkdir()
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "root")], check=False, timeout=60)
    assert done.returncode == -9
    assert list(open_storage(str(tmp_path / "root")).list()) == []
    if unnamed_files_work(tmp_path):
        assert files_below(str(tmp_path / "root")) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL])
def test_where_unnamed_files_are_not_to_be_had_a_temporary_file_is_linked_and_removed(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    without_tmpfile(monkeypatch, code)
    assert store.put_if_absent("a/k", b"first")
    assert not store.put_if_absent("a/k", b"second")
    assert store.read("a/k") == b"first"
    assert files_below(store.root) == ["a", "a/k"]


def long_file(folder: Path) -> Path:
    source = folder / "source"
    with source.open("wb") as file:
        file.truncate(200_000_000)
    return source


def put_long_file(source: Path) -> None:
    LocalStorage(str(source.parent / "store")).put_file("k", source)
    assert (source.parent / "store/k").stat().st_size == 200_000_000


def test_a_long_file_is_never_held_whole(tmp_path: Path) -> None:
    assert peak_growth_bytes(partial(long_file, tmp_path), put_long_file) < 20e6
    (tmp_path / "store/k").unlink()


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EXDEV, errno.EPERM])
def test_where_proc_cannot_be_linked_from_a_temporary_file_is_linked_and_removed(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    without_proc_link(monkeypatch, code)
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    assert store.put_if_absent("a/k", b"first")
    assert not store.put_if_absent("a/k", b"second")
    assert store.put_file_if_absent("a/f", source)
    assert store.read("a/f") == b"from a file"
    assert files_below(store.root) == ["a", "a/f", "a/k"]


def test_of_two_writers_without_unnamed_files_the_link_decides(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tmpfile(monkeypatch, errno.EOPNOTSUPP)
    real = os.link

    def link(source: str, target: str, **kwargs: Any) -> None:
        monkeypatch.setattr(os, "link", real)
        Path(target).write_bytes(b"the other was faster")
        real(source, target, **kwargs)

    monkeypatch.setattr(os, "link", link)
    assert not store.put_if_absent("k", b"mine")
    assert store.read("k") == b"the other was faster"
    assert files_below(store.root) == ["k"]


def test_a_file_system_without_hard_links_is_refused_and_left_clean(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM, lambda *_, **__: True))
    with pytest.raises(StorageRefused, match="hard links"):
        store.put_if_absent("k", b"1")
    assert files_below(store.root) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("unnamed", [True, False])
def test_a_full_disk_names_the_path_and_leaves_nothing(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, unnamed: bool
) -> None:
    store.put("kept", b"old")
    source = tmp_path / "source"
    source.write_bytes(b"1")
    if not unnamed:
        without_tmpfile(monkeypatch, errno.EOPNOTSUPP)
    monkeypatch.setattr(os, "write", failing(os.write, code, lambda *_: True))
    for put in (
        lambda: store.put_if_absent("k", b"1"),
        lambda: store.put_file_if_absent("k", source),
        lambda: store.put("k", b"1"),
        lambda: store.put("kept", b"new"),
    ):
        with pytest.raises(StorageFull) as caught:
            put()
        assert store.root in str(caught.value)
    assert files_below(store.root) == ["kept"]
    assert store.read("kept") == b"old"


def test_a_disk_that_fills_at_fsync_leaves_nothing(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("kept", b"old")
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.ENOSPC, lambda *_: True))
    with pytest.raises(StorageFull):
        store.put_if_absent("k", b"1")
    with pytest.raises(StorageFull):
        store.put("kept", b"new")
    assert files_below(store.root) == ["kept"]
    assert store.read("kept") == b"old"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_no_permission_is_refused_with_the_path(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store.put("old", b"1")
    monkeypatch.setattr(
        os, "open", failing(os.open, code, lambda path, flags, *_, **__: flags & os.O_WRONLY != 0)
    )
    for key, put in (("k", store.put_if_absent), ("old", store.put)):
        with pytest.raises(StorageRefused) as caught:
            put(key, b"1")
        assert store.root in str(caught.value)
    assert files_below(store.root) == ["old"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(store: LocalStorage) -> None:
    store.put("a/k", b"1")
    folder = Path(store.root) / "a"
    folder.chmod(0o500)
    try:
        with pytest.raises(StorageRefused):
            store.put_if_absent("a/l", b"1")
    finally:
        folder.chmod(0o700)


def test_a_file_system_that_cannot_sync_folders_is_written_to_all_the_same(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os,
        "fsync",
        failing(os.fsync, errno.EINVAL, lambda descriptor: os.path.isdir(f"/dev/fd/{descriptor}")),
    )
    assert store.put_if_absent("a/k", b"1")
    store.put("a/l", b"2")
    assert files_below(store.root) == ["a", "a/k", "a/l"]


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_new_name_is_on_the_disk_before_the_put_returns(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/dev/fd/{descriptor}"):
            synced.extend(files_below(os.path.realpath(f"/dev/fd/{descriptor}")))
        real(descriptor)

    if not unnamed:
        without_tmpfile(monkeypatch, errno.EOPNOTSUPP)
    monkeypatch.setattr(os, "fsync", fsync)
    for name, put in (("created", store.put_if_absent), ("replaced", store.put)):
        put(f"a/{name}", b"1")
        assert name in synced


def test_another_fault_of_the_disk_is_a_storage_error(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO, lambda *_: True))
    with pytest.raises(StorageError, match="errno 5") as caught:
        store.put_if_absent("k", b"1")
    assert type(caught.value) is StorageError


def test_a_file_where_a_folder_is_needed_is_refused(store: LocalStorage) -> None:
    store.put("a", b"1")
    for put in (store.put_if_absent, store.put):
        with pytest.raises(StorageRefused, match="a file is where a folder is needed"):
            put("a/b/c", b"1")
    assert store.read("a") == b"1"


def test_a_folder_where_a_file_is_needed_is_refused(store: LocalStorage) -> None:
    store.put("a/b", b"1")
    for put in (store.put_if_absent, store.put):
        with pytest.raises(StorageRefused, match="a folder is where a file is needed"):
            put("a", b"1")
    assert files_below(store.root) == ["a", "a/b"]


def test_the_umask_decides_who_may_read_a_new_file(store: LocalStorage) -> None:
    before = os.umask(0o027)
    try:
        store.put_if_absent("created", b"1")
        store.put("replaced", b"1")
    finally:
        os.umask(before)
    modes = [os.stat(os.path.join(store.root, name)).st_mode & 0o777 for name in ("created", "replaced")]
    assert modes == [0o640, 0o640]


def test_the_etag_is_size_and_modification_time(store: LocalStorage) -> None:
    store.put("k", b"x" * 26)
    os.utime(os.path.join(store.root, "k"), ns=(0, 255))
    found = store.stat("k")
    assert found is not None
    assert found.etag == "1a-ff"


@pytest.mark.parametrize("pinned", [True, False])
def test_a_file_that_is_written_to_while_it_is_open_is_found_changed(
    store: LocalStorage, pinned: bool
) -> None:
    store.put("k", b"0" * 1_000_000)
    found = store.stat("k")
    assert found is not None
    with store.open_range("k", found.etag if pinned else None) as file:
        assert file.read(4) == b"0000"
        time.sleep(0.01)
        with open(os.path.join(store.root, "k"), "r+b") as other:
            other.write(b"1")
        file.seek(900_000)
        with pytest.raises(ObjectChanged):
            file.read(4)


def test_a_file_that_is_written_to_while_a_pinned_range_is_read_is_found_changed(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("k", b"old data")
    found = store.stat("k")
    assert found is not None
    real = os.pread

    def pread(descriptor: int, length: int, start: int) -> bytes:
        Path(store.root, "k").write_bytes(b"new data, and more of it")
        return real(descriptor, length, start)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(ObjectChanged):
        store.read_range("k", 0, 3, found.etag)


def test_a_range_that_the_kernel_gives_in_pieces_comes_whole(
    store: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(100))
    store.put("k", data)
    real = os.pread
    monkeypatch.setattr(
        os, "pread", lambda descriptor, length, start: real(descriptor, min(length, 7), start)
    )
    assert store.read_ranges("k", [(3, 60), (90, 60)]) == [data[3:63], data[90:]]


def test_writers_that_make_the_same_new_folder_at_once_all_succeed(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for round_number in range(60):
        with ThreadPoolExecutor(8) as pool:
            keys = [f"new-{round_number}/below/{number}" for number in range(8)]
            assert all(pool.map(lambda key: storage.put_if_absent(key, b"x"), keys))
