"""The grid that chips lie on: a scene reduced by a whole number, its pixels averaged, its labels outvoted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.config.card import IGNORE
from segpipe.geometry.grid import Window

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class ReducedGrid:
    """A scene of ``scene_height`` x ``scene_width`` pixels on the grid of ceil(n / factor)."""

    scene_height: int
    scene_width: int
    factor: int

    @property
    def height(self) -> int:
        return -(-self.scene_height // self.factor)

    @property
    def width(self) -> int:
        return -(-self.scene_width // self.factor)

    def to_scene(self, window: Window) -> Window:
        """The scene pixels of a window of the reduced grid; cut at the scene's far edges."""
        row_off, col_off = window.row_off * self.factor, window.col_off * self.factor
        return Window(
            row_off,
            col_off,
            min(window.height * self.factor, self.scene_height - row_off),
            min(window.width * self.factor, self.scene_width - col_off),
        )


def reduce_pixels(pixels: Array, valid: Array | None, factor: int) -> tuple[Array, Array | None]:
    """Mean of the valid pixels of each factor x factor, and where there is one.

    ``pixels`` (bands, height, width) -> the same type, (bands, ceil(height / factor), ceil(width / factor));
    whole numbers are rounded, halves up. A group without a valid pixel keeps its first one.
    """
    if factor == 1:
        return pixels, valid
    bands, height, width = pixels.shape
    shape = -(-height // factor), -(-width // factor)
    whole = pixels.dtype.kind in "iu"
    sums = np.zeros((bands, *shape), np.int64 if whole else np.float64)
    counts = np.zeros(shape, np.int64)
    for row in range(factor):
        for col in range(factor):
            part = pixels[:, row::factor, col::factor]
            inside = slice(part.shape[1]), slice(part.shape[2])
            if valid is None:
                sums[:, *inside] += part
                counts[inside] += 1
                continue
            good = valid[row::factor, col::factor]
            sums[:, *inside] += np.where(good, part, 0)
            counts[inside] += good
    divisor = np.maximum(counts, 1)
    means = (2 * sums + divisor) // (2 * divisor) if whole else sums / divisor
    any_valid = counts > 0
    reduced = np.where(any_valid, means, pixels[:, ::factor, ::factor]).astype(pixels.dtype)
    return reduced, None if valid is None else any_valid


def reduce_label(label: Array, factor: int) -> Array:
    """The commonest value but 255 of each factor x factor, the lowest of equals; 255 where there is no other.

    ``label`` uint8 (height, width) -> uint8 (ceil(height / factor), ceil(width / factor)).
    """
    if factor == 1:
        return label
    height, width = label.shape
    shape = -(-height // factor), -(-width // factor)
    reduced = np.full(shape, IGNORE, np.uint8)
    most = np.zeros(shape, np.uint16)
    for value in np.flatnonzero(np.bincount(label.ravel(), minlength=256)[:IGNORE]):
        is_value = label == value
        votes = np.zeros(shape, np.uint16)
        for row in range(factor):
            for col in range(factor):
                part = is_value[row::factor, col::factor]
                votes[: part.shape[0], : part.shape[1]] += part
        wins = votes > most
        reduced[wins] = value
        most[wins] = votes[wins]
    return reduced
