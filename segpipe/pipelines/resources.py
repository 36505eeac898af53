"""Turns the hardware into the shape of a run: pool size, CPUs, threads, batch and unit size.

Nothing here looks at a timing: the same hardware and config always give the same answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from segpipe.config.card import ModelCard
from segpipe.config.model import SegpipeConfig
from segpipe.errors import ConfigError, InputError
from segpipe.inference.defaults import CPU_BATCH, CUDA_BATCH
from segpipe.masks.run import Facts
from segpipe.pipelines.cpus import usable_cpus

CPU_UNIT_PX = 16 * 2**20
GPU_UNIT_PX = 2**30
_TASK_PX = 2 * CPU_UNIT_PX
_MAX_UNITS_PER_TASK = 50
_CUT_FACTS = ("block_px", "unit_px")
_ALL_FACTS = (*_CUT_FACTS, "tile_px", "margin_px", "blend", "batch_size", "precision", "compile")


def gpu_precision() -> str:
    """Return what ``precision: auto`` means on the GPU here. Raises InputError where torch cannot use it."""
    import torch

    from segpipe.inference.device import resolve_precision

    if not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} cannot use the GPU of a node",
            os.uname().nodename,
            "Its driver may be too old for this torch: look at `nvidia-smi` there.",
        )
    return resolve_precision("cuda:0")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a run may use: this machine, or the nodes of a Ray cluster."""

    nodes: int
    cpus: int
    """CPUs of all nodes together."""
    gpus: int
    gpu_precision: Callable[[], str] = gpu_precision
    """Asks a GPU what ``precision: auto`` means on it; on a cluster this may wait for the work of others."""
    cpus_per_node: int = 0
    """Fewest CPUs of a node that may hold a worker; 0 = ``cpus``."""
    gpus_per_node: int = 0
    """Most GPUs of a node; 0 = ``gpus``."""
    least_cpus: int = 0
    """Fewest CPUs of any node; 0 = ``cpus_per_node``."""

    def without_gpus(self) -> Hardware:
        """The same nodes for work that needs no GPU."""
        return Hardware(self.nodes, self.cpus, 0, cpus_per_node=self.least_cpus or self.cpus_per_node)


@dataclass(frozen=True, slots=True)
class Pool:
    """The fixed pool of workers, and what each of them reserves."""

    workers: int
    cpus_per_worker: float
    """CPUs that Ray sets aside for a worker; its threads are another number."""
    gpus_per_worker: int
    threads_per_worker: int


def this_machine() -> Hardware:
    """Return the CPUs that this process may use; GPUs are asked of torch only where a driver is loaded."""
    cpus, gpus = usable_cpus(), 0
    if os.path.exists("/proc/driver/nvidia"):
        import torch

        gpus = torch.cuda.device_count()
    return Hardware(nodes=1, cpus=cpus, gpus=gpus)


def plan_pool(hardware: Hardware, config: SegpipeConfig) -> Pool:
    """Size the worker pool so that planning and report tasks always find a free CPU.

    One worker per GPU where there are any, else one per node. n workers reserve (CPUs - 1) / n each, so that
    the pool can never starve the tasks that feed it. Raises ConfigError for more workers than GPUs.
    """
    cluster = config.cluster
    asked = None if cluster.workers == "auto" else cluster.workers
    local = cluster.executor == "local"
    if local and asked not in (None, 1):
        raise ConfigError(
            f"executor: local runs one worker, not {asked}",
            "cluster.workers",
            "Leave it out, or use executor: ray.",
        )
    if asked is not None and hardware.gpus and asked > hardware.gpus:
        raise ConfigError(
            f"{asked} workers, but the cluster has {hardware.gpus} GPUs",
            "cluster.workers",
            f"Ask for at most {hardware.gpus}.",
        )
    workers = asked or (1 if local else hardware.gpus or max(1, hardware.nodes))
    reserved, threads = share_of_node(hardware, workers, spare_cpus=1)
    if cluster.threads_per_worker != "auto":
        threads = cluster.threads_per_worker
    return Pool(workers, reserved, 1 if hardware.gpus else 0, threads)


