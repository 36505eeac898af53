"""Small GeoTIFFs in memory: chips of pixel types and band counts that PNG does not hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from rasterio.io import MemoryFile

from segpipe.rasters.driver import gdal_environment

Array = np.ndarray[Any, Any]


def encode_tiff(pixels: Array) -> bytes:
    """Return (bands, height, width) as a deflated GeoTIFF without georeference; no band counts as alpha."""
    count, height, width = pixels.shape
    options = {
        "driver": "GTiff",
        "compress": "deflate",
        "predictor": 3 if pixels.dtype.kind == "f" else 2,
        "interleave": "pixel",
        "photometric": "minisblack",
        "alpha": "no",
    }
    with gdal_environment(), MemoryFile() as memory:
        with memory.open(
            height=height, width=width, count=count, dtype=str(pixels.dtype), **options
        ) as dataset:
            dataset.write(pixels)
        return bytes(memory.read())
