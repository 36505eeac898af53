"""The storage protocol: what every store offers, and the words for its objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol, runtime_checkable

from segpipe.errors import InputError

PAGE_ITEMS: Final = 1000
"""Most objects in one page of a listing."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object: its key below the root, its size and what pins its version.

    ``etag`` is the store's entity tag without quotes; for a local file ``{size:x}-{mtime_ns:x}``.
    """

    key: str
    size_bytes: int
    etag: str


@runtime_checkable
class Storage(Protocol):
    """Objects below one root. Keys are relative, with "/" between parts.

    Methods may be called from several threads at once. Instances pickle as their root and so may be sent to
    other processes, forked ones too. Errors: ``InputError`` for a bad key, ``StorageRefused`` and
    ``StorageFull`` where the store says no, ``StorageError`` where it failed after all retries.
    """

    @property
    def root(self) -> str:
        """The root's URI without a slash at its end; it never holds credentials."""

    def uri(self, key: str) -> str:
        """The full URI of ``key``."""

    def stat(self, key: str) -> ObjectInfo | None:
        """What is there now under ``key``, never from a cache; None = no object."""

    def read(self, key: str) -> bytes:
        """The whole object. Raises ``ObjectMissing``."""

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        """Bytes ``start`` to ``start + length``; fewer only where the object ends.

        ``etag``: the version that must be read, else ``ObjectChanged``. Raises ``ObjectMissing``.
        """

    def read_ranges(
        self, key: str, ranges: Sequence[tuple[int, int]], etag: str | None = None
    ) -> list[bytes]:
        """Several (start, length) ranges in their order, fetched side by side where that helps."""

    def open_range(self, key: str, etag: str | None = None, size_bytes: int | None = None) -> BinaryIO:
        """A seekable read-only file over range reads, of bounded memory.

        All bytes come from one version: ``etag``, else the one that is found on opening. ``size_bytes``
        together with ``etag`` saves the question for them. Raises ``ObjectMissing``, ``ObjectChanged``.
        """

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Make the object, whole, unless there is one. True = it holds our bytes because of this call."""

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        """``put_if_absent`` with the bytes of a local file, which is never held in memory whole."""

    def put(self, key: str, data: bytes) -> None:
        """Make or replace the object; readers see the old or the new bytes, never a mixture."""

    def put_file(self, key: str, path: Path) -> None:
        """``put`` with the bytes of a local file, which is never held in memory whole."""

    def delete(self, key: str) -> None:
        """Remove the object; no error where there is none.

        A request whose reply is lost is sent again, so an object that another writer makes meanwhile may go
        too. Folders of local files stay, empty or not.
        """

    def list(self, prefix: str = "") -> Iterator[list[ObjectInfo]]:
        """Pages of the objects whose key begins with ``prefix``, never from a cache.

        In the store's order: by the bytes of the key for local files and S3; some S3-like stores sort folder
        by folder.
        """

    def local_path(self, key: str) -> Path | None:
        """The path of ``key`` where the store is this machine's file system, else None."""


def check_key(key: str) -> str:
    """``key`` itself, or ``InputError`` where it is no relative path that stays below the root."""
    if not key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise InputError(
            f"{key!r} is no valid key", "", "A key is relative and has no empty part, '.', '..' or NUL."
        )
    return key


def check_prefix(prefix: str) -> str:
    """``prefix`` itself, or ``InputError``; it may be empty or end within or after a part."""
    if prefix:
        folder = prefix.rpartition("/")[0]
        if prefix.startswith("/") or "\0" in prefix:
            raise InputError(f"{prefix!r} is no valid prefix", "", "A prefix is relative.")
        if folder:
            check_key(folder)
    return prefix


def check_range(start: int, length: int) -> None:
    """``ValueError`` for a range that no object can have: it is the caller's slip, not the store's."""
    if start < 0 or length < 0:
        raise ValueError(f"a range needs start >= 0 and length >= 0, not {start}, {length}")
