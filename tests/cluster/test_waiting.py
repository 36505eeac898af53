"""What a cluster without room, or without an answer, tells the user. Ray's books are set by the tests."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from segpipe.errors import InputError
from segpipe.pipelines import cluster
from segpipe.pipelines.resources import gpu_precision
from segpipe.training import ray_workers
from segpipe.training.resources import TrainPool

POOL = TrainPool(2, 4, 3, "cuda", "bf16", 3, 3)
JOB_ID = "01000000"
LINE = "waiting for nodes, or for other jobs to end: 2 workers of 3 CPU and 1 GPU each"


class Waits:
    """A watch over the room of workers, a clock that the test sets, Ray's placement groups, other jobs'."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pool: TrainPool, *others: str) -> None:
        self.now_s, self.states = 0.0, list[str]()
        self._told: list[Any] = []
        monkeypatch.setattr(ray_workers.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(
            ray.util,
            "placement_group_table",
            lambda: {
                **{f"{number:08x}{JOB_ID}": {"state": state} for number, state in enumerate(self.states)},
                **{f"ffff{number:04x}02000000": {"state": state} for number, state in enumerate(others)},
            },
        )
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: JOB_ID))
        self._room = ray_workers._RoomWatch(pool, self._told.append)  # type: ignore[arg-type]

    def told_in(self, seconds: float, *states: str) -> list[Any]:
        self.states, before = list(states), len(self._told)
        for _ in range(int(seconds / 0.5)):
            self.now_s += 0.5
            self._room.look()
        return self._told[before:]


def test_workers_that_find_no_place_are_named_once_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(monkeypatch, replace(POOL, most=POOL.least))
    assert waits.told_in(600) == []  # Ray Train is about to ask for one
    assert waits.told_in(40, "PENDING") == []
    assert waits.told_in(600, "PENDING") == [LINE]
    assert waits.told_in(600, "CREATED") == []
    assert waits.told_in(600, "REMOVED", "RESCHEDULING") == [LINE]


def test_an_elastic_training_without_any_place_waits_for_its_least_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = Waits(monkeypatch, POOL)
    assert waits.told_in(40) == []
    assert waits.told_in(600) == [LINE]
    assert waits.told_in(600, "REMOVED", "CREATED") == []
    assert waits.told_in(600, "REMOVED") == [LINE]


def test_the_workers_of_other_jobs_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(monkeypatch, POOL, "PENDING", "CREATED")
    assert waits.told_in(600, "CREATED") == []
    assert waits.told_in(600) == [LINE]


class _Call:
    """Stands for a task that asks a GPU."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def remote(self, *_: object) -> _Call:
        return self


@pytest.mark.parametrize("ready", [True, False])
def test_a_gpu_that_does_not_answer_at_once_is_waited_for_with_a_line(
    monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    told: list[str] = []
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: _Call("fp16"))
    monkeypatch.setattr(ray, "wait", lambda calls, timeout: (calls if ready else [], []))
    monkeypatch.setattr(ray, "get", lambda call: call.answer)
    assert cluster._ask_a_gpu(told.append) == "fp16"
    assert len(told) == (0 if ready else 1)


def test_a_gpu_that_torch_cannot_use_is_an_error_that_names_the_node() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match=r"cannot use the GPU of a node.*driver"):
        gpu_precision()


@pytest.mark.parametrize(
    ("nodes", "gpus", "cpus_per_node", "least"),
    [
        ([{"CPU": 16}, {"CPU": 8, "GPU": 2}], 2, 8, 8),
        ([{"GPU": 4}, {"CPU": 8, "GPU": 2}], 2, 8, 8),  # a head that gives no CPU to work
        ([{"CPU": 4}, {"CPU": 48, "GPU": 1}], 1, 48, 4),
        ([{"GPU": 4}, {"CPU": 8}], 0, 8, 8),
    ],
)
def test_only_gpus_beside_a_cpu_hold_workers(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], gpus: int, cpus_per_node: int, least: int
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    hardware = cluster._cluster_hardware("address", lambda _: None)
    assert (hardware.gpus, hardware.cpus_per_node, hardware.least_cpus) == (gpus, cpus_per_node, least)
