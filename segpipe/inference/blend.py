"""Linear blend: all tiles that cover a pixel count, less towards their edges. Reduced pixels throughout."""

from __future__ import annotations

from typing import Any

import numpy as np

from segpipe.geometry.grid import TilePlan, TileSpan
from segpipe.inference import kernels
from segpipe.pages import block_zeros

Array = np.ndarray[Any, Any]


def ramp(span: TileSpan, tile_px: int) -> Array:
    """Return one axis' weights float32 (cell,) of a tile's cell: distance to the tile's edge / tile_px.

    Positive everywhere. Where the tile ends at the scene's border nothing else covers its pixels, so there
    the ramp does not fade. Across the overlap of two tiles the two weights add up to a constant.
    """
    place = np.arange(span.cell_start, span.cell_stop, dtype=np.float32) + np.float32(0.5)
    weight = np.full(place.shape, tile_px, np.float32)
    if not span.first:
        weight = np.minimum(weight, place)
    if not span.last:
        weight = np.minimum(weight, np.float32(span.size) - place)
    return (weight / np.float32(tile_px)).astype(np.float32)


class Canvas:
    """Weighted logits of the tile rows that are not complete yet, and the classes of those that are.

    Tiles must be added row by row, in plan order: then the sums run in an order that follows from the scene
    alone, and a pixel's class does not depend on how the scene is cut into blocks. Memory is one tile row.
    """

    def __init__(self, plan: TilePlan, num_classes: int, classes_HW: Array) -> None:
        height = max(span.cell_stop - span.cell_start for span in plan.rows)
        self._plan = plan
        self._classes_HW = classes_HW
        self._sums_HWC = block_zeros((height, classes_HW.shape[1], num_classes), np.float32)
        self._top = 0
        self._row_ramps = [ramp(span, plan.tile_px) for span in plan.rows]
        self._col_ramps = {span.start: ramp(span, plan.tile_px) for span in plan.cols}

    def add(self, low_HWC: Array, row_index: int, col: TileSpan) -> None:
        """Add one tile's logits, of full or of lower resolution."""
        row = self._plan.rows[row_index]
        self._advance(row.out_start)
        kernels.add_weighted(
            low_HWC,
            self._plan.tile_px,
            (row.cell_start, row.cell_stop, col.cell_start, col.cell_stop),
            self._row_ramps[row_index],
            self._col_ramps[col.start],
            self._sums_HWC,
            row.out_start - self._top,
            col.out_start,
        )

    def finish(self) -> None:
        """Write the classes of all rows that are left."""
        self._advance(self._classes_HW.shape[0])

    def _advance(self, top: int) -> None:
        """Write the classes of the rows above ``top``, which no later tile touches, and move up."""
        height, width = self._sums_HWC.shape[:2]
        while self._top < top:
            rows = min(height, top - self._top)
            kernels.classes_from_full(self._sums_HWC, (0, rows, 0, width), self._classes_HW, self._top, 0)
            self._sums_HWC[: height - rows] = self._sums_HWC[rows:].copy()
            self._sums_HWC[height - rows :] = 0.0
            self._top += rows
