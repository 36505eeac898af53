"""Work by threads over long streams."""

from __future__ import annotations

import pytest

from segpipe.threads import map_in_order


def test_results_come_in_order_and_few_are_under_way() -> None:
    begun: list[int] = []

    def square(number: int) -> int:
        begun.append(number)
        return number**2

    for done, result in enumerate(map_in_order(square, range(200), threads=3)):
        assert result == done**2
        assert len(begun) <= done + 12


def test_the_first_error_ends_the_work() -> None:
    begun: list[int] = []

    def fail(number: int) -> int:
        begun.append(number)
        raise KeyError(number)

    with pytest.raises(KeyError):
        list(map_in_order(fail, range(1000), threads=2))
    assert len(begun) < 20
