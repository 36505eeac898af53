"""Scores a network on whole images, by the engine and the geometry of ``segpipe predict``."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from segpipe.config.card import ModelCard
from segpipe.config.train import ValidationConfig
from segpipe.datasets.batches import ImageSlice
from segpipe.datasets.prepared import PreparedDataset
from segpipe.geometry.grid import make_grid
from segpipe.inference.device import default_batch_size, resolve_precision
from segpipe.inference.engine import BlockResult, Engine, EngineConfig
from segpipe.metrics import Scores, confusion
from segpipe.training.comm import Comm

Array = np.ndarray[Any, Any]

_WHOLE_IMAGE_PX: Final = 1 << 30
_IMAGES_IN_FLIGHT: Final = 4


def count_images(
    model: nn.Module,
    card: ModelCard,
    dataset: PreparedDataset,
    config: ValidationConfig,
    comm: Comm,
    device: str,
    threads: int,
) -> Array:
    """Confusion counts (C, C) int64 of all images of the splits, each counted once, on every worker.

    ``model`` is copied and left in eval mode. Every tile has the same batch shape, so that the counts do not
    depend on how the images fall to workers.
    """
    precision = resolve_precision(device)
    engine = Engine(
        model.eval(),
        card,
        EngineConfig(
            tile_px=config.tile_px,
            batch_size=default_batch_size(device),
            threads=threads,
            precision=precision,
            device=device,
        ),
    )
    counts = np.zeros((card.num_classes, card.num_classes), np.int64)
    waiting: deque[tuple[Array, Future[BlockResult]]] = deque()
    try:
        engine.start()
        for _, sample in ImageSlice(dataset, config.splits, comm.rank, comm.world):
            height, width = sample.label.shape
            grid = make_grid(
                height,
                width,
                tile_px=config.tile_px,
                margin_px=config.margin_px,
                block_px=_WHOLE_IMAGE_PX,
            )
            result = engine.submit(sample.pixels, sample.valid, grid.block(0).tiles)
            waiting.append((sample.label, result))
            if len(waiting) > _IMAGES_IN_FLIGHT:
                counts += _counted(*waiting.popleft(), card.num_classes)
        while waiting:
            counts += _counted(*waiting.popleft(), card.num_classes)
    finally:
        engine.close()
        torch.set_num_threads(threads)  # the engine's threads set parts of it for the whole process
    total = torch.from_numpy(counts).to(device)
    return comm.all_reduce(total).cpu().numpy()


def metric_of(scores: Scores, metric: str, card: ModelCard) -> float | None:
    """The score that chooses the best weights; None where it is undefined."""
    name, colon, class_name = metric.partition(":")
    if not colon:
        value: float | None = scores.overall()[name]
        return value
    names = [info.name for info in card.classes]
    return scores.iou[names.index(class_name)]


def _counted(label: Array, result: Future[BlockResult], num_classes: int) -> Array:
    return confusion(label, result.result().mask, num_classes)
