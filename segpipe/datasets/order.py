"""The order of training samples: a pure function of (seed, epoch, global batch). No torch, no I/O.

Groups of samples (row groups) are permuted; then samples are permuted within windows of consecutive groups,
so that a reader holds a few windows, whatever the size of the data set. Position p of an epoch belongs
to step p // B and to lane p % B of the global batch B; worker r of w takes the lanes r, r + w, ... The short
last batch is filled with samples from the epoch's start that count for nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

WINDOW_GROUPS: Final = 8
"""Groups whose samples are mixed, at least."""


@dataclass(frozen=True, slots=True)
class LaneBatch:
    """One global batch: what each lane sees, (B,) arrays."""

    groups: Array
    """int64: number of the group."""
    rows: Array
    """int64: row within the group."""
    real: Array
    """bool: false where the lane is filled with a repeat of weight 0."""


class SampleOrder:
    """The order of ``sum(group_samples)`` samples for all epochs; holds memory for one epoch's groups."""

    def __init__(self, group_samples: Sequence[int], seed: int, global_batch: int) -> None:
        """``group_samples``: how many samples each group has, in data set order (all at least 1)."""
        sizes = np.asarray(group_samples, np.int64)
        if sizes.size == 0 or sizes.min() < 1 or global_batch < 1:
            raise ValueError("an order needs groups of at least one sample and a batch of at least one")
        self._sizes = sizes
        self.seed, self.global_batch = seed, global_batch
        self.samples = int(sizes.sum())
        self.steps_per_epoch = -(-self.samples // global_batch)
        per_group = max(1.0, self.samples / sizes.size)
        self.window_groups = max(WINDOW_GROUPS, int(np.ceil(2 * global_batch / per_group)))
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of a step counted from the start of training."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, epoch: int, step: int) -> LaneBatch:
        """The global batch of a step of an epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} of an epoch of {self.steps_per_epoch}")
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        real = positions < self.samples
        groups, rows = self._at(epoch, positions % self.samples)
        return LaneBatch(groups, rows, real)

    def windows(self, epoch: int, step: int) -> tuple[int, int]:
        """First and last window that a step's positions, without its repeats, lie in."""
        _, starts = self._epoch(epoch)
        first = step * self.global_batch
        last = min(first + self.global_batch, self.samples) - 1
        low, high = np.searchsorted(starts, (first, last), side="right") - 1
        return int(low), int(high)

    def groups_of_window(self, epoch: int, window: int) -> list[int]:
        """Numbers of a window's groups; empty after the epoch's last window."""
        order, _ = self._epoch(epoch)
        return order[window * self.window_groups : (window + 1) * self.window_groups].tolist()

    def groups_of_lanes(self, epoch: int, window: int, lanes: range) -> list[int]:
        """Those of a window's groups with a sample of these lanes; empty after the epoch's last window."""
        groups = self.groups_of_window(epoch, window)
        if not groups:
            return []
        _, starts = self._epoch(epoch)
        all_groups, _ = self._window(epoch, window)
        lane = (starts[window] + np.arange(len(all_groups))) % self.global_batch
        needed = set(all_groups[np.isin(lane, lanes)].tolist())
        return [group for group in groups if group in needed]

    def _at(self, epoch: int, positions: Array) -> tuple[Array, Array]:
        """(group, row) at some positions of an epoch."""
        _, starts = self._epoch(epoch)
        windows = np.searchsorted(starts, positions, side="right") - 1
        groups, rows = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        for window in np.unique(windows).tolist():
            chosen = windows == window
            all_groups, all_rows = self._window(epoch, window)
            inside = positions[chosen] - starts[window]
            groups[chosen], rows[chosen] = all_groups[inside], all_rows[inside]
        return groups, rows

    def _make_epoch(self, epoch: int) -> tuple[Array, Array]:
        """Groups of the epoch in their order, and the first position of each window."""
        order = permutation(len(self._sizes), self.seed, epoch, "groups")
        ends = np.cumsum(self._sizes[order])
        last = np.arange(self.window_groups, len(order), self.window_groups) - 1
        return order, np.concatenate(([0], ends[last]))

    def _make_window(self, epoch: int, window: int) -> tuple[Array, Array]:
        """(group, row) of each position of a window."""
        order, _ = self._epoch(epoch)
        groups = order[window * self.window_groups : (window + 1) * self.window_groups]
        sizes = self._sizes[groups]
        all_groups = np.repeat(groups, sizes)
        all_rows = np.arange(len(all_groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        mixed = permutation(len(all_groups), self.seed, epoch, f"window {window}")
        return all_groups[mixed], all_rows[mixed]


def lanes_of(rank: int, world: int, global_batch: int) -> range:
    """The lanes of worker ``rank`` of ``world``."""
    return range(rank, global_batch, world)


def permutation(count: int, *key: int | str) -> Array:
    """A permutation of 0 .. count - 1, int64 (count,), that depends on ``key`` alone.

    It sorts raw words of a counter-based generator (Philox4x64-10, Salmon et al. 2011), whose stream numpy
    keeps; the ways in which numpy draws permutations may change.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)
    return np.argsort(words, kind="stable")
