"""Which split a sample belongs to: by globs of its id, else by a hash that no other sample enters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Final

from segpipe.config.prepare import SplitConfig
from segpipe.geometry.georef import Bbox
from segpipe.rasters.listing import glob_pattern

TRAIN: Final = "train"
_DEGREE_M: Final = 111_320.0


def split_of(sample_id: str, place: str, config: SplitConfig) -> str:
    """The split of a sample: the first glob that matches its id, else the hash of ``place``.

    The hash is sha256 over "seed/place"; splits take its range in the order of their names, so a further
    sample never moves another one. What no fraction takes is ``train``.
    """
    for name, globs in config.globs.items():
        if any(glob_pattern(glob, f"split.globs.{name}").fullmatch(sample_id) for glob in globs):
            return name
    digest = hashlib.sha256(f"{config.seed}/{place}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for name, fraction in sorted(config.fractions.items()):
        if name == TRAIN:
            continue
        if position < fraction:
            return name
        position -= fraction
    return TRAIN


def ground_cells(bbox: Bbox, grid_m: float) -> Iterator[tuple[int, int]]:
    """(row, column) of all ground cells that a box touches; west, south, east, north in degrees.

    ``east`` is above 180 where the box crosses the antimeridian, at which a row's last column ends. Rows are
    ``grid_m`` high along the meridian; within a row the columns have that width at its middle.
    """
    west, south, east, north = bbox
    step = grid_m / _DEGREE_M
    for row in range(math.floor(south / step), math.floor(north / step) + 1):
        middle = math.radians(min(89.9, max(-89.9, (row + 0.5) * step)))
        width = step / math.cos(middle)
        around = math.ceil(360.0 / width)
        for left, right in [(west, east)] if east <= 180.0 else [(west, 180.0), (-180.0, east - 360.0)]:
            first, last = math.floor((left + 180.0) / width), math.floor((right + 180.0) / width)
            for col in range(first, min(last, around - 1) + 1):
                yield row, col
