"""Streams of training batches: shards are read, decoded and augmented in threads, ahead of the step."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from segpipe.config.card import IGNORE
from segpipe.config.train import DataConfig
from segpipe.datasets.augment import augment, rng_of
from segpipe.datasets.groups import REPLACE_SHARD, EncodedSample, GroupReader
from segpipe.datasets.images import STORED_LIMITS, decode_image
from segpipe.datasets.order import LaneBatch, SampleOrder, lanes_of
from segpipe.datasets.prepared import GroupRef, PreparedDataset
from segpipe.errors import InputError, SceneError
from segpipe.masks.codec import DamagedMask, decode_mask
from segpipe.wording import counted

Array = np.ndarray[Any, Any]

_READ_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One worker's share of a global batch."""

    step: int
    """Counted from the start of training."""
    epoch: int
    images: Tensor
    """float32 (b, bands, H, W), normalised."""
    labels: Tensor
    """int64 (b, H, W), 255 = ignored; all ignored where the lane is not real."""
    real: Tensor
    """bool (b,)."""
    lanes: tuple[int, ...]
    sample_ids: tuple[str, ...]


class BatchStream:
    """The batches of steps ``first_step`` to ``stop_step - 1`` for one worker, in order.

    Holds the encoded samples of three windows of the order, ``prefetch_batches`` ready batches and decoded
    samples of at most ``cache_bytes``, however many shards there are. A fault of a thread is raised by the
    iteration. Close it, or use it as a context.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        first_step: int,
        stop_step: int,
        threads: int,
    ) -> None:
        self._dataset, self._config, self._seed = dataset, config, seed
        self._groups = dataset.groups(config.train_splits)
        self.order = SampleOrder([group.samples for group in self._groups], seed, global_batch)
        self._lanes = lanes_of(rank, world, global_batch)
        self._steps = range(first_step, stop_step)
        self._cache = _GroupCache(GroupReader(dataset), self._groups, 3 * self.order.window_groups)
        self._kept = _KeptSamples(config.cache_bytes)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="segpipe-samples")

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[TrainBatch]:
        waiting: deque[tuple[int, LaneBatch, list[Future[_Ready]]]] = deque()
        for step in self._steps:
            waiting.append(self._submit(step))
            if len(waiting) > self._config.prefetch_batches:
                yield self._collate(*waiting.popleft())
        while waiting:
            yield self._collate(*waiting.popleft())

    def close(self) -> None:
        """Stop the threads; what they have not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)
        self._cache.close()

    def _submit(self, step: int) -> tuple[int, LaneBatch, list[Future[_Ready]]]:
        epoch, inner = self.order.place(step)
        self._read_ahead(epoch, inner)
        batch = self.order.batch(epoch, inner)
        places = ((int(batch.groups[lane]), int(batch.rows[lane])) for lane in self._lanes)
        # Each sample holds its group's reading: a group that is dropped from the cache is not read again.
        ready = [
            self._pool.submit(self._make, epoch, group, row, self._cache.begin(group))
            for group, row in places
        ]
        return step, batch, ready

    def _read_ahead(self, epoch: int, inner: int) -> None:
        """Begin to read what this worker needs of the step's windows and the next, so that no step waits."""
        first, last = self.order.windows(epoch, inner)
        for window in range(last + 1, first - 1, -1):  # what is needed first is kept longest
            place = epoch, window
            if not self.order.groups_of_window(epoch, window):  # the next epoch's first window
                if not self._goes_on(epoch):
                    continue
                place = epoch + 1, 0
            for group in self.order.groups_of_lanes(*place, self._lanes):
                self._cache.begin(group)

    def _goes_on(self, epoch: int) -> bool:
        return (epoch + 1) * self.order.steps_per_epoch < self._steps.stop

    def _make(self, epoch: int, group: int, row: int, read: Future[list[EncodedSample]]) -> _Ready:
        sample, dataset = read.result()[row], self._dataset
        found = self._kept.get(group, row)
        if found is None:
            where = f"{self._groups[group].shard_key}: sample {sample.sample_id}"
            decoded = decode_sample(sample, dataset, where)
            found = decoded.filled(dataset.mean), decoded.label
            self._kept.add(group, row, found)
        rng = rng_of(self._seed, epoch, sample.sample_id)
        image, target = augment(*found, self._config.augment, dataset.mean, dataset.std, rng)
        return sample.sample_id, image, target

    def _collate(self, step: int, batch: LaneBatch, ready: list[Future[_Ready]]) -> TrainBatch:
        samples = [future.result() for future in ready]
        real = torch.from_numpy(batch.real[list(self._lanes)])
        labels = torch.from_numpy(np.stack([label for _, _, label in samples])).long()
        labels[~real] = IGNORE
        return TrainBatch(
            step=step,
            epoch=self.order.place(step)[0],
            images=torch.from_numpy(np.stack([image for _, image, _ in samples])),
            labels=labels,
            real=real,
            lanes=tuple(self._lanes),
            sample_ids=tuple(sample_id for sample_id, _, _ in samples),
        )


