"""Runs the units whose worker died once more, one by one, so that a death names its unit.

Only a death of the worker itself speaks against a unit: not the loss of its node, not a kill for want of
memory, not a connection that broke. Everything is bounded: deaths, lost workers, starts that fail, and the
wait for a place in the cluster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from segpipe.errors import CheckError, IncompleteError, SegpipeError, StorageFull, StorageRefused, first_line
from segpipe.pipelines.faults import decode_fault, encode_fault
from segpipe.pipelines.resources import Pool
from segpipe.pipelines.units import Unit
from segpipe.pipelines.worker import UnitResult, Worker, WorkerSetup

DEATHS_ALONE: Final = 2
_MAX_DEATHS: Final = DEATHS_ALONE + 3
_MAX_LOSSES: Final = 3
_MAX_FAILED_STARTS: Final = 3
_START_TIMEOUT_S: Final = 900.0
_PROBE_TIMEOUT_S: Final = 60.0


class IsolatedWorker:
    """A worker that computes one unit a call."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._fault = ""
        try:
            self._worker = Worker(setup)
        except Exception as error:
            self._fault = encode_fault(error)

    def begin(self) -> tuple[str, str]:
        """Return the node's id, and what kept the worker from starting (empty: nothing)."""
        return ray.get_runtime_context().get_node_id(), self._fault

    def run(self, part: int, unit: int) -> UnitResult:
        return next(iter(self._worker.run_units([(part, unit)])))

    def write_failed(self, part: int, unit: int) -> UnitResult:
        return self._worker.write_failed(
            part,
            unit,
            "kills_worker",
            f"the unit ended its worker {DEATHS_ALONE} times, alone. It may lack memory, or a file crash its "
            "decoder: run this scene alone with smaller inference.unit_px and block_px, or leave it out.",
        )


@dataclass(slots=True)
class _Case:
    unit: Unit
    deaths: int = 0
    """Deaths of a worker that was alone with the unit and on a node that lives."""
    losses: int = 0
    """Times that the worker was lost in a way that proves nothing."""


@dataclass(slots=True)
class _Slot:
    """One worker and the call it is busy with; ``case`` is None while it starts."""

    actor: Any
    node_id: str = ""
    case: _Case | None = None


class Isolation:
    """The driver's side: at most ``pool.workers`` workers, each with one unit."""

    def __init__(self, setup: WorkerSetup, pool: Pool, units: Sequence[Unit]) -> None:
        self._setup = setup
        self._workers = pool.workers
        self._actor = ray.remote(IsolatedWorker).options(
            num_cpus=pool.cpus_per_worker, num_gpus=pool.gpus_per_worker or None, max_restarts=0
        )
        self._waiting = deque(_Case(unit) for unit in units)
        self._busy: dict[Any, _Slot] = {}
        self._failed_starts = 0

    def results(self) -> Iterator[UnitResult]:
        """Yield a result for every unit. Raises IncompleteError where no worker can be started."""
        try:
            self._hire()
            while self._busy:
                ended, _ = ray.wait(list(self._busy), num_returns=1, timeout=_START_TIMEOUT_S)
                if not ended:
                    self._check_slots()
                    continue
                slot = self._busy.pop(ended[0])
                if slot.case is None:
                    self._started(slot, ended[0])
                else:
                    yield from self._ended(slot, slot.case, ended[0])
                self._hire()
        finally:
            for slot in self._busy.values():
                ray.kill(slot.actor)

    def _hire(self) -> None:
        """Start workers for units that have none."""
        starting = sum(slot.case is None for slot in self._busy.values())
        while len(self._busy) < self._workers and starting < len(self._waiting):
            actor = self._actor.remote(self._setup)
            self._busy[actor.begin.remote()] = _Slot(actor)
            starting += 1

    def _check_slots(self) -> None:
        if all(slot.case is None for slot in self._busy.values()):
            raise IncompleteError(
                f"no worker could be started for {_START_TIMEOUT_S:.0f} s",
                self._setup.run_uri,
                "Look at the cluster's nodes; the same command goes on where this one stopped.",
            )

    def _started(self, slot: _Slot, call: Any) -> None:
        try:
            slot.node_id, fault = ray.get(call)
        except RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise IncompleteError(
                    f"workers end while they start ({first_line(error)})",
                    self._setup.run_uri,
                    "Look at the memory of the nodes; the same command goes on where this one stopped.",
                ) from None
            return
        self._failed_starts = 0
        if fault:
            ray.kill(slot.actor)
            raise decode_fault(fault)
        self._next(slot)

    def _next(self, slot: _Slot) -> None:
        """Give the worker its next unit, or let it go."""
        if not self._waiting:
            ray.kill(slot.actor)
            return
        case = slot.case = self._waiting.popleft()
        method = slot.actor.write_failed if case.deaths >= DEATHS_ALONE else slot.actor.run
        self._busy[method.remote(*case.unit)] = slot

    def _ended(self, slot: _Slot, case: _Case, call: Any) -> Iterator[UnitResult]:
        try:
            result = ray.get(call)
        except RayTaskError as error:  # the worker lives: storage that fails, or a bug of ours
            cause = error.cause
            if isinstance(cause, CheckError):
                raise cause from None
            yield UnitResult(
                *case.unit,
                "deferred",
                error=f"{type(cause).__name__}: {cause}",
                fatal=isinstance(cause, StorageRefused | StorageFull),
                bug=not isinstance(cause, SegpipeError),
            )
        except RayError as error:
            yield from self._lost(slot, case, error)
            return
        else:
            yield result
        self._next(slot)

    def _lost(self, slot: _Slot, case: _Case, error: RayError) -> Iterator[UnitResult]:
        """Book a call whose worker is gone, and give the unit another try while it may have one."""
        error = _settled(slot.actor, error)
        ray.kill(slot.actor)
        if isinstance(error, OutOfMemoryError):
            reason = "its worker was ended because the node ran out of memory"
            yield UnitResult(*case.unit, "deferred", error=reason)
            return
        if died_alone(error, slot.node_id, _living_nodes):
            case.deaths += 1
        else:
            case.losses += 1
        if case.deaths < _MAX_DEATHS and case.losses < _MAX_LOSSES:
            self._waiting.append(case)
            return
        yield UnitResult(*case.unit, "deferred", error=f"its worker was lost ({first_line(error)})")


def died_alone(error: BaseException, node_id: str, living_nodes: Callable[[], set[str]]) -> bool:
    """Whether a worker's process ended by itself while its node lived on.

    Ray's texts cannot tell: that of every plain death speaks of possible memory kills and lost nodes. Its
    types can: a memory kill is OutOfMemoryError, a broken connection ActorUnavailableError.
    """
    return isinstance(error, ActorDiedError) and not error.preempted and node_id in living_nodes()


def _settled(actor: Any, error: RayError) -> RayError:
    """Ask an actor that could not be reached once more: by now Ray knows whether it is dead."""
    if not isinstance(error, ActorUnavailableError):
        return error
    try:
        ray.get(actor.begin.remote(), timeout=_PROBE_TIMEOUT_S)
    except RayError as answer:
        return answer
    return error


def _living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
