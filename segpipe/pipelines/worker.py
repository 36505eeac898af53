"""One worker: read threads -> engine -> encode threads -> one object per unit. No Ray here.

Pixels never leave the worker; memory is a constant number of blocks (``_Budget``). Every executor runs
this class, so what it computes does not depend on who called it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from segpipe.config.model import InputConfig
from segpipe.errors import (
    CheckError,
    SceneError,
    SegpipeError,
    StorageError,
    StorageFull,
    StorageRefused,
)
from segpipe.geometry.grid import Block
from segpipe.inference.result import BlockResult
from segpipe.masks.plan import PlanPart, PlanScene, UnitScene, load_part
from segpipe.masks.run import RunInfo, unit_key
from segpipe.masks.schema import FAILED, mask_schema
from segpipe.masks.write import Row, encode_unit, failed_row
from segpipe.pipelines.segment import BlockSource, make_source
from segpipe.pipelines.stages import LabelReaders, base_row, finish_block, label_pixels
from segpipe.storage import Storage, open_storage

READ_THREADS = 2
WRITE_THREADS = 2
UNITS_IN_FLIGHT = 3
_CPU_BUDGET_BYTES = 320 * 2**20
_GPU_BUDGET_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs to start; small, so that it travels to every process."""

    run_uri: str
    info: RunInfo
    input: InputConfig
    model_uri: str | None
    """None: score the masks of ``info.masks_uri`` instead of segmenting."""


@dataclass(slots=True)
class UnitResult:
    """What became of one unit: ``done`` (its object is there) or ``deferred`` (nothing was committed)."""

    part: int
    unit: int
    status: str
    skipped: bool = False
    """The object was there before."""
    failed: int = 0
    scene_px: int = 0
    area_m2: float = 0.0
    error: str = ""
    fatal: bool = False
    """Deferred by something that will stop every unit: storage that refuses, a full disk."""
    bug: bool = False
    damaged: bool = False
    """Deferred by a stored object that is not whole: a part of the plan, a mask that is scored."""
    device_failed: bool = False
    """Deferred by a fault of the GPU, which this process will meet with every unit."""


