"""The local executor: the same worker in this process, headers and reports by threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from segpipe.config.card import ModelCard
from segpipe.config.model import SegpipeConfig
from segpipe.masks.plan import PlanScene
from segpipe.pipelines.plan import inspect_source
from segpipe.pipelines.resources import Pool, this_machine
from segpipe.pipelines.units import PartUnits, Unit
from segpipe.pipelines.worker import UnitResult, Worker, WorkerSetup
from segpipe.rasters.scene import SceneSource
from segpipe.threads import map_in_order

Item = TypeVar("Item")
Value = TypeVar("Value")

_HEADER_THREADS = 8
_TABLE_THREADS = 4


class LocalExecutor:
    """One worker in this process. A unit that ends the worker ends the command: use Ray to survive it."""

    def __init__(self) -> None:
        self.hardware = this_machine()
        self._worker: Worker | None = None

    def inspect(
        self, sources: Sequence[SceneSource], config: SegpipeConfig, card: ModelCard
    ) -> Iterator[PlanScene]:
        return inspect_sources(sources, config, card)

    def run(self, setup: WorkerSetup, pool: Pool, tasks: Sequence[PartUnits]) -> Iterator[UnitResult]:
        if not tasks:
            return
        self._worker = Worker(setup)
        yield from self._worker.run_units(unit for task in tasks for unit in task)

    def isolate(self, setup: WorkerSetup, pool: Pool, units: Sequence[Unit]) -> Iterator[UnitResult]:
        return iter(())

    def map_ordered(self, function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
        return map_in_order(function, items, _TABLE_THREADS)

    def busy(self, workers: int, cpus: float, gpus: int) -> str | None:
        return None

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


def inspect_sources(
    sources: Sequence[SceneSource], config: SegpipeConfig, card: ModelCard
) -> Iterator[PlanScene]:
    """Read headers by threads of this process, in the order given."""
    return map_in_order(lambda source: inspect_source(source, config, card), sources, _HEADER_THREADS)
