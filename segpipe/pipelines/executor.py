"""Where the work of a driver is done: in this process, or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from segpipe.config.card import ModelCard
from segpipe.config.model import ExecutorConfig, SegpipeConfig
from segpipe.masks.plan import PlanScene
from segpipe.pipelines.resources import Hardware, Pool
from segpipe.pipelines.units import PartUnits, Unit
from segpipe.pipelines.worker import UnitResult, WorkerSetup
from segpipe.rasters.scene import SceneSource

Item = TypeVar("Item")
Value = TypeVar("Value")


class Executor(Protocol):
    """Where work is done. All iterators are consumed in the driver's thread."""

    hardware: Hardware

    def inspect(
        self, sources: Sequence[SceneSource], config: SegpipeConfig, card: ModelCard
    ) -> Iterable[PlanScene]:
        """Read headers, in the order given."""

    def run(self, setup: WorkerSetup, pool: Pool, tasks: Sequence[PartUnits]) -> Iterator[UnitResult]:
        """Compute units; results come as they end. A unit whose worker died has no result."""

    def isolate(self, setup: WorkerSetup, pool: Pool, units: Sequence[Unit]) -> Iterator[UnitResult]:
        """Compute units one by one, alone in a worker; one that ends it twice is written as failed."""

    def map_ordered(self, function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
        """Apply a pure function to items, side by side, results in order, few of them held."""

    def busy(self, workers: int, cpus: float, gpus: int) -> str | None:
        """Return a warning where the cluster has no room yet for so many workers, else None."""

    def close(self) -> None:
        """Stop all workers; nothing half-written stays behind."""


def start_executor(config: ExecutorConfig, warn: Callable[[str], None] = lambda _: None) -> Executor:
    """Start the executor that the config names; ``warn`` is told what it must wait for."""
    if config.executor == "local":
        from segpipe.pipelines.local import LocalExecutor

        return LocalExecutor()
    from segpipe.pipelines.cluster import RayExecutor

    return RayExecutor(config.address, warn)
