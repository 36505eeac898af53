"""The pool always fits the cluster: no worker waits for a place that cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segpipe.config.model import SegpipeConfig
from segpipe.pipelines.resources import Hardware, plan_pool, units_per_task


def config_for(workers: int | None) -> SegpipeConfig:
    return SegpipeConfig.model_validate({"cluster": {"workers": workers or "auto"}})


def places(node_cpus: int, node_gpus: int, reserved: float, on_gpu: bool) -> int:
    by_cpu = int((node_cpus + 1e-9) / reserved) if reserved else 10**9
    return min(by_cpu, node_gpus) if on_gpu else by_cpu


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.none() | st.integers(1, 40))
def test_all_workers_of_a_cluster_without_gpus_find_a_place_and_a_cpu_is_left(
    cpus: list[int], workers: int | None
) -> None:
    hardware = Hardware(len(cpus), sum(cpus), 0, cpus_per_node=min(cpus))
    pool = plan_pool(hardware, config_for(workers))
    assert pool.workers == (workers or len(cpus))
    assert pool.workers * pool.cpus_per_worker <= sum(cpus) - 1
    assert sum(places(n, 0, pool.cpus_per_worker, False) for n in cpus) >= pool.workers
    assert pool.threads_per_worker >= 1


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=8).filter(
        lambda nodes: any(gpus for _, gpus in nodes)
    )
)
def test_every_gpu_of_a_mixed_cluster_gets_its_worker(nodes: list[tuple[int, int]]) -> None:
    holders = [(cpus, gpus) for cpus, gpus in nodes if gpus]
    total = sum(gpus for _, gpus in nodes)
    hardware = Hardware(
        len(nodes), sum(cpus for cpus, _ in nodes), total,
        cpus_per_node=min(cpus for cpus, _ in holders), gpus_per_node=max(gpus for _, gpus in holders),
    )  # fmt: skip
    pool = plan_pool(hardware, config_for(None))
    assert (pool.workers, pool.gpus_per_worker) == (total, 1)
    assert sum(places(cpus, gpus, pool.cpus_per_worker, True) for cpus, gpus in nodes) == total


@pytest.mark.parametrize(("num_units", "unit_px", "workers"), [(1, 1e3, 1), (100_000, 1e3, 1), (7, 1e9, 100)])
def test_tasks_hold_seconds_of_work_and_there_are_enough_of_them(
    num_units: int, unit_px: float, workers: int
) -> None:
    size = units_per_task(num_units, unit_px, workers)
    assert 1 <= size <= 50
    assert size == 1 or num_units / size >= 2 * workers
