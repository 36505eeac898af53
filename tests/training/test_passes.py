"""How a worker's share is cut into forward passes."""

from __future__ import annotations

import pytest

from segpipe.training.passes import passes


@pytest.mark.parametrize(
    ("lanes", "micro_batch", "sizes"),
    [
        (8, None, [8]),
        (8, 8, [8]),
        (8, 20, [8]),
        (8, 4, [4, 4]),
        (4, 3, [2, 2]),
        (7, 3, [2, 2, 3]),
        (3, 1, [1, 1, 1]),
        (1, None, [1]),
    ],
)
def test_passes_are_as_few_and_as_even_as_can_be(
    lanes: int, micro_batch: int | None, sizes: list[int]
) -> None:
    found = passes(lanes, micro_batch)
    assert [stop - start for start, stop in found] == sizes
    assert [place for start, stop in found for place in range(start, stop)] == list(range(lanes))
