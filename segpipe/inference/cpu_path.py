"""The compute path of CPUs: one input buffer, compiled pixel loops around a folded channels_last network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from segpipe.config.card import IGNORE, ModelCard
from segpipe.inference import kernels
from segpipe.inference.blend import Canvas
from segpipe.inference.config import EngineConfig
from segpipe.inference.jobs import BlockJob, Done, TileRef
from segpipe.inference.network import Forward, first_call, prepare_network
from segpipe.pages import block_zeros

Array = np.ndarray[Any, Any]

_NO_MASK = np.empty((0, 0), np.uint8)

_PASS_PX: Final = 2**18
"""Most pixels of one forward pass: the activations of larger ones fall out of the caches."""

_FIRST_PX: Final = 64
"""Side of what is computed once before any block."""


@dataclass(slots=True)
class _BlockState:
    classes: Array
    """uint8, the block on the reduced grid."""
    canvas: Canvas | None
    """Linear blend only, as all below."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    taken: int = 0
    """Tiles that have been given a place in the order of sums."""
    added: int = 0
    waiting: dict[int, tuple[Array, TileRef]] = field(default_factory=dict)
    """Logits whose turn has not come, by place."""


class CpuPath:
    """Fill, forward and arg-max on CPU cores. See `ComputePath`.

    Every compute thread runs whole batches by itself, each operation on one core: no thread waits for
    another within a network, activations fit the caches better, and a tile's classes do not depend on the
    number of threads. For the caches' sake a batch is computed in passes of as many tiles as make up one of
    512 px. A compiled network runs one whole batch at a time on all threads instead, since its kernels hold
    the interpreter's lock.
    """

    def __init__(self, model: nn.Module, card: ModelCard, config: EngineConfig) -> None:
        self._model, self._card, self._config = model, card, config
        self._mean_N = np.asarray(card.mean, np.float32)
        self._std_N = np.asarray(card.std, np.float32)
        levels = np.arange(256, dtype=np.float32)
        self._table_NV = (levels[None] - self._mean_N[:, None]) / self._std_N[:, None]
        self._lanes, self._inner = (1, config.threads) if config.compile else (config.threads, 1)
        fitting = config.batch_size if config.compile else max(1, _PASS_PX // config.tile_px**2)
        self._pass_tiles = min(config.batch_size, fitting)
        self._room = threading.Semaphore(self._lanes + 1)
        self._inputs: SimpleQueue[Array] = SimpleQueue()
        self._forward: Forward | None = None
        self._pool: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """See `ComputePath`."""
        self._pool = ThreadPoolExecutor(
            self._lanes, "segpipe-compute", initializer=torch.set_num_threads, initargs=(self._inner,)
        )
        self._pool.submit(self._prepare).result()

    def _prepare(self) -> None:
        """Make network, buffers and kernels ready, so that no block waits for them."""
        config, side, bands = self._config, self._config.tile_px, len(self._card.bands)
        for _ in range(self._lanes):
            self._inputs.put(np.zeros((self._pass_tiles, side, side, bands), np.float32))
        self._forward = prepare_network(
            self._model, device="cpu", precision=config.precision, compile_network=config.compile
        )
        # What is compiled is compiled for one shape; else a corner of a tile loads all that a tile needs.
        side = side if config.compile else min(side, _FIRST_PX)
        first_BHWN = np.zeros((self._pass_tiles if config.compile else 1, side, side, bands), np.float32)
        with ThreadPoolExecutor(1, "segpipe-kernels") as beside:
            loaded = beside.submit(self._load_kernels)
            with torch.inference_mode():
                low = first_call(self._forward, _as_images(first_BHWN), compile_network=config.compile)
            loaded.result()
        _write_classes(_as_rows(low)[0], side, (0, 1, 0, 1), np.zeros((side, side), np.uint8), 0, 0)

    def _load_kernels(self) -> None:
        """Load the compiled pixel loops, which takes about as long as the first forward pass."""
        bands = len(self._card.bands)
        scratch_HW = np.zeros((2, 2), np.uint8)
        image_HWN, pixels_NHW = np.zeros((2, 2, bands), np.float32), np.zeros((bands, 2, 2), self._card.dtype)
        self._fill(image_HWN, pixels_NHW, np.ones((2, 2), np.uint8), 0, 0, (2, 2), 1)
        kernels.any_valid(scratch_HW, 0, 1, 0, 1)
        kernels.mark_invalid(scratch_HW, scratch_HW, 0, 0, IGNORE)

    def stage(self, job: BlockJob) -> None:
        """See `ComputePath`: the pixels are where they are needed."""

    def open(self, job: BlockJob) -> None:
        """See `ComputePath`."""
        classes_HW = block_zeros(job.reduced_shape, np.uint8)
        canvas = None
        if job.plan.blend == "linear":
            canvas = Canvas(job.plan, self._card.num_classes, classes_HW)
        job.state = _BlockState(classes_HW, canvas)

    def run(self, tiles: Sequence[TileRef], done: Done) -> None:
        """See `ComputePath`. A forward pass has its full size whatever the number of tiles."""
        assert self._pool is not None, "start() comes first"
        self._room.acquire()
        places = []
        for tile in tiles:
            state: _BlockState = tile.job.state
            places.append(state.taken)
            state.taken += 1
        self._pool.submit(self._compute, tiles, places, done)

    def _compute(self, tiles: Sequence[TileRef], places: Sequence[int], done: Done) -> None:
        assert self._forward is not None
        input_BHWN = self._inputs.get()
        error: Exception | None = None
        try:
            for begin in range(0, len(tiles), self._pass_tiles):
                some = tiles[begin : begin + self._pass_tiles]
                for slot, tile in enumerate(some):
                    self._load(input_BHWN[slot], tile)
                with torch.inference_mode():
                    low_BHWC = _as_rows(self._forward(_as_images(input_BHWN)))
                for low_HWC, tile, place in zip(low_BHWC, some, places[begin:], strict=False):
                    self._keep(low_HWC, tile, place)
        except Exception as fault:
            error = fault
        finally:
            self._inputs.put(input_BHWN)
            self._room.release()
            done(error)

    def _load(self, out_HWN: Array, tile: TileRef) -> None:
        """Fill one slot of an input buffer."""
        job = tile.job
        size = tile.row.size, tile.col.size
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

    def _keep(self, low_HWC: Array, tile: TileRef, place: int) -> None:
        """Put one tile's classes, or its part of the weighted sums, into its block."""
        state: _BlockState = tile.job.state
        if state.canvas is None:
            side, row, col = self._config.tile_px, tile.row.out_start, tile.col.out_start
            _write_classes(low_HWC, side, tile.cell, state.classes, row, col)
            return
        with state.lock:
            state.waiting[place] = low_HWC, tile
            while (turn := state.waiting.pop(state.added, None)) is not None:
                state.canvas.add(turn[0], turn[1].row_index, turn[1].col)
                state.added += 1

    def finish(self, job: BlockJob) -> Callable[[], Array]:
        """See `ComputePath`."""
        state: _BlockState = job.state
        if state.canvas is not None:
            state.canvas.finish()
        plan, valid_HW = job.plan, job.valid

        def deliver() -> Array:
            mask_HW = state.classes
            if plan.downsample > 1:
                mask_HW = block_zeros((plan.out_height, plan.out_width), np.uint8)
                kernels.spread_classes(state.classes, plan.downsample, mask_HW)
            if valid_HW is not None:
                kernels.mark_invalid(mask_HW, valid_HW, plan.row_off, plan.col_off, IGNORE)
            return mask_HW

        return deliver

    def close(self) -> None:
        """See `ComputePath`."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._forward = None


def _write_classes(
    low_HWC: Array, side: int, cell: tuple[int, int, int, int], out_HW: Array, out_row: int, out_col: int
) -> None:
    """Write the classes of a cell of a tile of ``side`` pixels into the block."""
    if low_HWC.shape[:2] == (side, side):
        kernels.classes_from_full(low_HWC, cell, out_HW, out_row, out_col)
    else:
        kernels.classes_from_low(low_HWC, side, cell, out_HW, out_row, out_col)


def _as_images(input_BHWN: Array) -> torch.Tensor:
    """Return the buffer as a channels_last tensor (B, N, H, W) that shares its memory."""
    return torch.from_numpy(input_BHWN).permute(0, 3, 1, 2)


def _as_rows(low_BCHW: torch.Tensor) -> Array:
    """Return the logits as a C-contiguous float32 array (B, h, w, C); no copy if they are channels_last."""
    return low_BCHW.permute(0, 2, 3, 1).float().contiguous().numpy()
