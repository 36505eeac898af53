"""What a worker's end says about its unit, by Ray's own exceptions; and errors that cross processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
)

from segpipe.errors import InputError, SceneError, SegpipeError, StorageRefused
from segpipe.pipelines import isolate
from segpipe.pipelines.cluster import RayExecutor
from segpipe.pipelines.faults import decode_fault, encode_fault
from segpipe.pipelines.isolate import died_alone, first_line
from segpipe.pipelines.local import Unit
from segpipe.pipelines.resources import Pool
from segpipe.pipelines.worker import UnitResult

ACTOR_ID = ray.ActorID.nil().binary()
PLAIN = ActorDiedErrorContext(
    actor_id=ACTOR_ID,
    error_message="Worker unexpectedly exits. There are some potential root causes. (1) The process is "
    "killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called.",
)
PREEMPTED = ActorDiedErrorContext(
    actor_id=ACTOR_ID, node_death_info=NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
)


def test_a_plain_death_on_a_living_node_is_the_units_own() -> None:
    error = ActorDiedError(PLAIN)
    assert "memory" in str(error), "Ray's text speaks of memory in every plain death"
    assert died_alone(error, "node", lambda: {"node", "other"})


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(PREEMPTED),
        ActorUnavailableError("connection lost", ACTOR_ID),
        OutOfMemoryError("the node was short of memory"),
        NodeDiedError("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_end_from_outside_is_not(error: RayError) -> None:
    assert not died_alone(error, "node", lambda: {"node"})


def test_a_death_with_its_node_is_not() -> None:
    assert not died_alone(ActorDiedError(PLAIN), "node", lambda: {"other"})


class FakeRay:
    """Stands for Ray where the workers of unit 3 end with ``error``, and for its actors and their methods."""

    def __init__(self, error: RayError, calls: list[str], method: str = "") -> None:
        self._error, self._calls, self._method = error, calls, method

    def __getattr__(self, name: str) -> FakeRay:
        return FakeRay(self._error, self._calls, name)

    def options(self, **_: Any) -> FakeRay:
        return self

    def remote(self, *_: Any) -> FakeRay:
        return FakeRay(self._error, self._calls, self._method)

    def wait(self, calls: list[FakeRay], **_: Any) -> tuple[list[FakeRay], list[FakeRay]]:
        return calls[:1], calls[1:]

    def get(self, call: FakeRay, **_: Any) -> Any:
        self._calls.append(call._method)
        if call._method == "run":
            raise self._error
        return ("node", "") if call._method == "begin" else UnitResult(0, 3, "done", failed=1)

    def kill(self, _: Any) -> None: ...

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "node", "Alive": True}]


@pytest.mark.parametrize(
    ("error", "runs", "status", "words"),
    [
        (ActorDiedError(PLAIN), 2, "done", ""),
        (NodeDiedError("gone"), 3, "deferred", "its worker was lost"),
        (OutOfMemoryError("short"), 1, "deferred", "the node ran out of memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, RayError) else None,
)
def test_a_unit_is_tried_again_as_its_workers_end_says(
    monkeypatch: pytest.MonkeyPatch, error: RayError, runs: int, status: str, words: str
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(isolate, "ray", FakeRay(error, calls))
    (result,) = isolate.Isolation(None, Pool(1, 1.0, 0, 1), [(0, 3)]).results()  # type: ignore[arg-type]
    assert (result.unit, result.status, calls.count("run")) == (3, status, runs)
    assert words in result.error


@pytest.mark.parametrize(
    "error",
    [
        SegpipeError("a"),
        InputError("what", "where", "fix"),
        StorageRefused("no", "s3://b"),
        SceneError("decode", "what", "where"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_ours_comes_to_the_driver_as_it_was(error: SegpipeError) -> None:
    there = decode_fault(encode_fault(error))
    assert type(there) is type(error)
    assert (str(there), there.args) == (str(error), error.args)


def test_any_other_error_comes_by_name_and_text() -> None:
    there = decode_fault(encode_fault(ZeroDivisionError("by zero")))
    assert isinstance(there, RuntimeError)
    assert "ZeroDivisionError: by zero" in str(there)
    assert first_line(RayError("one\ntwo")) == "one"
    assert first_line(RayError("")) == "RayError"


class ShortLivedPool(RayExecutor):
    """A pool that computes ``lifetime`` units and loses the rest, as one whose restarts are used up."""

    def __init__(self, lifetime: int) -> None:
        self.lifetime, self.pools, self.done = lifetime, 0, set[Unit]()

    def _run_pool(self, setup: Any, pool: Pool, tasks: Sequence[Sequence[Unit]]) -> Iterator[UnitResult]:
        self.pools += 1
        left = self.lifetime
        for unit in (unit for task in tasks for unit in task):
            if unit in self.done:
                yield UnitResult(*unit, "done", skipped=True)
            elif left > 0:
                left -= 1
                self.done.add(unit)
                yield UnitResult(*unit, "done")


@pytest.mark.parametrize(("lifetime", "pools", "computed"), [(1000, 1, 1000), (400, 2, 800), (0, 1, 0)])
def test_a_pool_that_is_used_up_is_made_anew_while_it_gets_on(
    lifetime: int, pools: int, computed: int
) -> None:
    executor = ShortLivedPool(lifetime)
    tasks = [[(0, 10 * task + unit) for unit in range(10)] for task in range(100)]
    results = list(executor.run(None, Pool(1, 1.0, 0, 1), tasks))  # type: ignore[arg-type]
    assert (executor.pools, len(results)) == (pools, computed)
    assert len({(result.part, result.unit) for result in results}) == computed, "each is told of once"
