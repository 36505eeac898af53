"""Any other fsspec store: ``memory://`` (tests), ``gs://``, ``az://``, ``https://`` (read-only)."""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, TypeVar, cast

import aiohttp
import fsspec
from fsspec.asyn import FSTimeoutError

from segpipe.errors import (
    InputError,
    ObjectChanged,
    ObjectMissing,
    SegpipeError,
    StorageError,
    StorageRefused,
)
from segpipe.storage.api import PAGE_ITEMS, ObjectInfo, check_key, check_prefix, check_range
from segpipe.storage.rangefile import RangeFile
from segpipe.storage.retry import Transient, retry
from segpipe.storage.uris import join_uri, scheme_of

T = TypeVar("T")

_READ_ONLY: Final = ("http", "https")
_VERSION_FIELDS: Final = ("etag", "ETag", "generation", "md5Hash", "mtime", "last_modified", "LastModified")
_PASSING: Final = (408, 425, 429)  # with 5xx: what may be asked again (RFC 9110, 8470, 6585)
_CREDENTIALS: Final = "Check the credentials for this store."
_NOT_ABSENCE: Final = (aiohttp.ClientError, ConnectionError, TimeoutError)
_ABSENT: Final = (404, 410)
_USUAL: Final = "a path, s3://, gs://, az:// or https://"
_memory_lock = threading.Lock()


class FsspecStorage:
    """Objects below a root of any fsspec scheme. See ``Storage`` for the methods.

    Weaker than S3 in two places: a version is compared before a range is read, not by the same request, and a
    scheme without ``mode="create"`` gets its create-only put from a question and a write, between which
    another writer fits. ``gs://`` and ``az://`` know ``mode="create"``; memory is locked.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._scheme = scheme_of(root)
        try:
            file_system = fsspec.get_filesystem_class(self._scheme)
        except (ImportError, ValueError) as error:
            fix = "Install its package." if isinstance(error, ImportError) else f"Use {_USUAL}."
            raise InputError(f"cannot open {self._scheme}:// ({error})", root, fix) from None
        settings = file_system._get_kwargs_from_urls(root)  # a host, say
        _refuse_lacking(file_system, settings, root)
        try:
            self._fs: Any = file_system(use_listings_cache=False, **settings)
            self._base: str = self._fs._strip_protocol(root)
        except Exception as error:
            name = type(error).__name__  # the text may hold credentials
            raise StorageRefused(f"cannot connect ({name})", root, "Check the store's settings.") from None

    def __reduce__(self) -> tuple[type[FsspecStorage], tuple[str]]:
        return FsspecStorage, (self._root,)

    def __repr__(self) -> str:
        return f"FsspecStorage({self._root!r})"

    @property
    def root(self) -> str:
        return self._root

    def uri(self, key: str) -> str:
        return join_uri(self._root, check_key(key))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def stat(self, key: str) -> ObjectInfo | None:
        path, where = self._path(key), self.uri(key)
        try:
            found = self._try(lambda: self._fs.info(path), where)
        except ObjectMissing:
            return None
        return None if found["type"] == "directory" else self._info(key, path, found)

    def read(self, key: str) -> bytes:
        path = self._path(key)
        data: bytes = self._try(lambda: self._fs.cat_file(path), self.uri(key))
        return data

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        return self.read_ranges(key, [(start, length)], etag)[0]

    def read_ranges(
        self, key: str, ranges: Sequence[tuple[int, int]], etag: str | None = None
    ) -> list[bytes]:
        for start, length in ranges:
            check_range(start, length)
        where = self.uri(key)
        found = self.stat(key)
        if found is None:
            raise ObjectMissing("no such object", where)
        if etag is not None and etag != found.etag:
            raise ObjectChanged(
                "the object changed since it was planned", where, "Run the same command again."
            )
        size = found.size_bytes
        ends = [min(start + length, size) for start, length in ranges]
        wanted = [(start, end) for (start, _), end in zip(ranges, ends, strict=True) if end > start]
        fetched: Iterator[bytes] = iter(self._fetch(self._path(key), where, wanted))
        return [next(fetched) if end > start else b"" for (start, _), end in zip(ranges, ends, strict=True)]

    def open_range(self, key: str, etag: str | None = None, size_bytes: int | None = None) -> BinaryIO:
        if etag is None or size_bytes is None:
            found = self.stat(key)
            if found is None:
                raise ObjectMissing("no such object", self.uri(key))
            etag, size_bytes = etag or found.etag, found.size_bytes
        pinned = etag
        file = RangeFile(lambda ranges: self.read_ranges(key, ranges, pinned), size_bytes, self.uri(key))
        if size_bytes:
            file.prefetch([(0, 1)])  # a version that is gone shows itself now
        return cast(BinaryIO, file)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._create(key, lambda path: self._fs.pipe_file(path, bytes(data), mode="create"))

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        if self.stat(key) is not None:
            return False
        if self._scheme == "memory":
            return self.put_if_absent(key, path.read_bytes())
        return self._create(key, lambda target: self._fs.put_file(str(path), target, mode="create"))

    def put(self, key: str, data: bytes) -> None:
        self._check_writable()
        path = self._path(key)
        self._try(lambda: self._fs.pipe_file(path, bytes(data)), self.uri(key))

    def put_file(self, key: str, path: Path) -> None:
        self._check_writable()
        target = self._path(key)
        self._try(lambda: self._fs.put_file(str(path), target), self.uri(key))

    def delete(self, key: str) -> None:
        self._check_writable()
        path = self._path(key)
        with suppress(ObjectMissing):
            self._try(lambda: self._fs.rm_file(path), self.uri(key))

    def _path(self, key: str) -> str:
        return f"{self._base.rstrip('/')}/{check_key(key)}"

    def _info(self, key: str, path: str, found: dict[str, Any]) -> ObjectInfo:
        size = int(found.get("size") or 0)
        if self._scheme == "memory":
            etag = hashlib.sha256(self._fs.cat_file(path)).hexdigest()[:32]
        else:
            version = next((found[name] for name in _VERSION_FIELDS if found.get(name)), size)
            etag = str(version).strip('"')
        return ObjectInfo(key, size, etag)

    def _fetch(self, path: str, where: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of (start, end) spans that lie inside the object."""

        def work() -> list[bytes]:
            if self._fs.async_impl and len(spans) > 1:
                starts, ends = [start for start, _ in spans], [end for _, end in spans]
                parts = self._fs.cat_ranges([path] * len(spans), starts, ends, on_error="raise")
            else:
                parts = [self._fs.cat_file(path, start=start, end=end) for start, end in spans]
            for part, (start, end) in zip(parts, spans, strict=True):
                _check_length(len(part), end - start, where)
            return list(parts)

        return self._try(work, where)

    def _create(self, key: str, write: Callable[[str], object]) -> bool:
        self._check_writable()
        path, where = self._path(key), self.uri(key)

        def attempt() -> bool:
            if self._scheme == "memory":
                with _memory_lock:
                    if self._fs.exists(path):
                        return False
                    write(path)
                    return True
            try:
                write(path)
            except FileExistsError:
                return False
            return True

        return self._try(attempt, where)

    def _check_writable(self) -> None:
        if self._scheme in _READ_ONLY:
            raise StorageRefused(f"{self._scheme}:// can only be read", self._root, "Write to another place.")

    def _try(self, work: Callable[[], T], where: str) -> T:
        return retry(lambda: _explained(work, where), where)

    def list(self, prefix: str = "") -> Iterator[list[ObjectInfo]]:
        folder = check_prefix(prefix).rpartition("/")[0]
        base = self._path(folder) if folder else self._base
        try:
            found = self._try(lambda: self._fs.find(base, detail=True), join_uri(self._root, prefix))
        except ObjectMissing:
            return
        start = len(self._base.rstrip("/")) + 1
        items = sorted((path[start:], path) for path, item in found.items() if item["type"] == "file")
        items = [(key, path) for key, path in items if key.startswith(prefix)]
        for first in range(0, len(items), PAGE_ITEMS):
            yield [self._info(key, path, found[path]) for key, path in items[first : first + PAGE_ITEMS]]


