"""Writes class masks as Cloud-Optimized GeoTIFFs, by windows, in a scratch folder, with flat memory.

A tiled GeoTIFF is filled first, then GDAL's COG driver lays it out with overviews by mode, and the result is
read back and compared. The same masks give the same bytes for one build of GDAL. Category names have no place
in a TIFF: they are band tags there, and GDAL and QGIS read them from the ``.aux.xml`` beside it.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.shutil
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from segpipe.config.card import IGNORE, ClassInfo
from segpipe.errors import StorageError, StorageFull
from segpipe.geometry.georef import Transform
from segpipe.geometry.grid import Window
from segpipe.rasters.driver import as_rasterio, gdal_environment

TILE_PX: Final = 512
"""Side of the tiles in the COG."""

_SPARE_BYTES: Final = 8 << 20  # a folder with less free space than this counts as full
_WRITES_PER_PX: Final = 2.7  # worst case: the masks twice, overviews another third of each

_COG_OPTIONS: Final = {
    "driver": "COG",
    "compress": "DEFLATE",
    "blocksize": str(TILE_PX),
    "overview_resampling": "MODE",
    "overview_compress": "DEFLATE",
    "bigtiff": "IF_SAFER",
    "num_threads": "1",  # scenes run side by side
}


@dataclass(frozen=True, slots=True)
class CogSpec:
    """What a mask's COG says besides its pixels. Without transform it has no georeference."""

    height: int
    width: int
    classes: Sequence[ClassInfo]
    crs: str | None
    transform: Transform | None
    tags: Mapping[str, str]


def scratch_bytes(num_px: int, png_bytes: int) -> int:
    """Return the scratch space that ``write_cog`` may take for a mask whose PNGs take ``png_bytes``."""
    return int(min(_WRITES_PER_PX * num_px, 4 * png_bytes)) + _SPARE_BYTES


def write_cog(spec: CogSpec, blocks: Iterable[tuple[Window, Any]], folder: Path, name: str) -> Path:
    """Write the COG ``name`` into the local ``folder`` and return its path.

    ``blocks`` are (window, uint8 (height, width) mask); together they cover the scene. Raises StorageFull,
    naming the folder, and StorageError where the file that was written does not hold what it should.
    """
    draft, path = folder / f"{name}.draft.tif", folder / name
    try:
        with gdal_environment():
            sums = _write_draft(spec, blocks, draft)
            rasterio.shutil.copy(str(draft), str(path), **_COG_OPTIONS)
            draft.unlink()
            _compare(path, sums)
    except (RasterioError, CPLE_BaseError, OSError) as error:
        if isinstance(error, StorageError):
            raise
        path.unlink(missing_ok=True)
        raise _explained(error, folder) from error
    finally:
        draft.unlink(missing_ok=True)
        (folder / f"{name}.ovr.tmp").unlink(missing_ok=True)
    return path


def category_names(classes: Sequence[ClassInfo]) -> bytes:
    """Return the ``.aux.xml`` from which GDAL and QGIS take the names of the classes."""
    names = "".join(f"      <Category>{escape(info.name)}</Category>\n" for info in classes)
    return (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{names}    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    ).encode()


def _write_draft(spec: CogSpec, blocks: Iterable[tuple[Window, Any]], path: Path) -> list[tuple[Window, int]]:
    """Fill a tiled GeoTIFF and return the checksum of each block."""
    place: dict[str, Any] = {}
    if spec.transform is not None:
        place["transform"] = Affine(*spec.transform)
        if spec.crs is not None:
            place["crs"] = CRS.from_user_input(spec.crs)
    sums = []
    with rasterio.open(
        str(path),
        "w",
        driver="GTiff",
        height=spec.height,
        width=spec.width,
        count=1,
        dtype="uint8",
        nodata=IGNORE,
        tiled=True,
        blockxsize=TILE_PX,
        blockysize=TILE_PX,
        compress="DEFLATE",
        zlevel=1,
        bigtiff="IF_SAFER",
        **place,
    ) as dataset:
        colors: dict[int, tuple[int, ...]] = {i: (*info.color, 255) for i, info in enumerate(spec.classes)}
        dataset.write_colormap(1, colors | {IGNORE: (0, 0, 0, 0)})
        dataset.update_tags(**spec.tags)
        dataset.update_tags(1, **{f"CLASS_{i}": info.name for i, info in enumerate(spec.classes)})
        dataset.set_band_description(1, "class")
        for window, mask in blocks:
            dataset.write(mask, 1, window=as_rasterio(window))
            sums.append((window, _checksum(mask)))
    return sums


def _compare(path: Path, sums: Sequence[tuple[Window, int]]) -> None:
    """Read every block back: a write that failed late can leave tiles empty without a word."""
    with rasterio.open(str(path), driver="GTiff") as dataset:
        for window, wanted in sums:
            mask = dataset.read(1, window=as_rasterio(window))
            if _checksum(mask) != wanted:
                path.unlink()
                what = f"the GeoTIFF that was written holds other pixels at {window}"
                raise StorageError(what, str(path), "Run the same command again, with another TMPDIR.")


def _checksum(mask: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(mask).data)


def _explained(error: BaseException, folder: Path) -> StorageError:
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    if shutil.disk_usage(folder).free < _SPARE_BYTES or "No space left" in reason:
        return full(folder, "no space left")
    what = f"the GeoTIFF cannot be written ({reason})"
    return StorageError(what, str(folder), "Check that folder, or set TMPDIR to another.")


def full(folder: Path, what: str) -> StorageFull:
    """Return the error that says how to get more scratch space."""
    return StorageFull(what, str(folder), "Free space, or set TMPDIR to a folder with more of it.")
