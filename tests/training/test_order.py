from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.datasets.order import SampleOrder, lanes_of, permutation

sizes = st.lists(st.integers(1, 16), min_size=1, max_size=60)


def epoch_of(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    found = []
    for step in range(order.steps_per_epoch):
        batch = order.batch(epoch, step)
        found += list(zip(batch.groups[batch.real].tolist(), batch.rows[batch.real].tolist(), strict=True))
    return found


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 2**40), st.integers(1, 40), st.integers(0, 3))
def test_every_sample_comes_once_an_epoch(
    group_samples: list[int], seed: int, batch: int, epoch: int
) -> None:
    order = SampleOrder(group_samples, seed, batch)
    wanted = [(group, row) for group, size in enumerate(group_samples) for row in range(size)]
    assert sorted(epoch_of(order, epoch)) == wanted
    assert order.steps_per_epoch == -(-len(wanted) // batch)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 8))
def test_every_lane_has_one_worker(global_batch: int, world: int) -> None:
    lanes = [lane for rank in range(world) for lane in lanes_of(rank, world, global_batch)]
    assert sorted(lanes) == list(range(global_batch))


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 20), st.integers(1, 5), st.integers(0, 2))
def test_each_worker_is_told_the_groups_of_its_lanes_and_no_other(
    group_samples: list[int], global_batch: int, world: int, epoch: int
) -> None:
    order = SampleOrder(group_samples, 9, global_batch)
    windows = -(-len(group_samples) // order.window_groups)
    assert order.groups_of_lanes(epoch, windows, range(global_batch)) == []
    for rank in range(world):
        lanes = lanes_of(rank, world, global_batch)
        told = [group for window in range(windows) for group in order.groups_of_lanes(epoch, window, lanes)]
        needed = set()
        for step in range(order.steps_per_epoch):
            batch = order.batch(epoch, step)
            needed |= {int(batch.groups[lane]) for lane in lanes if batch.real[lane]}
        assert len(told) == len(set(told))
        assert set(told) == needed


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(1, 9))
def test_a_batch_does_not_depend_on_what_was_asked_before(group_samples: list[int], batch: int) -> None:
    order = SampleOrder(group_samples, 3, batch)
    last = order.steps_per_epoch - 1
    fresh = SampleOrder(group_samples, 3, batch).batch(1, last)
    epoch_of(order, 0)
    again = order.batch(1, last)
    assert fresh.groups.tolist() == again.groups.tolist()
    assert fresh.rows.tolist() == again.rows.tolist()


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert permutation(8, 7, 0, "groups").tolist() == [6, 7, 0, 2, 5, 3, 1, 4]
    batch = SampleOrder([3, 2, 4], 7, 4).batch(0, 2)
    assert batch.real.tolist() == [True, False, False, False]


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_of(SampleOrder([16] * 10, seed, 8), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_samples_are_mixed_within_windows_only() -> None:
    order = SampleOrder([16] * 64, 1, 8)
    for window in range(8):
        groups = set(order.groups_of_window(0, window))
        steps = range(window * 16, (window + 1) * 16)
        assert {group for step in steps for group in order.batch(0, step).groups.tolist()} == groups
    assert order.windows(0, 15) == (0, 0)
    assert order.windows(0, 16) == (1, 1)
    assert order.groups_of_window(0, 8) == []


def test_a_wide_batch_widens_the_windows() -> None:
    assert SampleOrder([16] * 64, 1, 256).window_groups == 32


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SampleOrder([], 0, 1)
    with pytest.raises(ValueError, match="step 1 of an epoch of 1"):
        SampleOrder([2], 0, 4).batch(0, 1)
    assert np.unique(permutation(1000, 1)).size == 1000
