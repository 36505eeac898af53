"""Opens one raster through GDAL, under fixed settings and with the driver that its first bytes name.

A VRT, a text file or an XML name is never followed: only the drivers of `driver_of` are ever tried, GDAL sees
no sidecars, and it is given nothing but absolute paths and our own range reads.
"""

from __future__ import annotations

import contextvars
import io
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import TracebackType
from typing import Any, Final, TypeVar

import numpy as np
import rasterio
import rasterio.env
from rasterio._err import CPLE_BaseError, CPLE_OutOfMemoryError
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.session import DummySession

from segpipe.errors import ObjectChanged, ObjectMissing, SceneError
from segpipe.geometry.grid import Window
from segpipe.pages import block_zeros
from segpipe.rasters.ranges import RangedObject
from segpipe.rasters.scene import CHANGED_FIX, Version
from segpipe.storage import Storage, open_object

Array = np.ndarray[Any, Any]
T = TypeVar("T")

HEAD_BYTES: Final = 16

WHOLE_BYTES: Final = 64 << 20
"""A remote image that is no GeoTIFF is fetched whole up to this size: its formats have no windows."""

_PROBE_BYTES: Final = 1 << 20
_PROBES: Final = 64

BLOCK_CACHE_BYTES: Final = 64 << 20
"""GDAL's cache of decoded blocks in this process: rows that neighbouring windows share are decoded once."""

OPTIONS: Final = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no sidecars: .msk, .ovr, .tfw
    "GDAL_PAM_ENABLED": "NO",  # no .aux.xml, neither read nor written
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    "GDAL_NUM_THREADS": "1",  # the threads are ours
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "YES",  # else a truncated JPEG is grey where it ends
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",  # that path returns zeros where a truncated PNG ends
    "GDAL_MAX_RAW_BLOCK_CACHE_SIZE": str(256 << 20),  # all tiles of a window in one call of get_byte_ranges
}

GDAL_ERRORS: Final = (RasterioError, CPLE_BaseError, UnicodeError)
"""What rasterio raises where GDAL fails."""

_VSI_NAME: Final = re.compile(r"/?vsi(?:riopener|mem)[^\s,:']*")


def driver_of(head: bytes) -> str | None:
    """The GDAL driver for an object that begins with ``head`` (16 bytes are enough), or None."""
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "GTiff"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return None


@contextmanager
def gdal_environment() -> Iterator[None]:
    """GDAL's settings for the calls inside, in this thread."""
    _prepare_process()
    with rasterio.Env(session=DummySession(), **OPTIONS):
        yield


@lru_cache(maxsize=1)
def _prepare_process() -> None:
    # set once, not by Env: leaving an Env would lift the cap while another thread still reads
    rasterio.env.set_gdal_config("GDAL_CACHEMAX", BLOCK_CACHE_BYTES)
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


class Raster:
    """One open raster. One thread at a time; `close` may be called from any thread.

    Attributes: ``driver`` (GDAL's name), ``where`` (for messages).
    """

    def __init__(
        self,
        open_dataset: Callable[[], Any],
        driver: str,
        where: str,
        check: Callable[[], None],
        ranged: RangedObject | None = None,
        probe: Callable[[], None] = lambda: None,
    ) -> None:
        """``check`` raises where the object is no longer the version that was asked for.

        ``probe`` raises where its bytes cannot be read: GDAL does not tell that from what it cannot decode.
        """
        self.driver = driver
        self.where = where
        self._check = check
        self._probe = probe
        self._ranged = ranged
        # rasterio keeps the open files of an opener in context variables: a dataset that is closed in another
        # context than it was opened in ends the process, so all calls on it run in this one
        self._context = contextvars.copy_context()
        opened: list[Any] = []
        try:
            self._run("header", lambda: opened.append(open_dataset()))
        except BaseException:
            for dataset in opened:
                _close(dataset, self._context)
            raise
        self._dataset = opened.pop()
        self._finalize = weakref.finalize(self, _close, self._dataset, self._context)

    def call(self, kind: str, action: Callable[[Any], T]) -> T:
        """``action(dataset)`` under our GDAL settings; what GDAL cannot do is a `SceneError` of ``kind``.

        ``scene_changed`` or ``not_found`` where the object was replaced or removed meanwhile. A fault of the
        storage is raised as itself.
        """
        return self._run(kind, lambda: action(self._dataset))

    def read(self, bands: Sequence[int], window: Window, out: Array) -> None:
        """Fill ``out`` (bands, height, width) with the window's pixels. Raises `SceneError` ``decode``."""
        where = as_rasterio(window)
        self.call("decode", lambda dataset: dataset.read(list(bands), window=where, out=out))

    def read_mask(self, window: Window) -> Array:
        """The raster's own mask: uint8 (height, width), 0 = no data. Raises `SceneError` ``decode``."""
        where = as_rasterio(window)
        out = block_zeros((window.height, window.width), np.uint8)
        self.call("decode", lambda dataset: dataset.read_masks(1, window=where, out=out))
        return out

    def close(self) -> None:
        """Close it; further calls do nothing."""
        self._finalize()

    def __enter__(self) -> Raster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, kind: str, action: Callable[[], T]) -> T:
        try:
            with gdal_environment():
                result = self._context.run(action)
        except GDAL_ERRORS as error:
            self._raise_fault()
            if _is_out_of_memory(error):
                raise MemoryError(f"{self.where}: GDAL is out of memory") from None
            self._probe()
            what = "its header cannot be read" if kind == "header" else "pixels cannot be decoded"
            raise SceneError(kind, f"{what} ({_reason(error)})", self.where, "Repair the file.") from None
        self._raise_fault()
        return result

    def _raise_fault(self) -> None:
        """Raise what GDAL hid: a fault of our range reads, or a version that is no longer there."""
        if self._ranged is not None and (fault := self._ranged.take_fault()) is not None:
            raise _as_scene_error(fault, self.where)
        self._check()


