"""Indexed images: one band of numbers, each of which stands for a colour."""

from __future__ import annotations

from typing import Any

import numpy as np
from rasterio.enums import ColorInterp

Array = np.ndarray[Any, Any]


def has_palette(dataset: Any) -> bool:
    """The only band is an index of 8 or 16 bits into a colour map."""
    return bool(
        dataset.count == 1
        and dataset.colorinterp[0] == ColorInterp.palette
        and dataset.dtypes[0] in ("uint8", "uint16")
    )


def palette_of(dataset: Any) -> Array:
    """Red, green, blue, alpha of each index: uint8 (4, 256), or (4, 65536) for indices of 16 bits.

    Past the end of the colour map black and no data.
    """
    num_indices = 1 << 8 * np.dtype(dataset.dtypes[0]).itemsize
    colours = np.zeros((4, num_indices), np.uint8)
    for index, colour in dataset.colormap(1).items():
        if 0 <= index < num_indices:
            colours[:, index] = colour
    return colours