def _refuse_lacking(file_system: type[Any], settings: dict[str, Any], root: str) -> None:
    """Raise `InputError` for a store that cannot be made from what its URI tells."""
    _, *parameters = inspect.signature(file_system.__init__).parameters.values()
    named = [item for item in parameters if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    if needed := [item.name for item in named if item.default is item.empty and item.name not in settings]:
        what = f"{scheme_of(root)}:// needs more than this URI tells ({', '.join(needed)})"
        raise InputError(what, root, f"Use {_USUAL}.")


def _explained(work: Callable[[], T], where: str) -> T:
    """``work()`` with the store's errors as this package's; their texts may hold secrets and are left out."""
    try:
        return work()
    except (SegpipeError, Transient):
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        cause = error.__cause__  # fsspec's HTTP says "not found" whatever has happened
        if isinstance(cause, _NOT_ABSENCE) and getattr(cause, "status", None) not in _ABSENT:
            return _explained(lambda: _raise(cause), where)
        raise ObjectMissing("no such object", where) from None
    except PermissionError:
        raise StorageRefused("access denied", where, _CREDENTIALS) from None
    except (ConnectionError, TimeoutError, FSTimeoutError) as error:
        raise Transient(type(error).__name__) from None
    except Exception as error:
        raise _of_http(error, where) from None


def _check_length(found: int, expected: int, where: str) -> None:
    """A short answer may be whole the next time; a longer one than was asked for comes again and again."""
    if found > expected:
        what = f"the server answers {found} bytes where {expected} were asked for"
        fix = "It must honour range requests: use another server, or copy the files."
        raise StorageError(what, where, fix)
    if found < expected:
        raise Transient(f"short body: {found} of {expected} bytes")


def _raise(error: Exception) -> NoReturn:
    raise error


def _of_http(error: Exception, where: str) -> Exception:
    """What a client of HTTP raised, told by its status; whatever else it is, by its name."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if status in (401, 403):
        return StorageRefused(f"access denied (HTTP {status})", where, _CREDENTIALS)
    if isinstance(status, int) and (status in _PASSING or status >= 500):
        return Transient(f"HTTP {status}")
    if isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)):
        return Transient(type(error).__name__)
    told = f"HTTP {status}" if isinstance(status, int) else type(error).__name__
    return StorageError(f"the store failed ({told})", where, "Run the same command again.")
