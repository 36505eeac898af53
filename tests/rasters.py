"""Writes odd rasters for tests, and describes files as scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.io import MemoryFile

from segpipe.config.model import InputConfig
from segpipe.geometry.grid import Window
from segpipe.rasters.header import inspect_scene
from segpipe.rasters.reader import open_scene
from segpipe.rasters.scene import SceneHeader, SceneSource, Version
from segpipe.storage import open_object

Array = np.ndarray[Any, Any]

AUTO = InputConfig()
UTM33 = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.3, 0.0, 500000.0, 0.0, -0.3, 5000000.0)}


def noise(bands: int, height: int, width: int, dtype: str = "uint8", seed: int = 0) -> Array:
    """Random pixels from 1 to 250, so that neither 0 nor 255 occurs by chance."""
    return np.random.default_rng(seed).integers(1, 251, (bands, height, width)).astype(dtype)


def write_tiff(path: Path, pixels: Array, *, mask: Array | None = None, **profile: Any) -> Path:
    """A GeoTIFF of ``pixels`` (bands, height, width); ``mask`` becomes its internal mask."""
    settings: dict[str, Any] = {"driver": "GTiff", "interleave": "pixel", **profile}
    if pixels.shape[0] > 3:
        settings.setdefault("photometric", "minisblack")  # else GDAL writes band 4 of uint8 as alpha
    shape = {"count": pixels.shape[0], "height": pixels.shape[1], "width": pixels.shape[2]}
    alpha = settings.pop("alpha", None)
    colormap = settings.pop("colormap", None)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", dtype=pixels.dtype, **shape, **settings) as dataset,
    ):
        if alpha is not None:
            meanings = list(dataset.colorinterp)
            meanings[alpha - 1] = rasterio.enums.ColorInterp.alpha
            dataset.colorinterp = meanings
        if colormap is not None:
            dataset.write_colormap(1, colormap)
        dataset.write(pixels)
        if mask is not None:
            dataset.write_mask(mask)
    return path


def tiff_bytes(pixels: Array, **profile: Any) -> bytes:
    """An encoded GeoTIFF, for stores that are no folder."""
    shape = {"count": pixels.shape[0], "height": pixels.shape[1], "width": pixels.shape[2]}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", dtype=pixels.dtype, **shape, **profile) as dataset:
            dataset.write(pixels)
        return bytes(memory.getbuffer())


def write_sparse_tiff(path: Path, height: int, width: int, tile_px: int) -> Path:
    """A GeoTIFF of any size whose tiles are all left out, so that the file is small."""
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=1, dtype="uint8", tiled=True,
        blockxsize=tile_px, blockysize=tile_px, sparse_ok=True, compress="deflate",
    ):  # fmt: skip
        pass
    return path


def version_of(uri: str) -> Version:
    storage, key = open_object(uri)
    info = storage.stat(key)
    assert info is not None
    return Version(info.size_bytes, info.etag)


def source_of(uri: str | Path, **fields: Any) -> SceneSource:
    """The object as a scene in its present version; ``label`` and ``valid`` name further objects."""
    for name in ("label", "valid"):
        if (other := fields.pop(name, None)) is not None:
            fields |= {f"{name}_uri": str(other), f"{name}_version": version_of(str(other))}
    return SceneSource("scene", str(uri), version_of(str(uri)), **fields)


def whole(header: SceneHeader) -> Window:
    return Window(0, 0, header.height, header.width)


def read_scene(
    uri: str | Path, num_bands: int, config: InputConfig = AUTO, **fields: Any
) -> tuple[SceneHeader, Array, Array | None]:
    """Inspect a scene and read it whole: header, pixels, validity."""
    source = source_of(uri, **fields)
    header = inspect_scene(source, num_bands, config)
    with open_scene(source, header, config) as reader:
        return header, *reader.read(whole(header))
