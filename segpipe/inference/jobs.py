"""Blocks on their way through the engine, and what a compute path must do for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from segpipe.geometry.grid import TilePlan, TileSpan
from segpipe.inference import kernels
from segpipe.inference.result import BlockResult

Array = np.ndarray[Any, Any]


@dataclass(slots=True, eq=False)
class BlockJob:
    """One submitted block. Counts and flags belong to the engine, which changes them under its lock."""

    pixels: Array
    """(bands, h, w) of the read window, C-contiguous, scene pixels."""
    valid: Array | None
    """uint8 (h, w), 0 = no data; None = all pixels are valid."""
    plan: TilePlan
    future: Future[BlockResult] = field(default_factory=Future)
    state: Any = None
    """What the compute path keeps for this block."""
    pending: int = 0
    """Tiles taken into a batch that has not ended yet."""
    exhausted: bool = False
    """No more tiles will be taken."""
    failed: bool = False
    tiles_computed: int = 0
    tiles_empty: int = 0

    @property
    def reduced_shape(self) -> tuple[int, int]:
        """Height and width of the block on the reduced grid."""
        factor = self.plan.downsample
        return -(-self.plan.out_height // factor), -(-self.plan.out_width // factor)

    def tiles(self) -> Iterator[TileRef]:
        """Iterate over the block's tiles, row by row."""
        for row_index, row in enumerate(self.plan.rows):
            for col in self.plan.cols:
                yield TileRef(self, row, col, row_index)


@dataclass(frozen=True, slots=True)
class TileRef:
    """One tile of one block."""

    job: BlockJob
    row: TileSpan
    col: TileSpan
    row_index: int

    @property
    def cell(self) -> tuple[int, int, int, int]:
        """Top, bottom, left, right of the kept cell in tile coordinates (reduced pixels)."""
        return self.row.cell_start, self.row.cell_stop, self.col.cell_start, self.col.cell_stop

    def is_empty(self) -> bool:
        """Return whether the kept cell has no valid pixel."""
        valid = self.job.valid
        if valid is None:
            return False
        factor = self.job.plan.downsample
        top, bottom, left, right = self.cell
        return not kernels.any_valid(
            valid,
            (self.row.start + top) * factor,
            (self.row.start + bottom) * factor,
            (self.col.start + left) * factor,
            (self.col.start + right) * factor,
        )


Done = Callable[[Exception | None], None]
Delivery = Callable[[], Array]
"""Waits, outside the engine thread, until a block's mask is whole, and returns it."""


class ComputePath(Protocol):
    """How tiles become classes on one kind of device.

    The engine thread calls all but `stage` and `finish`.
    """

    def start(self) -> None:
        """Make the network ready and compile what is needed. Called once, before anything but `stage`."""

    def stage(self, job: BlockJob) -> None:
        """Begin to move a block to the device; called by the thread that submits."""

    def open(self, job: BlockJob) -> None:
        """Allocate the block's output. Called once, before its first tile."""

    def run(self, tiles: Sequence[TileRef], done: Done) -> None:
        """Compute at most one batch of tiles, of one block or several, and keep their classes.

        Calls ``done`` once, with the error if there was one, from any thread and maybe before it returns. It
        returns while the batch is computed, and blocks while enough batches are on their way.
        """

    def finish(self, job: BlockJob) -> Delivery:
        """Return what waits for the mask; called once all tiles of the block are done, by any thread."""

    def close(self) -> None:
        """Wait for the batches on their way, then release threads and memory."""
