"""Turns the hardware into the shape of a training: workers, CPUs, threads, device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from segpipe.config.train import TrainConfig
from segpipe.errors import ConfigError
from segpipe.pipelines.resources import Hardware, share_of_node
from segpipe.wording import counted

_MOST_LOADER_THREADS: Final = 8
_SPARE_CPUS: Final = 0.5
"""CPUs that the workers together leave free."""
_CPUS_OF_ONE_IN_A_RANGE: Final = 0.9
"""Reserved by each worker of a range on CPUs: as many find room as there are CPUs."""


@dataclass(frozen=True, slots=True)
class TrainPool:
    """The workers of a training, and what each of them has."""

    least: int
    most: int
    """Equal where the number is fixed."""
    cpus_per_worker: float
    """CPUs that Ray sets aside for a worker; its threads are other numbers."""
    device: str
    """Kind of device: cpu or cuda."""
    precision: str
    threads_per_worker: int
    loader_threads: int


def plan_training(hardware: Hardware, config: TrainConfig) -> TrainPool:
    """Shape a training on this hardware. Raises `ConfigError` for more workers than it has room for.

    One worker a GPU where there are any, else one; by itself never more than share the global batch evenly.
    """
    cluster, batch = config.cluster, config.train.global_batch
    device = "cuda" if hardware.gpus else "cpu"
    room = hardware.gpus or hardware.cpus
    if cluster.executor == "local":
        least = most = 1
    elif isinstance(cluster.workers, tuple):
        least, most = cluster.workers
    elif cluster.workers == "auto":
        least = most = max(n for n in range(1, max(1, hardware.gpus) + 1) if batch % n == 0)
    else:
        least = most = cluster.workers
    if least > room:
        what = "GPUs" if hardware.gpus else "CPUs"
        raise ConfigError(
            f"{least} workers, but there are {room} {what}", "cluster.workers", f"Ask for at most {room}."
        )
    reserved, share = share_of_node(hardware, most, spare_cpus=_SPARE_CPUS)
    if least < most and not hardware.gpus:
        reserved = _CPUS_OF_ONE_IN_A_RANGE
    threads, loaders = cluster.threads_per_worker, cluster.loader_threads
    precision: str = config.train.precision
    if precision == "auto":
        precision = hardware.gpu_precision() if hardware.gpus else "fp32"
    return TrainPool(
        least=least,
        most=most,
        cpus_per_worker=reserved,
        device=device,
        precision=precision,
        threads_per_worker=share if threads == "auto" else threads,
        loader_threads=min(share, _MOST_LOADER_THREADS) if loaders == "auto" else loaders,
    )


def idle_gpus(hardware: Hardware, config: TrainConfig, pool: TrainPool) -> str | None:
    """A line where ``workers: auto`` leaves GPUs without work, for they could not share the batch evenly."""
    idle, batch = hardware.gpus - pool.most, config.train.global_batch
    if config.cluster.workers != "auto" or config.cluster.executor == "local" or idle <= 0:
        return None
    return (
        f"{idle} of {hardware.gpus} GPUs stay idle: {counted(pool.most, 'worker')} share the global batch of "
        f"{batch} evenly (train.global_batch: a multiple of {hardware.gpus} uses all)"
    )
