"""Names of many units in little memory: a driver holds millions of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.masks.plan import part_num_units
from segpipe.masks.run import done_units, list_parts
from segpipe.storage import Storage

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


def missing_units(storage: Storage) -> tuple[list[PartUnits], int]:
    """Return the planned units without an object, and how many units are planned."""
    missing: list[PartUnits] = []
    total = 0
    for part in list_parts(storage):
        num_units = part_num_units(storage, part)
        done = done_units(storage, part, num_units)
        absent = np.flatnonzero(np.frombuffer(done, np.uint8) == 0).astype(np.int32)
        if len(absent):
            missing.append(PartUnits(part, absent))
        total += num_units
    return missing, total
