"""Where chips lie in a scene: on a grid, or at places drawn from nothing but seed, scene and number."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from segpipe.config.card import IGNORE
from segpipe.config.prepare import ArchiveConfig
from segpipe.datasets.archive_grid import ReducedGrid
from segpipe.geometry.grid import Window

Array = np.ndarray[Any, Any]
Draw = tuple[float, float, float, float]

ATTEMPTS: Final = 16
"""Places that are tried for a random chip before it is left out."""

_CELLS_A_CHIP: Final = 8
_PIECE_PX: Final = 1 << 23
_PIECE_WIDTH_PX: Final = 1 << 14


def grid_windows(height: int, width: int, chip_px: int) -> Iterator[Window]:
    """Chips that cover every pixel; the last of an axis is moved inward, so that all lie inside."""
    for row_off, chip_height in _spans(height, chip_px):
        for col_off, chip_width in _spans(width, chip_px):
            yield Window(row_off, col_off, chip_height, chip_width)


def num_random(grid: ReducedGrid, config: ArchiveConfig) -> int:
    """How many random chips a scene gives: never more than it has places."""
    wanted = config.chips_per_scene
    if wanted is None:
        wanted = max(1, round(grid.height * grid.width * 1e-6 * (config.chips_per_mpx or 0.0)))
    places = (max(0, grid.height - config.chip_px) + 1) * (max(0, grid.width - config.chip_px) + 1)
    return min(wanted, places)


def draw(seed: int, scene_id: str, number: int, attempt: int) -> Draw:
    """Four numbers of [0, 1) by sha256: the same for ever, whatever else is in the archive."""
    digest = hashlib.sha256(f"chip/{seed}/{scene_id}/{number}/{attempt}".encode()).digest()
    words = np.frombuffer(digest, ">u8") >> np.uint64(11)
    first, second, third, fourth = (int(word) / 2**53 for word in words)
    return first, second, third, fourth


def uniform_window(grid: ReducedGrid, chip_px: int, drawn: Draw) -> Window:
    """A chip at one of all places with equal chance."""
    height, width = min(chip_px, grid.height), min(chip_px, grid.width)
    row_off = int(drawn[2] * (grid.height - height + 1))
    return Window(row_off, int(drawn[3] * (grid.width - width + 1)), height, width)


@dataclass(frozen=True, slots=True)
class ClassPlaces:
    """Where each class of a scene occurs, counted in squares of an eighth of a chip.

    So memory depends on the number of squares and not of pixels.
    """

    grid: ReducedGrid
    chip_px: int
    cell_px: int
    cells: tuple[Array, ...]
    """Per class that occurs: int64 numbers of the cells that hold it, row by row."""
    cumulated: tuple[Array, ...]
    """Per class: int64 running sum of its pixels in these cells."""

    def window(self, drawn: Draw) -> Window | None:
        """A chip round a pixel: a class by equal chance, a pixel of it, any chip that holds the pixel's cell.

        None where no pixel of the scene has a class.
        """
        if not self.cells:
            return None
        number = int(drawn[0] * len(self.cells))
        running = self.cumulated[number]
        at = int(np.searchsorted(running, int(drawn[1] * int(running[-1])), side="right"))
        row, col = divmod(int(self.cells[number][at]), -(-self.grid.width // self.cell_px))
        row_off, height = self._around(row, self.grid.height, drawn[2])
        col_off, width = self._around(col, self.grid.width, drawn[3])
        return Window(row_off, col_off, height, width)

    def _around(self, cell: int, num_px: int, part: float) -> tuple[int, int]:
        """(offset, size) of a chip that holds a cell of this axis and lies inside the scene."""
        size = min(self.chip_px, num_px)
        start, stop = cell * self.cell_px, min((cell + 1) * self.cell_px, num_px)
        first, last = max(0, stop - size), min(start, num_px - size)
        return first + int(part * (last - first + 1)), size


def find_classes(read_label: Callable[[Window], Array], grid: ReducedGrid, chip_px: int) -> ClassPlaces:
    """Count the classes of a whole scene cell by cell; ``read_label`` gives windows of the reduced grid."""
    cell_px = chip_px // _CELLS_A_CHIP
    found: dict[int, list[tuple[Array, Array]]] = {}
    across = -(-grid.width // cell_px)
    for piece in _pieces(grid, cell_px):
        counts = _cell_counts(read_label(piece), cell_px)
        first_row, first_col = piece.row_off // cell_px, piece.col_off // cell_px
        for value in np.flatnonzero(counts[:, :, :IGNORE].any(axis=(0, 1))).tolist():
            rows, cols = np.nonzero(counts[:, :, value])
            numbers = (rows + first_row) * across + cols + first_col
            found.setdefault(value, []).append((numbers, counts[rows, cols, value]))
    cells, cumulated = [], []
    for _, parts in sorted(found.items()):
        cells.append(np.concatenate([numbers for numbers, _ in parts]))
        cumulated.append(np.cumsum(np.concatenate([counts for _, counts in parts])))
    return ClassPlaces(grid, chip_px, cell_px, tuple(cells), tuple(cumulated))


def _pieces(grid: ReducedGrid, cell_px: int) -> Iterator[Window]:
    """Windows of whole cells of some million scene pixels; wide ones, as files may be stored in strips."""
    factor = grid.factor
    width = min(grid.width, cell_px * max(1, _PIECE_WIDTH_PX // (factor * cell_px)))
    height = cell_px * max(1, _PIECE_PX // (factor * factor * width * cell_px))
    for row_off in range(0, grid.height, height):
        for col_off in range(0, grid.width, width):
            piece_height, piece_width = min(height, grid.height - row_off), min(width, grid.width - col_off)
            yield Window(row_off, col_off, piece_height, piece_width)


def _cell_counts(label: Array, cell_px: int) -> Array:
    """int64 (cell rows, cell columns, 256): pixels of each value."""
    height, width = label.shape
    num_rows, num_cols = -(-height // cell_px), -(-width // cell_px)
    cols = (np.arange(width) // cell_px) * 256
    counts = np.empty((num_rows, num_cols, 256), np.int64)
    for row in range(num_rows):
        keys = label[row * cell_px : (row + 1) * cell_px].astype(np.int64) + cols
        counts[row] = np.bincount(keys.ravel(), minlength=num_cols * 256).reshape(num_cols, 256)
    return counts


def _spans(num_px: int, chip_px: int) -> list[tuple[int, int]]:
    """(offset, size) of the chips along an axis: evenly spread from the first pixel to the last."""
    if num_px <= chip_px:
        return [(0, num_px)]
    count = math.ceil(num_px / chip_px)
    return [(index * (num_px - chip_px) // (count - 1), chip_px) for index in range(count)]