_Ready = tuple[str, Array, Array]


class DecodedSample(NamedTuple):
    """What is in a shard for one sample."""

    pixels: Array
    """(bands, h, w)."""
    valid: Array | None
    """bool (h, w), false = no data; None = all are data."""
    label: Array
    """uint8 (h, w)."""

    def filled(self, mean: Sequence[float]) -> Array:
        """The pixels with the band mean where there is no data: what `segpipe predict` puts there."""
        if self.valid is None:
            return self.pixels
        dtype = self.pixels.dtype
        values = np.asarray(mean) if dtype.kind == "f" else np.rint(mean)
        return np.where(self.valid, self.pixels, values.astype(dtype)[:, None, None])


def decode_sample(sample: EncodedSample, dataset: PreparedDataset, where: str) -> DecodedSample:
    """Decode a sample of a shard.

    Raises `InputError` that names the sample: it cannot be decoded, it has other bands or another size than
    its label, or a label that no class has.
    """
    fix = REPLACE_SHARD
    try:
        image = decode_image(sample.image, where, STORED_LIMITS)
        label = decode_mask(sample.label)
    except SceneError as error:
        raise InputError(f"the image cannot be used ({error.what})", where, fix) from error
    except DamagedMask as error:
        raise InputError(f"the label cannot be decoded ({error.what})", where, fix) from error
    pixels = image.pixels
    if len(pixels) != dataset.bands:
        raise InputError(f"the image has {counted(len(pixels), 'band')}, not {dataset.bands}", where, fix)
    if label.shape != pixels.shape[1:]:
        raise InputError(f"the label is {label.shape}, the image {pixels.shape[1:]}", where, fix)
    used = np.flatnonzero(np.bincount(label.ravel(), minlength=256)[:IGNORE])
    if used.size and used[-1] >= len(dataset.classes):
        raise InputError(
            f"the label holds the value {used[-1]}, the data set has classes 0 to {len(dataset.classes) - 1}",
            where,
            fix,
        )
    return DecodedSample(pixels, image.valid, label)


class ImageSlice:
    """The whole images of some splits that fall to one worker: number i goes to worker i % world."""

    def __init__(
        self, dataset: PreparedDataset, splits: tuple[str, ...], rank: int, world: int, threads: int = 2
    ) -> None:
        self._dataset, self._rank, self._world, self._threads = dataset, rank, world, threads
        self._groups = dataset.groups(splits)

    def __iter__(self) -> Iterator[tuple[str, DecodedSample]]:
        """Yield sample ids and samples in data set order, some read ahead."""
        reader = GroupReader(self._dataset)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="segpipe-images") as pool:
            waiting: deque[Future[tuple[str, DecodedSample]]] = deque()
            try:
                for group, rows in self._mine():
                    # Read before its samples are decoded: the pool takes what came first.
                    read = pool.submit(reader.read, group)
                    for row in rows:
                        waiting.append(pool.submit(self._decode, group, row, read))
                        if len(waiting) > 2 * self._threads:
                            yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _mine(self) -> Iterator[tuple[GroupRef, list[int]]]:
        """Groups that hold images of this worker, with their rows."""
        start = 0
        for group in self._groups:
            rows = [row for row in range(group.samples) if (start + row) % self._world == self._rank]
            start += group.samples
            if rows:
                yield group, rows

    def _decode(
        self, group: GroupRef, row: int, read: Future[list[EncodedSample]]
    ) -> tuple[str, DecodedSample]:
        sample = read.result()[row]
        where = f"{group.shard_key}: sample {sample.sample_id}"
        return sample.sample_id, decode_sample(sample, self._dataset, where)


class _KeptSamples:
    """A cache of decoded samples that fills once and evicts nothing: all are used equally often."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._samples: dict[tuple[int, int], tuple[Array, Array]] = {}
        self._lock = threading.Lock()

    def get(self, group: int, row: int) -> tuple[Array, Array] | None:
        return self._samples.get((group, row))

    def add(self, group: int, row: int, sample: tuple[Array, Array]) -> None:
        size_bytes = sum(array.nbytes for array in sample)
        with self._lock:
            if (group, row) not in self._samples and self._bytes + size_bytes <= self._most_bytes:
                self._samples[group, row] = sample
                self._bytes += size_bytes


class _GroupCache:
    """Groups that are read or being read; the longest unused one goes first."""

    def __init__(self, reader: GroupReader, groups: tuple[GroupRef, ...], most: int) -> None:
        self._reader, self._refs, self._most = reader, groups, most
        self._groups: OrderedDict[int, Future[list[EncodedSample]]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="segpipe-shards")

    def begin(self, group: int) -> Future[list[EncodedSample]]:
        """Begin to read a group unless it is here, and keep it longest."""
        with self._lock:
            future = self._groups.get(group)
            if future is None or future.cancelled():
                future = self._groups[group] = self._pool.submit(self._reader.read, self._refs[group])
                if len(self._groups) > self._most:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return future

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
