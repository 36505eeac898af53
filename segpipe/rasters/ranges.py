"""A remote object as GDAL's file: windows by range reads of one version, never the whole object."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from rasterio._vsiopener import MultiByteRangeResource, MultiByteRangeResourceContainer

from segpipe.rasters.scene import Version
from segpipe.storage import Storage


class RangedObject(MultiByteRangeResourceContainer):
    """One object in one version, as the "file system" with one file that rasterio's ``opener`` takes.

    An exception must not reach GDAL's callbacks: rasterio cannot hand it on. So a fault is kept, GDAL gets
    bytes that fail or are thrown away, and the caller asks `take_fault` after every GDAL call.
    """

    def __init__(self, storage: Storage, key: str, version: Version) -> None:
        self._storage = storage
        self._key = key
        self._version = version
        self._file = storage.open_range(key, etag=version.etag, size_bytes=version.size_bytes)
        self._lock = threading.Lock()
        self._fault: BaseException | None = None

    @property
    def size_bytes(self) -> int:
        return self._version.size_bytes

    def take_fault(self) -> BaseException | None:
        """The first fault since the last call, or None."""
        fault, self._fault = self._fault, None
        return fault

    def keep_fault(self, fault: BaseException) -> None:
        self._fault = self._fault or fault

    def read_at(self, start: int, length: int) -> bytes:
        """Up to ``length`` bytes through the file's block cache; raises storage errors."""
        with self._lock:
            self._file.seek(start)
            return self._file.read(length)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Exactly the (start, length) ranges, side by side; ``EOFError`` past the end."""
        if any(start + length > self.size_bytes for start, length in ranges):
            raise EOFError(self._key)
        return self._storage.read_ranges(self._key, ranges, self._version.etag)

    # --- what rasterio's opener asks; GDAL opens no other name, since it sees no sidecars

    def open(self, path: str, mode: str = "rb", **_: Any) -> _Handle:
        return _Handle(self)

    def isfile(self, path: str) -> bool:
        return True

    def isdir(self, path: str) -> bool:
        return False

    def ls(self, path: str) -> list[str]:
        return []

    def mtime(self, path: str) -> int:
        return 0

    def size(self, path: str) -> int:
        return self.size_bytes

    def rm(self, path: str) -> None:
        raise PermissionError("read only")


class _Handle(MultiByteRangeResource):
    """One open handle: a position over the object."""

    def __init__(self, ranged: RangedObject) -> None:
        self._object = ranged
        self._position = 0

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The object is shared by all handles and stays."""

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._object.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        try:
            length = self._object.size_bytes if size < 0 else size
            data = self._object.read_at(self._position, length)
        except BaseException as fault:
            self._object.keep_fault(fault)
            return b""
        self._position += len(data)
        return data

    def get_byte_ranges(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        try:
            return self._object.read_ranges(list(zip(offsets, sizes, strict=True)))
        except BaseException as fault:
            self._object.keep_fault(fault)
            return [bytes(size) for size in sizes]  # GDAL copies that many; the caller throws the result away
