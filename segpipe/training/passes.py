"""How a worker's share of a step becomes forward passes, and whether batch norm can learn from them."""

from __future__ import annotations

from itertools import pairwise

import torch

from segpipe.config.card import ModelCard
from segpipe.config.train import StepsConfig, TrainConfig
from segpipe.errors import ConfigError
from segpipe.models.file import empty_model
from segpipe.wording import counted


def passes(lanes: int, micro_batch: int | None) -> list[tuple[int, int]]:
    """Start and stop of each pass: at most ``micro_batch`` lanes, in sizes that differ by at most one."""
    count = -(-lanes // (micro_batch or lanes))
    bounds = [lanes * number // count for number in range(count + 1)]
    return list(pairwise(bounds))


def check_passes(config: TrainConfig, card: ModelCard, least: int, most: int) -> None:
    """Raise `ConfigError` where a pass would hold one sample, of which the network's batch norm cannot learn.

    So it is where a layer sees the whole crop as one pixel: DeepLabV3's image pooling, for one. Every number
    of workers from ``least`` to ``most`` is looked at: fewer may cut their larger shares into smaller passes.
    """
    steps, crop_px = config.train, config.data.augment.crop_px
    if steps.batch_norm == "frozen":
        return
    together = [
        _smallest(steps, workers) * (workers if steps.batch_norm == "sync" else 1)
        for workers in range(least, most + 1)
    ]
    if 1 not in together:
        return
    network = empty_model(card, "model").train()
    try:
        network(torch.empty(1, len(card.bands), crop_px, crop_px, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        with_workers = f" (with {counted(least + together.index(1), 'worker')})" if most > 1 else ""
        where = "train.micro_batch" if steps.micro_batch else "train.global_batch"
        raise ConfigError(
            f"a pass of one {crop_px} px crop is too small for the batch norm of {card.family}{with_workers}",
            where,
            "Give each worker two samples a pass at least, or set train.batch_norm to frozen.",
        ) from None


def _smallest(steps: StepsConfig, workers: int) -> int:
    """Samples of the smallest pass; each worker's share is filled up to the largest."""
    share = -(-steps.global_batch // workers)
    return min(stop - start for start, stop in passes(share, steps.micro_batch))
