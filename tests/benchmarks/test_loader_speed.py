"""Threads or processes: who decodes and augments faster, alone and beside a training.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_loader_speed.py
The threads are those of ``segpipe train``; the processes are the workers of torch's DataLoader with the same
order, reading, decoding and augmentation. Both have two, and take turns; no time is asserted.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training_speed import (
    BATCH,
    CORES,
    IMAGE_PX,
    IMAGES,
    make_stepper,
    prepare,
    seconds_a_step,
    stream_of,
    train_config,
    write_images,
)
from torch.utils.data import DataLoader, Dataset

from segpipe.config.train import TrainConfig
from segpipe.datasets.augment import augment, rng_of
from segpipe.datasets.batches import TrainBatch, decode_sample
from segpipe.datasets.groups import EncodedSample, GroupReader
from segpipe.datasets.order import SampleOrder
from segpipe.datasets.prepared import PreparedDataset, open_dataset
from segpipe.inference.memory import keep_freed_pages

pytestmark = pytest.mark.benchmark

ROUNDS = 2
BATCHES = 60

Item = tuple[int, int, int]
"""(epoch, group, row)."""


class Samples(Dataset[tuple[Any, Any]]):
    """The same samples for a DataLoader; each of its processes keeps the groups that it has read."""

    def __init__(self, dataset: PreparedDataset, config: TrainConfig) -> None:
        self._dataset, self._config = dataset, config.data
        self._groups = dataset.groups(config.data.train_splits)
        self._reader: GroupReader | None = None  # each process makes its own
        self._read: dict[int, list[EncodedSample]] = {}

    def __getitem__(self, item: Item) -> tuple[Any, Any]:
        epoch, group, row = item
        self._reader = self._reader or GroupReader(self._dataset)
        if group not in self._read:
            self._read[group] = self._reader.read(self._groups[group])
        sample, dataset = self._read[group][row], self._dataset
        pixels, _, label = decode_sample(sample, dataset, "")
        rng = rng_of(0, epoch, sample.sample_id)
        return augment(pixels, label, self._config.augment, dataset.mean, dataset.std, rng)


def batches_of_items(dataset: PreparedDataset, config: TrainConfig, first_step: int) -> Iterator[list[Item]]:
    order = SampleOrder([group.samples for group in dataset.groups(config.data.train_splits)], 0, BATCH)
    for step in itertools.count(first_step):
        epoch, inner = order.place(step)
        batch = order.batch(epoch, inner)
        yield [(epoch, int(group), int(row)) for group, row in zip(batch.groups, batch.rows, strict=True)]


class Steps(torch.utils.data.Sampler[list[Item]]):
    def __init__(self, dataset: PreparedDataset, config: TrainConfig, first_step: int) -> None:
        self._items = (dataset, config, first_step)

    def __iter__(self) -> Iterator[list[Item]]:
        return batches_of_items(*self._items)


@contextmanager
def by_threads(dataset: PreparedDataset, config: TrainConfig, first: int) -> Iterator[Iterator[TrainBatch]]:
    with stream_of(config, dataset, first) as stream, closing(iter(stream)) as batches:  # type: ignore[type-var]
        yield batches


@contextmanager
def by_processes(dataset: PreparedDataset, config: TrainConfig, first: int) -> Iterator[Iterator[TrainBatch]]:
    loader = DataLoader(
        Samples(dataset, config),
        batch_sampler=Steps(dataset, config, first),
        num_workers=CORES,
        prefetch_factor=max(1, config.data.prefetch_batches // CORES),
        multiprocessing_context="forkserver",  # the process has threads already
    )
    yield (as_batch(images, labels) for images, labels in loader)


def as_batch(images: torch.Tensor, labels: torch.Tensor) -> TrainBatch:
    real = torch.ones(len(images), dtype=torch.bool)
    return TrainBatch(0, 0, images, labels.long(), real, tuple(range(len(images))), ())


def samples_per_s(batches: Iterable[TrainBatch]) -> float:
    """Rate of BATCHES batches after the first ten, nothing else running."""
    taken = itertools.islice(batches, 10 + BATCHES)
    for number, _ in enumerate(taken):
        if number == 9:
            begin = time.perf_counter()
    return BATCHES * BATCH / (time.perf_counter() - begin)


def test_threads_against_processes(tmp_path: Path) -> None:
    keep_freed_pages()
    torch.set_num_threads(CORES)
    config = train_config(
        prepare(write_images(tmp_path, IMAGES, IMAGE_PX), str(tmp_path / "data")), tmp_path / "out"
    )
    dataset, stepper = open_dataset(config.data.uri), make_stepper(config)
    ways: dict[str, Any] = {"threads": by_threads, "processes": by_processes}
    check_same_batches(dataset, config, ways)
    seen: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    for number, (way, make) in itertools.product(range(ROUNDS), ways.items()):
        begin = time.perf_counter()
        source: AbstractContextManager[Iterator[TrainBatch]] = make(dataset, config, 200 * number)
        with source as batches:
            next(batches)
            first_s = time.perf_counter() - begin
            rate = samples_per_s(batches)
            step_s, _ = seconds_a_step(stepper, batches)
        for name, value in (("first batch, s", first_s), ("samples/s alone", rate), ("s a step", step_s)):
            seen[way].setdefault(name, []).append(value)
        print(f"\n{way}: first batch after {first_s:.2f} s, {rate:.1f} samples/s alone, "
              f"{step_s:.3f} s a training step", end="", flush=True)  # fmt: skip
    for name in seen["threads"]:
        ratios = [a / b for a, b in zip(seen["threads"][name], seen["processes"][name], strict=True)]
        print(f"\n{name}: threads / processes {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f})", end="")  # fmt: skip
    print()


def check_same_batches(dataset: PreparedDataset, config: TrainConfig, ways: dict[str, Any]) -> None:
    firsts = []
    for make in ways.values():
        with make(dataset, config, 0) as batches:
            firsts.append(next(batches))
    assert np.array_equal(firsts[0].images.numpy(), firsts[1].images.numpy())
    assert np.array_equal(firsts[0].labels.numpy(), firsts[1].labels.numpy())
