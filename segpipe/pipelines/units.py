"""Names of many units in little memory: a driver holds millions of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Unit = tuple[int, int]
"""(part, unit)."""


@dataclass(frozen=True, slots=True)
class PartUnits:
    """Some units of one part, in order."""

    part: int
    units: Any
    """int32 (n,)."""

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[Unit]:
        return ((self.part, unit) for unit in self.units.tolist())

    def split(self, size: int) -> Iterator[PartUnits]:
        """Cut into pieces of at most ``size`` units."""
        for start in range(0, len(self.units), size):
            yield PartUnits(self.part, self.units[start : start + size])
