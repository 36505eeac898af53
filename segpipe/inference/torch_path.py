"""The compute path of GPUs: a block is uploaded once; tiles, normalisation and arg-max stay on the device.

Nothing here names CUDA outside the stream helpers, so the same path runs on any torch device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from segpipe.config.card import IGNORE, ModelCard
from segpipe.inference.blend import ramp
from segpipe.inference.config import EngineConfig
from segpipe.inference.jobs import BlockJob, Done, TileRef
from segpipe.inference.network import Forward, first_call, prepare_network

Array = np.ndarray[Any, Any]

_UPSAMPLED_BYTES: Final = 512 * 2**20
"""Most bytes of full-size logits at once."""


@dataclass(slots=True)
class _BlockState:
    pixels: Tensor
    """On the device: the file's own type, or float32 reduced."""
    valid: Tensor | None
    """bool, on the grid of ``pixels``."""
    valid_full: Tensor | None
    uploaded: torch.cuda.Event | None
    classes: Tensor | None = None
    """uint8, the block on the reduced grid."""
    sums: Tensor | None = None
    """float32, linear blend: weighted logits of the block's tile rows from ``top`` on."""
    top: int = 0


class TorchPath:
    """Upload, forward and arg-max on a torch device, copies beside kernels. See `ComputePath`."""

    def __init__(self, model: nn.Module, card: ModelCard, config: EngineConfig) -> None:
        self._model, self._card, self._config = model, card, config
        self._device = torch.device(config.device)
        self._cuda = self._device.type == "cuda"
        self._forward: Forward | None = None
        self._raw_BNHW = self._valid_B1HW = torch.empty(0)
        self._up: torch.cuda.Stream | None = None
        self._down: torch.cuda.Stream | None = None
        self._main: torch.cuda.Stream | None = None
        if self._cuda:
            self._up, self._down, self._main = (_stream(self._device) for _ in range(3))

    def start(self) -> None:
        """See `ComputePath`."""
        config = self._config
        if not self._cuda:
            torch.set_num_threads(config.threads)
        elif config.precision == "fp32":
            # On GPUs torch convolves float32 in TF32, of 10 bits, unless told not to, for the whole process.
            torch.backends.cudnn.allow_tf32 = False
        bands, side = len(self._card.bands), config.tile_px
        with torch.inference_mode(), self._on(self._main):
            self._mean_N11 = torch.tensor(self._card.mean, device=self._device).float()[:, None, None]
            self._std_N11 = torch.tensor(self._card.std, device=self._device).float()[:, None, None]
            self._raw_BNHW = torch.zeros((config.batch_size, bands, side, side), device=self._device)
            self._raw_BNHW = self._raw_BNHW.to(memory_format=torch.channels_last)
            self._valid_B1HW = torch.ones(
                (config.batch_size, 1, side, side), dtype=torch.bool, device=self._device
            )
            self._forward = prepare_network(
                self._model,
                device=config.device,
                precision=config.precision,
                compile_network=config.compile,
            )
            first_call(self._forward, self._raw_BNHW, compile_network=config.compile)
        if self._main is not None:
            self._main.synchronize()

    def _on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if stream is not None else nullcontext()

    def stage(self, job: BlockJob) -> None:
        """See `ComputePath`: copies the block to pinned memory and starts its upload."""
        with torch.inference_mode(), self._on(self._up):
            pixels = self._upload(job.pixels)
            valid = None if job.valid is None else self._upload(job.valid).bool()
            full = valid
            if job.plan.downsample > 1:
                pixels, valid = _reduce(pixels, valid, job.plan.downsample)
            uploaded = None
            if self._up is not None:
                uploaded = _event_on(self._up)
        job.state = _BlockState(pixels, valid, full, uploaded)

    def _upload(self, values: Array) -> Tensor:
        """Start a copy to the device by way of pinned memory, so that this thread waits for none of it."""
        source = torch.from_numpy(values if values.flags.writeable else values.copy())
        if not self._cuda:
            return source
        pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        pinned.copy_(source)
        return pinned.to(self._device, non_blocking=True)

    def open(self, job: BlockJob) -> None:
        """See `ComputePath`."""
        state: _BlockState = job.state
        plan = job.plan
        with torch.inference_mode(), self._on(self._main):
            if self._main is not None and state.uploaded is not None:
                self._main.wait_event(state.uploaded)
                for tensor in (state.pixels, state.valid, state.valid_full):
                    if tensor is not None:
                        tensor.record_stream(self._main)
            state.classes = torch.zeros(job.reduced_shape, dtype=torch.uint8, device=self._device)
            if plan.blend == "linear":
                height = max(span.cell_stop - span.cell_start for span in plan.rows)
                shape = self._card.num_classes, height, job.reduced_shape[1]
                state.sums = torch.zeros(shape, device=self._device)

    def run(self, tiles: Sequence[TileRef], done: Done) -> None:
        """See `ComputePath`. A batch counts as done when its work is queued on the device."""
        self._run(tiles)
        done(None)

    def _run(self, tiles: Sequence[TileRef]) -> None:
        assert self._forward is not None, "start() comes first"
        with torch.inference_mode(), self._on(self._main):
            for slot, tile in enumerate(tiles):
                self._load(slot, tile)
            x_BNHW = (self._raw_BNHW - self._mean_N11) / self._std_N11
            x_BNHW = torch.where(self._valid_B1HW & x_BNHW.isfinite(), x_BNHW, 0.0)
            low_BCHW = self._forward(x_BNHW.contiguous(memory_format=torch.channels_last))
            side, classes = self._config.tile_px, low_BCHW.shape[1]
            step = max(1, _UPSAMPLED_BYTES // (4 * classes * side * side))
            for begin in range(0, len(tiles), step):
                self._keep(tiles[begin : begin + step], low_BCHW[begin : begin + step])

    def _load(self, slot: int, tile: TileRef) -> None:
        """Copy one tile, reflected to full size, into its slot of the batch."""
        state: _BlockState = tile.job.state
        rows = _indices(tile.row.start, tile.row.size, self._config.tile_px, self._device)
        cols = _indices(tile.col.start, tile.col.size, self._config.tile_px, self._device)
        self._raw_BNHW[slot].copy_(_crop(state.pixels, rows, cols))
        if state.valid is None:
            self._valid_B1HW[slot].fill_(True)
        else:
            self._valid_B1HW[slot, 0].copy_(_crop(state.valid, rows, cols))

    def _keep(self, tiles: Sequence[TileRef], low_BCHW: Tensor) -> None:
        """Upsample the logits of these tiles and put their classes, or weighted sums, where they belong."""
        side = self._config.tile_px
        full_BCHW = low_BCHW[: len(tiles)].float()
        if full_BCHW.shape[-2:] != (side, side):
            full_BCHW = F.interpolate(full_BCHW, size=(side, side), mode="bilinear", align_corners=False)
        classes_BHW = None
        if self._config.blend == "crop":
            classes_BHW = full_BCHW.argmax(1).to(torch.uint8)
        for index, tile in enumerate(tiles):
            state: _BlockState = tile.job.state
            top, bottom, left, right = tile.cell
            row, col = tile.row.out_start, tile.col.out_start
            if classes_BHW is not None:
                assert state.classes is not None
                cell_HW = classes_BHW[index, top:bottom, left:right]
                state.classes[row : row + bottom - top, col : col + right - left] = cell_HW
                continue
            assert state.sums is not None
            self._advance(state, row)
            weight_HW = self._upload(ramp(tile.row, side))[:, None] * self._upload(ramp(tile.col, side))
            sums = state.sums[:, row - state.top :, col:][:, : bottom - top, : right - left]
            sums += full_BCHW[index, :, top:bottom, left:right] * weight_HW

    def _advance(self, state: _BlockState, top: int) -> None:
        """Write the classes of the rows above ``top``, which no later tile touches, and move the sums up."""
        assert state.classes is not None
        assert state.sums is not None
        height = state.sums.shape[1]
        while state.top < top:
            rows = min(height, top - state.top)
            state.classes[state.top : state.top + rows] = state.sums[:, :rows].argmax(0).to(torch.uint8)
            state.sums = torch.cat((state.sums[:, rows:], torch.zeros_like(state.sums[:, :rows])), dim=1)
            state.top += rows

    def finish(self, job: BlockJob) -> Callable[[], Array]:
        """See `ComputePath`: queues the mask's way back."""
        state: _BlockState = job.state
        plan = job.plan
        with torch.inference_mode(), self._on(self._main):
            if state.sums is not None:
                self._advance(state, job.reduced_shape[0])
            assert state.classes is not None
            mask_HW = state.classes
            if plan.downsample > 1:
                mask_HW = mask_HW.repeat_interleave(plan.downsample, 0)[: plan.out_height]
                mask_HW = mask_HW.repeat_interleave(plan.downsample, 1)[:, : plan.out_width]
            if state.valid_full is not None:
                inside = state.valid_full[plan.row_off :, plan.col_off :]
                inside = inside[: plan.out_height, : plan.out_width]
                mask_HW = mask_HW.masked_fill(~inside, IGNORE)
            mask_HW = mask_HW.contiguous()
        if self._down is None or self._main is None:
            return mask_HW.numpy
        self._down.wait_stream(self._main)
        with torch.inference_mode(), torch.cuda.stream(self._down):
            pinned = torch.empty(mask_HW.shape, dtype=torch.uint8, pin_memory=True)
            pinned.copy_(mask_HW, non_blocking=True)
            mask_HW.record_stream(self._down)
            done = _event_on(self._down, blocking=True)  # who waits leaves the core to others

        def deliver() -> Array:
            done.synchronize()
            return pinned.numpy()

        return deliver

    def close(self) -> None:
        """See `ComputePath`."""
        if self._main is not None:
            self._main.synchronize()
        self._forward = None
        self._raw_BNHW = self._valid_B1HW = torch.empty(0)
        if self._cuda:
            torch.cuda.empty_cache()  # other processes on this device may want it


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event_on(stream: torch.cuda.Stream, *, blocking: bool = False) -> torch.cuda.Event:
    """Return an event that is done when all that is queued on ``stream`` now is.

    With ``blocking`` a thread that waits for it sleeps instead of spinning.
    """
    event = torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _indices(start: int, size: int, side: int, device: torch.device) -> slice | Tensor:
    """Return what picks a tile along one axis: a slice, or reflected places where the scene is too small."""
    if size == side:
        return slice(start, start + size)
    places = torch.arange(side, device=device)
    if size > 1:
        places %= 2 * (size - 1)
        places = torch.minimum(places, 2 * (size - 1) - places)
    else:
        places = torch.zeros_like(places)
    return places + start


def _crop(values: Tensor, rows: slice | Tensor, cols: slice | Tensor) -> Tensor:
    """Index the last two axes; tensors of places go one axis at a time."""
    for axis, places in ((-2, rows), (-1, cols)):
        if isinstance(places, slice):
            values = values.narrow(axis, places.start, places.stop - places.start)
        else:
            values = values.index_select(axis, places)
    return values


def _reduce(pixels_NHW: Tensor, valid_HW: Tensor | None, factor: int) -> tuple[Tensor, Tensor]:
    """Return the float32 mean of the valid, finite pixels of each group, and where there is one."""
    values = pixels_NHW.float()
    usable = values.isfinite()
    if valid_HW is not None:
        usable &= valid_HW
    height, width = values.shape[1:]
    pad = (0, -width % factor, 0, -height % factor)
    values = F.pad(torch.where(usable, values, 0.0), pad)
    counts = F.avg_pool2d(F.pad(usable.float(), pad), factor, divisor_override=1)
    sums = F.avg_pool2d(values, factor, divisor_override=1)
    any_valid = counts.amax(0) > 0
    # a band without a usable pixel beside one that has some: NaN, which enters as the band mean
    return sums / counts, any_valid
