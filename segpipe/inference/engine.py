"""The engine: blocks in, class masks out, one thread that never lets the device wait for a block to end."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from segpipe.config.card import ModelCard
from segpipe.errors import SegpipeError
from segpipe.geometry.grid import TilePlan
from segpipe.inference.config import EngineConfig
from segpipe.inference.cpu_path import CpuPath
from segpipe.inference.jobs import BlockJob, ComputePath, Delivery, TileRef
from segpipe.inference.memory import keep_freed_pages
from segpipe.inference.result import BlockResult
from segpipe.inference.torch_path import TorchPath

__all__ = ["BlockResult", "Engine", "EngineConfig", "EngineStats"]

Array = np.ndarray[Any, Any]

_log = logging.getLogger(__name__)

_PATIENCE_S: Final = 1.0
"""How long a part-filled batch waits for a block that is still being read. Costs time only, never bytes."""


@dataclass(slots=True)
class EngineStats:
    """What an engine has done since its start."""

    batches: int = 0
    """Batches that have ended, failed ones too."""
    tiles_computed: int = 0
    tiles_empty: int = 0
    busy_s: float = 0.0
    """Seconds in which at least one batch was being computed."""


class Engine:
    """Segments blocks in one long-lived thread; batches run on across tile rows, blocks and callers.

    `submit` and `reading` may be called from any thread. A batch always has its full, fixed shape, so that a
    tile's classes depend neither on its place in a batch nor on the other tiles in it. The engine keeps no
    block after its future is done; how many are in flight is the caller's to bound. Callbacks of futures
    must not close the engine.
    """

    def __init__(
        self, model: nn.Module, card: ModelCard, config: EngineConfig, *, path: ComputePath | None = None
    ) -> None:
        """Take a model in eval mode with its card. Does no work: that begins with `start`.

        Args:
            path: How to compute; None = `CpuPath` on CPU, `TorchPath` elsewhere.
        """
        self._card, self._config = card, config
        if path is None:
            kind = CpuPath if torch.device(config.device).type == "cpu" else TorchPath
            path = kind(model, card, config)
        self._path = path
        self._condition = threading.Condition()
        self._queue: deque[BlockJob] = deque()
        self._batch: list[TileRef] = []
        self._books = threading.Lock()  # guards what batches change when they end: jobs, stats, in_flight
        self._open_jobs: set[BlockJob] = set()
        self._in_flight = 0
        self._busy_since = 0.0
        self._readers = 0
        self._closing = False
        self._fault: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._started: Future[None] = Future()
        self._delivery: ThreadPoolExecutor | None = None
        self._stats = EngineStats()

    @property
    def config(self) -> EngineConfig:
        """What the engine was made with."""
        return self._config

    @property
    def stats(self) -> EngineStats:
        """Counts so far; the object is the engine's own and goes on counting."""
        return self._stats

    def start(self) -> Future[None]:
        """Start the engine thread, which makes the network ready; idempotent.

        Returns a future that is done when the first block can be computed. What goes wrong there fails
        that future and every block.
        """
        with self._condition:
            if self._thread is None and not self._closing:
                keep_freed_pages()  # before the threads that it is for
                self._delivery = ThreadPoolExecutor(1, thread_name_prefix="segpipe-masks")
                self._thread = threading.Thread(target=self._main, name="segpipe-engine", daemon=True)
                self._thread.start()
        return self._started

    def submit(self, pixels: Array, valid: Array | None, plan: TilePlan) -> Future[BlockResult]:
        """Queue one block and return its future; first in, first computed.

        Args:
            pixels: (bands, h, w) scene pixels of the block's read window, any real type. Neither modified
                nor copied: leave it alone until the future is done.
            valid: bool or uint8 (h, w), false or 0 = no data; None = all valid.
            plan: The block's tiles, with this engine's ``tile_px`` and ``blend``.

        Raises:
            ValueError: Arrays and plan do not fit each other or the model.
            SegpipeError: The engine is closed.
        """
        job = BlockJob(_pixels(pixels, self._card), _valid(valid, pixels.shape[1:]), plan)
        self._check_plan(job)
        self.start()
        try:
            self._path.stage(job)
        except Exception as error:
            # The device's memory is full, for one: this block's fault, not the caller's.
            job.future.set_exception(error)
            return job.future
        with self._condition:
            if self._closing:
                raise SegpipeError("the engine is closed", "engine", "Make a new one.")
            self._queue.append(job)
            self._condition.notify_all()
        return job.future

    def segment(self, pixels: Array, valid: Array | None, plan: TilePlan) -> BlockResult:
        """Compute one block and wait for it. See `submit`."""
        return self.submit(pixels, valid, plan).result()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say that a block is being read and will be submitted within this context.

        Meanwhile the engine does not run a part-filled batch for want of tiles (for about a second).
        """
        with self._condition:
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    def close(self) -> None:
        """End the engine thread after the batch at hand; blocks that are not done fail. Idempotent."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if self._delivery is not None:
            self._delivery.shutdown(wait=True)

    def _check_plan(self, job: BlockJob) -> None:
        plan, config = job.plan, self._config
        if (plan.tile_px, plan.blend) != (config.tile_px, config.blend):
            raise ValueError(
                f"the plan's tiles ({plan.tile_px} px, {plan.blend}) are not the engine's "
                f"({config.tile_px} px, {config.blend})"
            )
        for span, size, name in (
            (plan.rows[-1], job.pixels.shape[1], "rows"),
            (plan.cols[-1], job.pixels.shape[2], "columns"),
        ):
            if span.start + span.size > -(-size // plan.downsample):
                raise ValueError(f"the plan's tiles reach beyond the {size} {name} of pixels given")

    # The engine thread runs what follows; `_settle` and what it calls run where a batch ends.

    def _main(self) -> None:
        try:
            self._path.start()
        except BaseException as error:
            self._fault = error
            self._started.set_exception(error)
        else:
            self._started.set_result(None)
        try:
            while (job := self._next()) is not None:
                self._take(job)
        finally:
            try:
                self._path.close()  # raises where the device is lost
            finally:
                self._abandon()

    def _next(self) -> BlockJob | None:
        """Return the next block; run the part-filled batch where none is to come. None = close."""
        while True:
            with self._condition:
                deadline = time.monotonic() + _PATIENCE_S
                while not self._queue and not self._closing:
                    if not self._batch:
                        self._condition.wait()
                        deadline = time.monotonic() + _PATIENCE_S
                        continue
                    patience = deadline - time.monotonic()
                    if self._readers == 0 or patience <= 0:
                        break
                    self._condition.wait(patience)
                if self._closing:
                    return None
                if self._queue:
                    return self._queue.popleft()
            self._run_batch()

    def _take(self, job: BlockJob) -> None:
        """Go through the tiles of a block and run every batch that fills up."""
        if not job.future.set_running_or_notify_cancel():
            return
        if self._fault is not None:
            self._fail(job, self._fault)
            return
        try:
            self._path.open(job)
        except Exception as error:
            self._fail(job, error)
            return
        with self._books:
            self._open_jobs.add(job)
        for tile in job.tiles():
            if job.failed or self._closing:
                return
            if tile.is_empty():
                job.tiles_empty += 1
                continue
            with self._books:
                job.pending += 1
            self._batch.append(tile)
            if len(self._batch) == self._config.batch_size:
                self._run_batch()
        with self._books:
            self._stats.tiles_empty += job.tiles_empty
            job.exhausted = True
        self._finish_if_done(job)

    def _run_batch(self) -> None:
        batch = [tile for tile in self._batch if not tile.job.failed]
        self._batch.clear()
        if not batch:
            return
        with self._books:
            if self._in_flight == 0:
                self._busy_since = time.perf_counter()
            self._in_flight += 1
        try:
            self._path.run(batch, partial(self._settle, batch))
        except Exception as error:
            self._settle(batch, error)

    def _settle(self, batch: Sequence[TileRef], error: Exception | None) -> None:
        """Book a batch that has ended."""
        jobs = list(dict.fromkeys(tile.job for tile in batch))
        with self._books:
            self._in_flight -= 1
            self._stats.batches += 1
            if self._in_flight == 0:
                self._stats.busy_s += time.perf_counter() - self._busy_since
            for tile in batch:
                tile.job.pending -= 1
                tile.job.tiles_computed += error is None
            self._stats.tiles_computed += len(batch) if error is None else 0
        if error is not None:
            _log.warning("a batch of %d tiles failed: %s", len(batch), error)
        for job in jobs:
            if error is None:
                self._finish_if_done(job)
            else:
                self._fail(job, error)

    def _finish_if_done(self, job: BlockJob) -> None:
        with self._books:
            if not job.exhausted or job.pending or job.failed or job not in self._open_jobs:
                return
            self._open_jobs.discard(job)
        try:
            delivery = self._path.finish(job)
            assert self._delivery is not None
            self._delivery.submit(_deliver, job, delivery)
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: BlockJob, error: BaseException) -> None:
        with self._books:
            if job.failed:
                return
            job.failed = True
            self._open_jobs.discard(job)
        job.future.set_exception(error)

    def _abandon(self) -> None:
        """Fail what is neither done nor will be."""
        closed = SegpipeError("the engine was closed before this block was done", "engine")
        for job in list(self._open_jobs):
            self._fail(job, closed)
        self._batch.clear()
        with self._condition:
            self._closing = True
            waiting = list(self._queue)
            self._queue.clear()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                self._fail(job, closed)


def _deliver(job: BlockJob, delivery: Delivery) -> None:
    try:
        mask = delivery()
    except Exception as error:
        job.future.set_exception(error)
    else:
        job.future.set_result(BlockResult(mask, job.tiles_computed, job.tiles_empty))
    finally:
        job.state = None


def _pixels(pixels: Array, card: ModelCard) -> Array:
    if pixels.ndim != 3 or pixels.shape[0] != len(card.bands):
        raise ValueError(f"pixels must be ({len(card.bands)} bands, height, width), not {pixels.shape}")
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"pixels must be real numbers, not {pixels.dtype}")
    return np.ascontiguousarray(pixels)


def _valid(valid: Array | None, shape: tuple[int, ...]) -> Array | None:
    if valid is None:
        return None
    if valid.shape != shape or valid.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"valid must be bool or uint8 {shape}, not {valid.dtype} {valid.shape}")
    return np.ascontiguousarray(valid).view(np.uint8)