class _Budget:
    """Bounds the bytes of all blocks in flight; one block always passes, however large."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()
        self._closed = False

    def acquire(self, num_bytes: int) -> None:
        with self._changed:
            while self._used_bytes and self._used_bytes + num_bytes > self._limit_bytes:
                if self._closed:
                    break
                self._changed.wait()
            if self._closed:
                raise CancelledError
            self._used_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        with self._changed:
            self._used_bytes -= num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(slots=True)
class _UnitTask:
    """One unit on its way: its rows come in any order and are written in plan order."""

    part: int
    unit: int
    rows: list[Row | None]
    result: UnitResult
    finished: Future[UnitResult] = field(default_factory=Future)
    open_blocks: int = 0
    fault: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Worker:
    """Computes units of one run. Safe to call from several threads; ``close`` ends its threads."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._info = setup.info
        self._storage: Storage = open_storage(setup.run_uri)
        self._schema = mask_schema(self._info.recipe_key, self._info.card.classes)
        self._source: BlockSource = make_source(setup.info, setup.input, setup.model_uri)
        on_gpu = self._info.facts.device == "cuda"
        self._budget = _Budget(_GPU_BUDGET_BYTES if on_gpu else _CPU_BUDGET_BYTES)
        self._read_pool = ThreadPoolExecutor(READ_THREADS, "segpipe-read")
        # PNG and JPEG decode from the top: two readers on alternate bands would each decode everything.
        self._scan_pool = ThreadPoolExecutor(1, "segpipe-scan")
        self._write_pool = ThreadPoolExecutor(WRITE_THREADS, "segpipe-write")
        self._labels = LabelReaders(setup.input, self._info.card)
        self._parts: dict[int, PlanPart] = {}
        self._parts_lock = threading.Lock()

    def close(self) -> None:
        """Stop; units that are not written yet are dropped whole."""
        self._budget.close()
        for pool in (self._read_pool, self._scan_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        self._source.close()
        for pool in (self._read_pool, self._scan_pool):
            pool.shutdown(wait=True)
        self._write_pool.shutdown(wait=True, cancel_futures=True)

    def run_units(self, units: Iterable[tuple[int, int]]) -> Iterator[UnitResult]:
        """Compute units and yield their results as they end, a few units ahead.

        Raises `SegpipeError` where the network cannot be made ready as the config wants it.
        """
        waiting = iter(units)
        running: set[Future[UnitResult]] = set()
        while True:
            running |= {self._start(*unit) for unit in islice(waiting, UNITS_IN_FLIGHT - len(running))}
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                result = future.result()
                if result.status != "done":
                    self._source.check_start()
                yield result

    def write_failed(self, part: int, unit: int, kind: str, error: str) -> UnitResult:
        """Write a unit as failed without touching its pixels (a unit that kills its worker)."""
        rows: list[Row] = []
        for scene, block in _blocks_of(self._part(part).unit(unit)):
            base = base_row(scene, part, unit)
            rows.append(failed_row(base, block.window if block else None, kind, error, None))
        self._storage.put_if_absent(unit_key(part, unit), encode_unit(rows, self._schema))
        return UnitResult(part, unit, "done", failed=len(rows), error=error)

    def _part(self, part: int) -> PlanPart:
        with self._parts_lock:
            if part not in self._parts:
                while len(self._parts) >= 2:
                    self._parts.pop(next(iter(self._parts)))
                self._parts[part] = load_part(self._storage, part, self._info.facts)
            return self._parts[part]

    def _start(self, part: int, unit: int) -> Future[UnitResult]:
        """Begin a unit unless its object is there: a call that is repeated costs one question."""
        try:
            if self._storage.stat(unit_key(part, unit)) is not None:
                return _resolved(UnitResult(part, unit, "done", skipped=True))
            blocks = list(_blocks_of(self._part(part).unit(unit)))
        except StorageError as error:
            return _resolved(_deferred(UnitResult(part, unit, "deferred"), error))
        result = UnitResult(part, unit, "done")
        for scene, block in blocks:
            if block is not None:
                result.scene_px += block.window.num_px
                result.area_m2 += block.window.num_px * _pixel_m2(scene)
        task = _UnitTask(part, unit, [None] * len(blocks), result, open_blocks=len(blocks))
        for index, (scene, block) in enumerate(blocks):
            if block is None:
                kind, reason = scene.error_kind or "header", scene.error or ""
                base = base_row(scene, part, unit)
                self._end_block(task, index, failed_row(base, None, kind, reason, None))
            else:
                pool = self._read_pool if _reads_anywhere(scene) else self._scan_pool
                pool.submit(self._guard, task, self._read_block, task, index, scene, block)
        return task.finished

    def _guard(self, task: _UnitTask, step: Any, *args: Any) -> None:
        """Run one step of a block; a fault that is not the scene's defers the whole unit."""
        try:
            step(*args)
        except BaseException as error:
            self._fail(task, error)

    def _read_block(self, task: _UnitTask, index: int, scene: PlanScene, block: Block) -> None:
        if task.fault is not None:
            return
        num_bytes = self._source.block_bytes(scene, block)
        self._budget.acquire(num_bytes)
        try:
            future = self._source.start(scene, block)
        except SceneError as error:
            future = Future()
            future.set_exception(error)
        except BaseException:
            self._budget.release(num_bytes)
            raise
        # The pixels are let go here, the mask when its row is made.
        mask_bytes = block.window.num_px

        def on_done(done: Future[BlockResult]) -> None:
            self._budget.release(num_bytes - mask_bytes)
            try:
                self._write_pool.submit(self._guard, task, self._write_block, task, index, scene, block, done)
            except RuntimeError as error:  # the pool was shut down
                self._budget.release(mask_bytes)
                self._fail(task, error)

        future.add_done_callback(on_done)

    def _write_block(
        self, task: _UnitTask, index: int, scene: PlanScene, block: Block, done: Future[BlockResult]
    ) -> None:
        base = base_row(scene, task.part, task.unit, block.window)
        try:
            segmented = done.result()
            row = finish_block(base, scene, block, segmented, self._labels, keep_mask=self._source.keeps_mask)
        except SceneError as error:
            label_px = label_pixels(scene, block, self._labels)
            row = failed_row(base, block.window, error.kind, str(error), label_px)
        finally:
            self._budget.release(block.window.num_px)
        self._end_block(task, index, row)

    def _end_block(self, task: _UnitTask, index: int, row: Row) -> None:
        with task.lock:
            task.rows[index] = row
            task.open_blocks -= 1
            last = task.open_blocks == 0
        if last and task.fault is None:
            self._commit(task)

    def _commit(self, task: _UnitTask) -> None:
        rows = [row for row in task.rows if row is not None]
        try:
            data = encode_unit(rows, self._schema)
            self._storage.put_if_absent(unit_key(task.part, task.unit), data)
        except Exception as error:  # not Ctrl-C: this may be the driver's own thread
            self._fail(task, error)
            return
        task.result.failed = sum(row["status"] == FAILED for row in rows)
        task.finished.set_result(task.result)

    def _fail(self, task: _UnitTask, error: BaseException) -> None:
        with task.lock:
            first = task.fault is None
            if first:
                task.fault = error
        if first:
            task.finished.set_result(_deferred(task.result, error))


def _blocks_of(scenes: list[UnitScene]) -> Iterator[tuple[PlanScene, Block | None]]:
    for entry in scenes:
        if not entry.blocks:
            yield entry.scene, None
        for block in entry.blocks:
            yield entry.scene, block


def _reads_anywhere(scene: PlanScene) -> bool:
    return scene.header is None or scene.header.driver == "GTiff"


def _pixel_m2(scene: PlanScene) -> float:
    pixel_m = scene.header.pixel_m if scene.header is not None else None
    return 0.0 if pixel_m is None else pixel_m**2


def _resolved(result: UnitResult) -> Future[UnitResult]:
    future: Future[UnitResult] = Future()
    future.set_result(result)
    return future


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch raises a RuntimeError of its own on a GPU, and a plain one on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _deferred(result: UnitResult, error: BaseException) -> UnitResult:
    """Mark a unit as not committed; the same command again will do it."""
    result.status = "deferred"
    result.error = str(error) or type(error).__name__
    result.fatal = isinstance(error, StorageRefused | StorageFull)
    result.damaged = isinstance(error, CheckError)
    expected = isinstance(error, SegpipeError | CancelledError | OSError)
    if _is_out_of_memory(error):
        first_line = result.error.partition("\n")[0].removesuffix(".")
        result.error = f"out of memory ({first_line}). Free memory, or start anew with smaller batch_size."
    elif not expected:
        result.device_failed = type(error).__name__ == "AcceleratorError"
        result.bug = True
        result.error = f"{type(error).__name__}: {result.error}"
    return result
