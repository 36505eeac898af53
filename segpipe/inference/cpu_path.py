"""The compute path of CPUs: one input buffer, compiled pixel loops around a folded channels_last network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from segpipe.config.card import ModelCard
from segpipe.inference import kernels
from segpipe.inference.blend import Canvas
from segpipe.inference.config import EngineConfig
from segpipe.inference.jobs import NO_DATA, BlockJob, TileRef
from segpipe.inference.memory import keep_freed_pages
from segpipe.inference.network import Forward, first_call, prepare_network

Array = np.ndarray[Any, Any]

_NO_MASK = np.empty((0, 0), np.uint8)


@dataclass(slots=True)
class _BlockState:
    classes: Array
    """uint8, the block on the reduced grid."""
    canvas: Canvas | None


class CpuPath:
    """Fill, forward and arg-max on CPU cores. See `ComputePath`."""

    def __init__(self, model: nn.Module, card: ModelCard, config: EngineConfig) -> None:
        self._model, self._card, self._config = model, card, config
        self._mean_N = np.asarray(card.mean, np.float32)
        self._std_N = np.asarray(card.std, np.float32)
        levels = np.arange(256, dtype=np.float32)
        self._table_NV = (levels[None] - self._mean_N[:, None]) / self._std_N[:, None]
        self._forward: Forward | None = None
        self._pool: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """See `ComputePath`. Sets torch's thread count for the calling thread."""
        config = self._config
        keep_freed_pages()
        torch.set_num_threads(config.threads)
        if config.threads > 1 and config.batch_size > 1:
            self._pool = ThreadPoolExecutor(config.threads - 1, thread_name_prefix="segpipe-tiles")
        shape = (config.batch_size, config.tile_px, config.tile_px, len(self._card.bands))
        self._input_BHWN = np.zeros(shape, np.float32)
        self._input_BNHW = torch.from_numpy(self._input_BHWN).permute(0, 3, 1, 2)
        self._forward = prepare_network(
            self._model, device="cpu", precision=config.precision, compile_network=config.compile
        )
        with torch.inference_mode():
            low = first_call(self._forward, self._input_BNHW, compile_network=config.compile)
        self._compile_kernels(_as_rows(low))

    def _compile_kernels(self, low_BHWC: Array) -> None:
        """Compile the loops that this model and its own pixel type need, so that no block waits for it."""
        side = self._config.tile_px
        scratch_HW = np.zeros((side, side), np.uint8)
        self._classes(low_BHWC[0], (0, 1, 0, 1), scratch_HW, 0, 0)
        pixels_NHW = np.zeros((len(self._card.bands), 2, 2), self._card.dtype)
        self._fill(self._input_BHWN[0], pixels_NHW, np.ones((2, 2), np.uint8), 0, 0, (2, 2), 1)
        kernels.any_valid(scratch_HW, 0, 1, 0, 1)
        kernels.mark_invalid(scratch_HW, scratch_HW, 0, 0, NO_DATA)

    def stage(self, job: BlockJob) -> None:
        """See `ComputePath`: the pixels are where they are needed."""

    def open(self, job: BlockJob) -> None:
        """See `ComputePath`."""
        classes_HW = np.zeros(job.reduced_shape, np.uint8)
        canvas = None
        if job.plan.blend == "linear":
            canvas = Canvas(job.plan, self._card.num_classes, classes_HW)
        job.state = _BlockState(classes_HW, canvas)

    def run(self, tiles: Sequence[TileRef]) -> None:
        """See `ComputePath`. The batch has its full size whatever the number of tiles."""
        assert self._forward is not None, "start() comes first"
        self._spread(self._load, enumerate(tiles))
        with torch.inference_mode():
            low_BHWC = _as_rows(self._forward(self._input_BNHW))
        crops = []
        for slot, tile in enumerate(tiles):
            canvas = tile.job.state.canvas
            if canvas is None:
                crops.append((low_BHWC[slot], tile))
            else:  # sums have a fixed order: one by one
                canvas.add(low_BHWC[slot], tile.row_index, tile.col)
        self._spread(self._keep, crops)

    def _spread(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Do ``work`` for all items, on this thread and the pool's."""
        todo = list(items)
        if self._pool is None or len(todo) < 2:
            _each(work, todo)
            return
        lanes = min(self._config.threads, len(todo))
        others = [self._pool.submit(_each, work, todo[lane::lanes]) for lane in range(1, lanes)]
        try:
            _each(work, todo[::lanes])
        finally:
            wait(others)
        for other in others:
            other.result()

    def _load(self, slot_tile: tuple[int, TileRef]) -> None:
        """Fill one slot of the input buffer."""
        slot, tile = slot_tile
        job = tile.job
        size = tile.row.size, tile.col.size
        out_HWN = self._input_BHWN[slot]
        self._fill(out_HWN, job.pixels, job.valid, tile.row.start, tile.col.start, size, job.plan.downsample)
        if min(size) < self._config.tile_px:
            kernels.pad_by_reflection(out_HWN, *size)

    def _fill(
        self,
        out_HWN: Array,
        pixels_NHW: Array,
        valid_HW: Array | None,
        row: int,
        col: int,
        size: tuple[int, int],
        factor: int,
    ) -> None:
        if factor > 1:
            valid = _NO_MASK if valid_HW is None else valid_HW
            kernels.fill_reduced(
                out_HWN, pixels_NHW, valid, row, col, size, factor, self._mean_N, self._std_N
            )
            return
        if pixels_NHW.dtype == np.uint8:
            kernels.fill_from_table(out_HWN, pixels_NHW, row, col, size, self._table_NV)
        else:
            kernels.fill_normalised(out_HWN, pixels_NHW, row, col, size, self._mean_N, self._std_N)
        if valid_HW is not None:
            kernels.blank_invalid(out_HWN, valid_HW, row, col, size)

    def _keep(self, low_tile: tuple[Array, TileRef]) -> None:
        """Write the classes of one tile's cell into its block."""
        low_HWC, tile = low_tile
        self._classes(low_HWC, tile.cell, tile.job.state.classes, tile.row.out_start, tile.col.out_start)

    def _classes(
        self, low_HWC: Array, cell: tuple[int, int, int, int], out_HW: Array, out_row: int, out_col: int
    ) -> None:
        side = self._config.tile_px
        if low_HWC.shape[:2] == (side, side):
            kernels.classes_from_full(low_HWC, cell, out_HW, out_row, out_col)
        else:
            kernels.classes_from_low(low_HWC, side, cell, out_HW, out_row, out_col)

    def finish(self, job: BlockJob) -> Callable[[], Array]:
        """See `ComputePath`."""
        state: _BlockState = job.state
        if state.canvas is not None:
            state.canvas.finish()
        plan, valid_HW = job.plan, job.valid

        def deliver() -> Array:
            mask_HW = state.classes
            if plan.downsample > 1:
                mask_HW = np.empty((plan.out_height, plan.out_width), np.uint8)
                kernels.spread_classes(state.classes, plan.downsample, mask_HW)
            if valid_HW is not None:
                kernels.mark_invalid(mask_HW, valid_HW, plan.row_off, plan.col_off, NO_DATA)
            return mask_HW

        return deliver

    def close(self) -> None:
        """See `ComputePath`."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._forward = None


def _each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    for item in items:
        work(item)


def _as_rows(low_BCHW: torch.Tensor) -> Array:
    """Return the logits as a C-contiguous float32 array (B, h, w, C); no copy if they are channels_last."""
    return low_BCHW.permute(0, 2, 3, 1).float().contiguous().numpy()
