"""Small GeoTIFFs in memory: chips of pixel types and band counts that PNG does not hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import rasterio
from rasterio.io import MemoryFile

from segpipe.rasters.driver import gdal_environment

Array = np.ndarray[Any, Any]


def encode_tiff(pixels: Array, valid: Array | None = None) -> bytes:
    """Return (bands, height, width) as a deflated GeoTIFF without georeference; no band counts as alpha.

    ``valid``, bool (height, width), becomes its internal mask.
    """
    count, height, width = pixels.shape
    options = {
        "driver": "GTiff",
        "compress": "deflate",
        "predictor": 3 if pixels.dtype.kind == "f" else 2,
        "interleave": "pixel",
        "photometric": "minisblack",
        "alpha": "no",
    }
    with gdal_environment(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        with memory.open(
            height=height, width=width, count=count, dtype=str(pixels.dtype), **options
        ) as dataset:
            dataset.write(pixels)
            if valid is not None:
                dataset.write_mask(valid)
        return bytes(memory.read())