def as_rasterio(window: Window) -> Any:
    """The same window as rasterio's own."""
    return rasterio.windows.Window(window.col_off, window.row_off, window.width, window.height)


def open_raster(uri: str, version: Version | None) -> Raster:
    """Open the object under ``uri`` in the given version (None: in whatever version is there).

    Raises `SceneError`: ``not_found``, ``scene_changed``, ``not_raster``, ``header``; and `StorageError`.
    """
    storage, key = open_object(uri)
    path = storage.local_path(key)
    if path is None:
        return _open_remote(storage, key, uri, version)

    def check() -> None:
        _check_version(storage, key, uri, version)

    check()
    try:
        driver = _driver_or_raise(storage.read_range(key, 0, HEAD_BYTES), uri)
    except ObjectMissing as error:
        raise _as_scene_error(error, uri) from None
    name = str(path)
    if name.startswith("/vsi"):
        name = "/." + name  # the same file, but no virtual file system of GDAL's
    return Raster(
        lambda: rasterio.open(name, driver=driver), driver, uri, check, probe=lambda: _probe(storage, key)
    )


def open_raster_bytes(data: bytes, where: str) -> Raster:
    """Open an encoded image in memory. Raises `SceneError` as `open_raster`."""
    driver = _driver_or_raise(data[:HEAD_BYTES], where)
    return Raster(lambda: _open_memory(data, driver), driver, where, _nothing_to_check)


def read_object(uri: str, version: Version) -> bytes:
    """A whole object in the given version.

    Raises `SceneError` ``scene_changed``, ``not_found``; storage faults as themselves.
    """
    storage, key = open_object(uri)
    try:
        return storage.read_range(key, 0, version.size_bytes, version.etag)
    except (ObjectChanged, ObjectMissing) as error:
        raise _as_scene_error(error, uri) from None


@contextmanager
def faults_as(kind: str) -> Iterator[None]:
    """Give scene errors of the calls inside this ``kind``: the raster is a label or a mask, not the scene."""
    try:
        yield
    except SceneError as error:
        if error.kind in ("scene_changed", kind):
            raise
        raise SceneError(kind, error.what, error.where, error.fix) from None


def _open_remote(storage: Storage, key: str, uri: str, version: Version | None) -> Raster:
    try:
        if version is None:
            info = storage.stat(key)
            if info is None:
                raise ObjectMissing("no such object", uri)
            version = Version(info.size_bytes, info.etag)
        ranged = RangedObject(storage, key, version)
        head = ranged.read_at(0, HEAD_BYTES)
        driver = _driver_or_raise(head, uri)
        if driver != "GTiff" and version.size_bytes <= WHOLE_BYTES:
            data = storage.read_range(key, 0, version.size_bytes, version.etag)
            return Raster(lambda: _open_memory(data, driver), driver, uri, _nothing_to_check)
    except (ObjectMissing, ObjectChanged) as error:
        raise _as_scene_error(error, uri) from None
    return Raster(
        lambda: rasterio.open("scene", opener=ranged, driver=driver), driver, uri, _nothing_to_check, ranged
    )


def _open_memory(data: bytes, driver: str) -> Any:
    return rasterio.open(io.BytesIO(data), driver=driver)  # the dataset owns GDAL's memory file


def _driver_or_raise(head: bytes, where: str) -> str:
    driver = driver_of(head)
    if driver is None:
        what = "the file is empty" if not head else "it is no GeoTIFF, PNG, JPEG or WebP by its first bytes"
        raise SceneError("not_raster", what, where, "Convert it to GeoTIFF, or leave it out.")
    return driver


def _check_version(storage: Storage, key: str, uri: str, version: Version | None) -> None:
    info = storage.stat(key)
    if info is None:
        raise _gone(uri)
    if version is not None and Version(info.size_bytes, info.etag) != version:
        raise _changed(uri)


def _probe(storage: Storage, key: str) -> None:
    """Raise `StorageError` where a local file cannot be read: all of it, of a long one pieces all over it."""
    info = storage.stat(key)
    if info is None:
        return
    step_bytes = max(_PROBE_BYTES, info.size_bytes // _PROBES)
    with suppress(ObjectChanged, ObjectMissing):  # told by the next check
        for start in range(0, info.size_bytes, step_bytes):
            storage.read_range(key, start, min(_PROBE_BYTES, info.size_bytes - start), info.etag)


def _nothing_to_check() -> None:
    """Range reads ask for the version themselves; bytes in memory do not change."""


def _changed(where: str) -> SceneError:
    return SceneError(
        "scene_changed", "it is another version than the one that was planned", where, CHANGED_FIX
    )


def _gone(where: str) -> SceneError:
    return SceneError("not_found", "the file is gone", where, "Restore it, or take it out of the input.")


def _as_scene_error(fault: BaseException, where: str) -> BaseException:
    if isinstance(fault, ObjectChanged):
        return _changed(where)
    if isinstance(fault, ObjectMissing):
        return _gone(where)
    if isinstance(fault, EOFError):
        return SceneError("decode", "the file ends inside its pixels", where, "Repair the file.")
    return fault


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, CPLE_OutOfMemoryError) or isinstance(error.__cause__, CPLE_OutOfMemoryError)


def _reason(error: BaseException) -> str:
    """GDAL's words in one line, the same on every machine and in every attempt."""
    text = str(error.__cause__ or error)
    return " ".join(_VSI_NAME.sub("file", text).split())[:300]


def _close(dataset: Any, context: contextvars.Context) -> None:
    with gdal_environment():
        context.run(dataset.close)
