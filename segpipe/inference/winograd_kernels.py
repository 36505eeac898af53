"""Compiled transforms of Winograd's convolution F(2x2, 3x3); what it is: `segpipe.inference.winograd`.

Dimensions: C channels, H, W pixels, P patches of 4x4 input pixels (2x2 output pixels) in a block, row by row.
Loops run over contiguous floats, one array written in each, so that the compiler makes them vector code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from segpipe.compiled import compiled

Array = np.ndarray[Any, Any]


@compiled
def _add(a: Array, b: Array, out: Array) -> None:
    for i in range(out.shape[0]):
        out[i] = a[i] + b[i]


@compiled
def _subtract(a: Array, b: Array, out: Array) -> None:
    for i in range(out.shape[0]):
        out[i] = a[i] - b[i]


@compiled
def _transform_columns(x_HWC: Array, y: int, left: int, first: int, out_4TC: Array) -> None:
    """Transform one row of pixels along x for T patches from ``left`` on; beyond the image all is 0.

    The values go to the channels from ``first`` on.
    """
    height, width, channels = x_HWC.shape
    patches, last = out_4TC.shape[1], first + channels
    if y < 0 or y >= height:
        out_4TC[:, :, first:last] = np.float32(0.0)
        return
    row = x_HWC[y]
    for t in range(patches):
        x = 2 * (left + t) - 1
        v0, v1 = out_4TC[0, t, first:last], out_4TC[1, t, first:last]
        v2, v3 = out_4TC[2, t, first:last], out_4TC[3, t, first:last]
        if x >= 0 and x + 3 < width:
            _subtract(row[x], row[x + 2], v0)
            _add(row[x + 1], row[x + 2], v1)
            _subtract(row[x + 2], row[x + 1], v2)
            _subtract(row[x + 1], row[x + 3], v3)
            continue
        for c in range(channels):
            d1 = row[x + 1, c]
            d0 = row[x, c] if x >= 0 else np.float32(0.0)
            d2 = row[x + 2, c] if x + 2 < width else np.float32(0.0)
            d3 = row[x + 3, c] if x + 3 < width else np.float32(0.0)
            v0[c] = d0 - d2
            v1[c] = d1 + d2
            v2[c] = d2 - d1
            v3[c] = d1 - d3


@compiled
def patches_from_pixels(
    parts: tuple[Array, ...], top: int, left: int, ring_44TC: Array, out_16PC: Array
) -> None:
    """Write the transformed patches of one block, whose first one is patch (top, left).

    ``parts`` are arrays (H, W, their channels) of float32 that make up the C channels one after the other.
    ``ring`` is scratch: four rows of pixels, transformed along x, for the T patches of the block's width.
    """
    patches, channels = ring_44TC.shape[2], ring_44TC.shape[3]
    size = patches * channels
    for r in range(out_16PC.shape[1] // patches):
        y = 2 * (top + r) - 1
        for k in range(0 if r == 0 else 2, 4):  # two rows are shared with the patches above
            first = 0
            for part in parts:
                _transform_columns(part, y + k, left, first, ring_44TC[(y + k) & 3])
                first += part.shape[2]
        for k in range(4):
            d0, d1 = ring_44TC[y & 3, k].reshape(size), ring_44TC[(y + 1) & 3, k].reshape(size)
            d2, d3 = ring_44TC[(y + 2) & 3, k].reshape(size), ring_44TC[(y + 3) & 3, k].reshape(size)
            begin, end = r * patches, (r + 1) * patches
            _subtract(d0, d2, out_16PC[k, begin:end].reshape(size))
            _add(d1, d2, out_16PC[4 + k, begin:end].reshape(size))
            _subtract(d2, d1, out_16PC[8 + k, begin:end].reshape(size))
            _subtract(d1, d3, out_16PC[12 + k, begin:end].reshape(size))


@compiled
def _rows_from_products(product_16PC: Array, begin: int, end: int, rows_24S: Array) -> None:
    """Transform back along y: two rows of pixels, still transformed along x. S = patches x channels."""
    size = rows_24S.shape[2]
    for k in range(4):
        m0, m1 = product_16PC[k, begin:end].reshape(size), product_16PC[4 + k, begin:end].reshape(size)
        m2, m3 = product_16PC[8 + k, begin:end].reshape(size), product_16PC[12 + k, begin:end].reshape(size)
        upper, lower = rows_24S[0, k], rows_24S[1, k]
        for i in range(size):
            upper[i] = m0[i] + m1[i] + m2[i]
        for i in range(size):
            lower[i] = m1[i] - m2[i] - m3[i]


@compiled
def pixels_from_products(
    product_16PC: Array,
    bias_C: Array,
    floor: float,
    top: int,
    left: int,
    rows_24S: Array,
    out_HWC: Array,
) -> None:
    """Write the 2x2 pixels of every patch: transformed back, plus bias, at least ``floor``.

    ``rows`` is scratch. Pixels beyond the image are left out.
    """
    height, width, channels = out_HWC.shape
    patches = rows_24S.shape[2] // channels
    lowest = np.float32(floor)
    for r in range(product_16PC.shape[1] // patches):
        _rows_from_products(product_16PC, r * patches, (r + 1) * patches, rows_24S)
        for j in range(2):
            y = 2 * (top + r) + j
            if y >= height:
                continue
            for t in range(patches):
                begin, end = t * channels, (t + 1) * channels
                z0, z1 = rows_24S[j, 0, begin:end], rows_24S[j, 1, begin:end]
                z2, z3 = rows_24S[j, 2, begin:end], rows_24S[j, 3, begin:end]
                pixel = out_HWC[y, 2 * (left + t)]
                for c in range(channels):
                    value = z0[c] + z1[c] + z2[c] + bias_C[c]
                    pixel[c] = lowest if value < lowest else value
                if 2 * (left + t) + 1 == width:
                    continue
                pixel = out_HWC[y, 2 * (left + t) + 1]
                for c in range(channels):
                    value = z1[c] - z2[c] - z3[c] + bias_C[c]
                    pixel[c] = lowest if value < lowest else value
