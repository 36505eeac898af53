"""Local files as a store: objects appear whole, under their final name, or not at all."""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, Final, cast

from segpipe.errors import (
    ObjectChanged,
    ObjectMissing,
    StorageRefused,
)
from segpipe.storage.api import PAGE_ITEMS, ObjectInfo, check_key, check_prefix, check_range
from segpipe.storage.oserrors import explained
from segpipe.storage.uris import join_uri

TEMP_FOLDER: Final = ".tmp"
"""Folder below the root for files on their way to their name; never listed."""

_COPY_BYTES: Final = 1 << 20
_NO_TMPFILE: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)
_NO_PROC_LINK: Final = (errno.ENOENT, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_NO_FOLDER_SYNC: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems

Writer = Callable[[int], None]
"""Writes an object's bytes to an open file descriptor."""


class LocalStorage:
    """Files below a folder, which is made at the first put. See ``Storage`` for the methods."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[str]]:
        return LocalStorage, (self._root,)

    def __repr__(self) -> str:
        return f"LocalStorage({self._root!r})"

    @property
    def root(self) -> str:
        return self._root

    def uri(self, key: str) -> str:
        return join_uri(self._root, check_key(key))

    def local_path(self, key: str) -> Path | None:
        return Path(self.uri(key))

    def stat(self, key: str) -> ObjectInfo | None:
        path = self.uri(key)
        try:
            with explained(path):
                found = os.stat(path)
        except ObjectMissing:
            return None
        return _info(key, found) if S_ISREG(found.st_mode) else None  # opening a pipe would hang

    def read(self, key: str) -> bytes:
        path = self.uri(key)
        with explained(path), open(path, "rb") as file:
            return file.read()

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        return self.read_ranges(key, [(start, length)], etag)[0]

    def read_ranges(
        self, key: str, ranges: Sequence[tuple[int, int]], etag: str | None = None
    ) -> list[bytes]:
        path = self.uri(key)
        for start, length in ranges:
            check_range(start, length)
        with explained(path), open(path, "rb", buffering=0) as file:
            parts = [_pread(file.fileno(), start, length) for start, length in ranges]
            if etag is not None:
                _check_version(os.fstat(file.fileno()), etag, path)  # after the reads: it covers them all
        return parts

    def open_range(self, key: str, etag: str | None = None, size_bytes: int | None = None) -> BinaryIO:
        path = self.uri(key)
        with explained(path):
            return io.BufferedReader(cast(io.FileIO, _PinnedFile(path, etag)), _COPY_BYTES // 8)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._create(self.uri(key), lambda descriptor: _write_all(descriptor, data))

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        target = self.uri(key)
        if os.path.isfile(target):
            return False  # saves a copy of what may be gigabytes
        with explained(str(path)), open(path, "rb", buffering=0) as source:
            return self._create(target, lambda descriptor: _copy(source, descriptor))

    def put(self, key: str, data: bytes) -> None:
        self._replace(self.uri(key), lambda descriptor: _write_all(descriptor, data))

    def put_file(self, key: str, path: Path) -> None:
        target = self.uri(key)
        with explained(str(path)), open(path, "rb", buffering=0) as source:
            self._replace(target, lambda descriptor: _copy(source, descriptor))

    def delete(self, key: str) -> None:
        path = self.uri(key)
        if self.stat(key) is None:
            return  # nothing, or a folder, pipe or link to one, which is no object
        with suppress(ObjectMissing), explained(path):  # another may have been quicker
            os.unlink(path)
            _sync_folder(os.path.dirname(path))

    def list(self, prefix: str = "") -> Iterator[list[ObjectInfo]]:
        folder, _, start = check_prefix(prefix).rpartition("/")
        page: list[ObjectInfo] = []
        for info in self._walk(folder, start, ()):
            page.append(info)
            if len(page) == PAGE_ITEMS:
                yield page
                page = []
        if page:
            yield page

    def _walk(self, folder: str, start: str, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
        """Files below ``folder`` in key order; ``above``: the folders on the way, against loops of links."""
        path = join_uri(self._root, folder)
        try:
            with explained(path), os.scandir(path) as entries:
                found = os.stat(path)
                # As bytes, which sort as keys do and take half the memory of names with keys beside them.
                names = [
                    os.fsencode(entry.name + "/" if _is_folder_entry(entry) else entry.name)
                    for entry in entries
                    if entry.name.startswith(start) and entry.name != TEMP_FOLDER
                ]
        except ObjectMissing:
            return
        here = (found.st_dev, found.st_ino)
        if here in above:
            return
        names.sort()
        for name in map(os.fsdecode, names):
            key = f"{folder}/{name}" if folder else name
            if name.endswith("/"):
                yield from self._walk(key[:-1], "", (*above, here))
            elif (info := self.stat(key)) is not None:  # gone since, or a link to nothing
                yield info

    def _replace(self, target: str, write: Writer) -> None:
        with explained(target):
            _refuse_folder(target)
            _make_folders(os.path.dirname(target))
            temp = self._write_temp(write)
            try:
                os.replace(temp, target)
                _sync_folder(os.path.dirname(target))
            finally:
                self._drop_temp(temp)

    def _create(self, target: str, write: Writer) -> bool:
        """Make ``target`` with what ``write`` writes; False where it is there already."""
        folder, name = os.path.split(target)
        with explained(target):
            if os.path.isfile(target):
                return False
            _make_folders(folder)
            folder_descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                made = _link_unnamed(folder, folder_descriptor, name, write)
                if made is None:
                    made = self._link_temp(target, write)
                if made:
                    _sync_entries(folder_descriptor)
            finally:
                os.close(folder_descriptor)
            if not made:
                _refuse_folder(target)
            return made

    def _link_temp(self, target: str, write: Writer) -> bool:
        temp = self._write_temp(write)
        try:
            os.link(temp, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise StorageRefused(
                    "this file system has no hard links, so files cannot be made whole or not at all",
                    target,
                    "Choose another file system or s3://.",
                ) from None
            raise
        finally:
            self._drop_temp(temp)
        return True

    def _write_temp(self, write: Writer) -> str:
        """A synced file with a random name in the temporary folder."""
        folder = join_uri(self._root, TEMP_FOLDER)
        temp = join_uri(folder, f"{os.getpid()}-{secrets.token_hex(8)}")
        descriptor = -1
        try:
            while descriptor < 0:  # another process may take the empty folder away in between
                _make_folders(folder)
                with suppress(FileNotFoundError):
                    descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            write(descriptor)
            os.fsync(descriptor)
        except BaseException:
            self._drop_temp(temp)
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return temp

    def _drop_temp(self, temp: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(temp)
        with suppress(OSError):  # not empty: others are at work
            os.rmdir(os.path.dirname(temp))


class _PinnedFile(io.FileIO):
    """A file that refuses to go on when its size or time is no longer the pinned one.

    ``etag`` None pins the version that is found on opening.
    """

    def __init__(self, path: str, etag: str | None) -> None:
        super().__init__(path, "rb")
        self._path = path
        try:
            self._etag = etag or _etag(os.fstat(self.fileno()))
            self._check()
        except BaseException:
            self.close()
            raise

    def readinto(self, buffer: bytearray) -> int | None:  # type: ignore[override]
        with explained(self._path):
            count = super().readinto(buffer)
            self._check()
        return count

    def readall(self) -> bytes:
        with explained(self._path):
            data = super().readall()
            self._check()
        return data or b""

    def _check(self) -> None:
        _check_version(os.fstat(self.fileno()), self._etag, self._path)


def _link_unnamed(folder: str, folder_descriptor: int, name: str, write: Writer) -> bool | None:
    """A file without a name, linked when it is whole: a kill leaves nothing. None = not to be had here."""
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None:
        return None
    try:
        descriptor = os.open(folder, flag | os.O_WRONLY, 0o666)
    except OSError as error:
        if error.errno in _NO_TMPFILE:
            return None
        raise
    try:
        write(descriptor)
        os.fsync(descriptor)
        try:
            # With dst_dir_fd Python calls linkat with AT_SYMLINK_FOLLOW; without it, plain link().
            os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=folder_descriptor, follow_symlinks=True)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_PROC_LINK:
                return None
            raise
        return True
    finally:
        os.close(descriptor)


def _is_folder_entry(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _refuse_folder(target: str) -> None:
    if os.path.isdir(target):
        raise StorageRefused("a folder is where a file is needed", target, "Choose another place.")


def _make_folders(folder: str) -> None:
    """Make ``folder`` and what is missing above it, each name synced into its parent."""
    missing = []
    while (is_folder := _is_folder(folder)) is not True:
        if is_folder is False:
            raise StorageRefused("a file is where a folder is needed", folder, "Choose another place.")
        missing.append(folder)
        folder = os.path.dirname(folder)
    for path in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(path)
        _sync_folder(os.path.dirname(path))


def _is_folder(path: str) -> bool | None:
    """None = there is nothing. Asked once: other writers make and remove folders meanwhile."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False if os.path.islink(path) else None  # a link to nothing


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync_entries(descriptor)
    finally:
        os.close(descriptor)


def _sync_entries(folder_descriptor: int) -> None:
    try:
        os.fsync(folder_descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _copy(source: io.FileIO, descriptor: int) -> None:
    source.seek(0)  # a second way of writing may begin again
    while chunk := source.read(_COPY_BYTES):
        _write_all(descriptor, chunk)


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """Exactly ``length`` bytes, fewer only at the end of the file: one call gives at most 2 GiB."""
    data = os.pread(descriptor, length, start)
    if len(data) == length or not data:
        return data
    parts = [data]
    done = len(data)
    while done < length and (data := os.pread(descriptor, length - done, start + done)):
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, _etag(found))


def _etag(found: os.stat_result) -> str:
    return f"{found.st_size:x}-{found.st_mtime_ns:x}"


def _check_version(found: os.stat_result, etag: str, path: str) -> None:
    if _etag(found) != etag:
        raise ObjectChanged("the file changed since it was planned", path, "Run the same command again.")
