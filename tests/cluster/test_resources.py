"""The pool always fits the cluster: no worker waits for a place that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segpipe.config.model import SegpipeConfig
from segpipe.config.train import TrainConfig
from segpipe.pipelines.resources import Hardware, plan_pool, units_per_task
from segpipe.training.resources import idle_gpus, plan_training


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


def mixed(nodes: list[tuple[int, int]]) -> Hardware:
    """Nodes of (CPUs, GPUs), as a cluster tells of them."""
    holders = [(cpus, gpus) for cpus, gpus in nodes if gpus]
    return Hardware(
        len(nodes), sum(cpus for cpus, _ in nodes), sum(gpus for _, gpus in nodes),
        cpus_per_node=min(cpus for cpus, _ in holders), gpus_per_node=max(gpus for _, gpus in holders),
        least_cpus=min(cpus for cpus, _ in nodes),
    )  # fmt: skip


def train_config(workers: object, global_batch: int) -> TrainConfig:
    train = {"steps": 1, "global_batch": global_batch}
    values = {"data": {"uri": "d"}, "train": train, "cluster": {"workers": workers}}
    return TrainConfig.model_validate(values)


some_nodes_with_gpus = st.lists(
    st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=8
).filter(lambda nodes: any(gpus for _, gpus in nodes))


@given(some_nodes_with_gpus)
def test_every_gpu_of_a_mixed_cluster_gets_its_worker(nodes: list[tuple[int, int]]) -> None:
    hardware = mixed(nodes)
    pool = plan_pool(hardware, config_for(None))
    assert (pool.workers, pool.gpus_per_worker) == (hardware.gpus, 1)
    assert sum(places(cpus, gpus, pool.cpus_per_worker, True) for cpus, gpus in nodes) == hardware.gpus


@given(some_nodes_with_gpus)
def test_every_gpu_of_a_mixed_cluster_has_room_for_a_worker_of_a_training(
    nodes: list[tuple[int, int]],
) -> None:
    hardware = replace(mixed(nodes), gpu_precision=lambda: "bf16")
    pool = plan_training(hardware, train_config([1, hardware.gpus], 64))
    assert (pool.most, pool.device, pool.precision) == (hardware.gpus, "cuda", "bf16")
    assert sum(places(cpus, gpus, pool.cpus_per_worker, True) for cpus, gpus in nodes) == hardware.gpus
    assert pool.cpus_per_worker > 0
    assert min(pool.threads_per_worker, pool.loader_threads) >= 1


@pytest.mark.parametrize(("batch", "workers"), [(16, 8), (12, 6), (11, 1), (4, 4)])
def test_a_training_by_itself_takes_as_many_gpus_as_share_the_batch_and_names_the_others(
    batch: int, workers: int
) -> None:
    hardware = replace(mixed([(32, 8)]), gpu_precision=lambda: "bf16")
    config = train_config("auto", batch)
    pool = plan_training(hardware, config)
    assert (pool.least, pool.most) == (workers, workers)
    line = idle_gpus(hardware, config, pool)
    if workers == 8:
        assert line is None
    else:
        assert line is not None
        assert line.startswith(f"{8 - workers} of 8 GPUs stay idle: ")
        assert f"batch of {batch} evenly" in line
    assert idle_gpus(hardware, train_config(1, batch), pool) is None, "who asks for fewer gets fewer"


@given(st.lists(st.integers(1, 64), min_size=1, max_size=8), st.data())
def test_workers_of_a_training_on_cpus_find_their_places(cpus: list[int], data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, sum(cpus)))
    hardware = Hardware(len(cpus), sum(cpus), 0, cpus_per_node=min(cpus))
    pool = plan_training(hardware, train_config(workers, 2 * workers))
    assert sum(places(n, 0, pool.cpus_per_worker, False) for n in cpus) >= workers


@given(some_nodes_with_gpus)
def test_work_without_gpus_finds_its_places_on_a_mixed_cluster(nodes: list[tuple[int, int]]) -> None:
    pool = plan_pool(mixed(nodes).without_gpus(), config_for(None))
    assert (pool.workers, pool.gpus_per_worker) == (len(nodes), 0)
    assert sum(places(cpus, 0, pool.cpus_per_worker, False) for cpus, _ in nodes) >= len(nodes)


@pytest.mark.parametrize(("num_units", "unit_px", "workers"), [(1, 1e3, 1), (100_000, 1e3, 1), (7, 1e9, 100)])
def test_tasks_hold_seconds_of_work_and_there_are_enough_of_them(
    num_units: int, unit_px: float, workers: int
) -> None:
    size = units_per_task(num_units, unit_px, workers)
    assert 1 <= size <= 50
    assert size == 1 or num_units / size >= 2 * workers