def share_of_node(hardware: Hardware, workers: int, *, spare_cpus: float) -> tuple[float, int]:
    """Return the CPUs that each of so many workers may reserve, and its threads, at least 1.

    The CPUs are a whole number, or thousandths up to 1; all workers leave ``spare_cpus`` free.
    """
    node_cpus = hardware.cpus_per_node or hardware.cpus
    workers_per_node = -(-workers // max(1, hardware.nodes))
    if hardware.gpus:
        workers_per_node = min(workers, hardware.gpus_per_node or hardware.gpus)
    # A worker that asked for more than its share of the smallest node might never find a place.
    reserved = max(0.0, min((hardware.cpus - spare_cpus) / workers, node_cpus / workers_per_node))
    # Ray keeps four decimals of a CPU: rounding down keeps the sum below the limit.
    whole = float(int(reserved)) if reserved > 1 else int(reserved * 1000) / 1000
    return whole, max(1, node_cpus // workers_per_node)


def resolve_facts(config: SegpipeConfig, card: ModelCard, hardware: Hardware, pool: Pool) -> Facts:
    """Return what ``auto`` becomes on this hardware with this model. Raises ConfigError."""
    asked = config.inference
    device = "cuda" if hardware.gpus else "cpu"
    tile_px = card.tile_px if asked.tile_px == "auto" else asked.tile_px
    if 4 * asked.margin_px > tile_px:
        raise ConfigError(
            f"{asked.margin_px} is more than a quarter of tile_px ({tile_px})",
            "inference.margin_px",
            f"Use at most {tile_px // 4}.",
        )
    precision: str = asked.precision
    if precision == "auto":
        precision = hardware.gpu_precision() if device == "cuda" else "fp32"
    if precision == "fp16" and device == "cpu":
        raise ConfigError("fp16 needs a GPU", "inference.precision", "Use fp32 or auto.")
    unit_px = asked.unit_px
    if unit_px == "auto":
        unit_px = GPU_UNIT_PX if device == "cuda" else CPU_UNIT_PX
    batch_size = asked.batch_size
    if batch_size == "auto":
        batch_size = CUDA_BATCH if device == "cuda" else CPU_BATCH
    return Facts(
        tile_px=tile_px,
        margin_px=asked.margin_px,
        block_px=asked.block_px,
        unit_px=unit_px,
        blend=asked.blend,
        batch_size=batch_size,
        threads_per_worker=pool.threads_per_worker,
        precision=precision,
        compile=asked.compile,
        device=device,
    )


def mask_facts(config: SegpipeConfig, masks: Facts) -> Facts:
    """Return the facts of a run that scores masks: cells as they were made, blocks and units cut anew."""
    unit_px = CPU_UNIT_PX if config.inference.unit_px == "auto" else config.inference.unit_px
    return replace(masks, block_px=config.inference.block_px, unit_px=unit_px, device="cpu")


def check_facts(
    facts: Facts, config: SegpipeConfig, hardware: Hardware, where: str, *, of_masks: bool = False
) -> None:
    """Refuse a later start of a run that contradicts its facts, or that cannot keep them (exit 2).

    ``of_masks``: the run scores finished masks, so that only the cut into blocks and units is its own.
    """
    names = _CUT_FACTS if of_masks else _ALL_FACTS
    asked: dict[str, object] = {name: getattr(config.inference, name) for name in names}
    if not of_masks:
        asked["threads_per_worker"] = config.cluster.threads_per_worker
    for name, value in asked.items():
        kept = getattr(facts, name)
        default = type(config.inference).model_fields[name].default if of_masks else "auto"
        if value not in ("auto", default, kept):
            raise ConfigError(
                f"{name} is {value} here, but the run was started with {kept}",
                where,
                "Leave it out to go on with the run, or choose another --output.",
            )
    if facts.device == "cuda" and not hardware.gpus:
        raise ConfigError(
            "the run was started on GPUs and there is none here, so its masks could not stay the same",
            where,
            "Go on where there is a GPU, or choose another --output.",
        )
    if facts.device == "cpu" and hardware.gpus:
        raise ConfigError(
            "the run was started on CPUs and would go on with GPUs, so its masks could not stay the same",
            where,
            "Hide the GPUs (CUDA_VISIBLE_DEVICES=) to go on, or choose another --output.",
        )


def units_per_task(num_units: int, mean_unit_px: float, workers: int) -> int:
    """Return how many units one Ray task computes: seconds of work, but enough tasks for every worker."""
    by_px = max(1, round(_TASK_PX / max(1.0, mean_unit_px)))
    by_share = max(1, -(-num_units // (4 * workers)))
    return min(by_px, by_share, _MAX_UNITS_PER_TASK)
