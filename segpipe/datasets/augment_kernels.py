"""The compiled loops of augmentation."""

from __future__ import annotations

from typing import Any

import numpy as np

from segpipe.compiled import compiled
from segpipe.config.card import IGNORE

Array = np.ndarray[Any, Any]


@compiled
def mirrored(index: int, n: int) -> int:
    """An index into n pixels, for an index beside them: the edges mirror."""
    period = 2 * n
    index = index % period
    return index if index < n else period - 1 - index


@compiled
def warp(pixels: Array, label: Array, matrix: Array, crop: int) -> tuple[Array, Array]:
    """Sample ``pixels`` (bands, h, w) and ``label`` (h, w) where ``matrix`` (2, 3) takes a crop's pixels.

    Returns float32 (bands, crop, crop), bilinear, and uint8 (crop, crop), nearest, outside of it IGNORE.
    """
    bands, height, width = pixels.shape
    image = np.empty((bands, crop, crop), np.float32)
    target = np.empty((crop, crop), np.uint8)
    for row in range(crop):
        for col in range(crop):
            y, x = row + 0.5 - crop / 2, col + 0.5 - crop / 2
            r = matrix[0, 0] * y + matrix[0, 1] * x + matrix[0, 2]
            c = matrix[1, 0] * y + matrix[1, 1] * x + matrix[1, 2]
            near_r, near_c = int(np.floor(r)), int(np.floor(c))
            inside = 0 <= near_r < height and 0 <= near_c < width
            target[row, col] = label[near_r, near_c] if inside else IGNORE
            top, left = int(np.floor(r - 0.5)), int(np.floor(c - 0.5))
            down, right = np.float32(r - 0.5 - top), np.float32(c - 0.5 - left)
            if 0 <= top < height - 1 and 0 <= left < width - 1:
                r0, r1, c0, c1 = top, top + 1, left, left + 1
            else:
                r0, r1 = mirrored(top, height), mirrored(top + 1, height)
                c0, c1 = mirrored(left, width), mirrored(left + 1, width)
            for band in range(bands):
                a, b = np.float32(pixels[band, r0, c0]), np.float32(pixels[band, r0, c1])
                d, e = np.float32(pixels[band, r1, c0]), np.float32(pixels[band, r1, c1])
                upper, lower = a + (b - a) * right, d + (e - d) * right
                image[band, row, col] = upper + (lower - upper) * down
    return image, target


@compiled
def tint(image: Array, matrix: Array, gamma: float) -> Array:
    """``matrix`` (3, 3) by each pixel of float32 ``image`` (3, h, w), cut to 0 .. 1, to the power gamma."""
    _, height, width = image.shape
    out = np.empty_like(image)
    low, high = np.float32(0), np.float32(1)
    for row in range(height):
        for col in range(width):
            a, b, c = image[0, row, col], image[1, row, col], image[2, row, col]
            for band in range(3):
                value = matrix[band, 0] * a + matrix[band, 1] * b + matrix[band, 2] * c
                out[band, row, col] = min(max(value, low), high) ** gamma
    return out
