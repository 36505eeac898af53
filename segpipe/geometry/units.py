"""Packing of blocks into units: the pieces that are computed, written and resumed as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_UNIT_ROWS = 256
"""Most blocks of one unit, so that a unit of tiny scenes stays a small object."""


@dataclass(frozen=True, slots=True)
class UnitSpan:
    """Which units of its part a scene takes: ``first_unit`` and how many."""

    first_unit: int
    num_units: int


@dataclass(slots=True)
class UnitPacker:
    """Packs the scenes of one part, in plan order, into units.

    A unit is closed when the next block would pass ``unit_px`` or MAX_UNIT_ROWS rows; a block counts at
    least ``tile_px`` squared pixels; a scene of several blocks starts a unit. So a unit follows from the
    scenes before it in its part alone, and never from what is already computed.
    """

    unit_px: int
    tile_px: int
    _unit: int = field(default=-1, init=False)
    _num_px: int = field(default=0, init=False)
    _rows: int = field(default=MAX_UNIT_ROWS, init=False)

    def add(self, block_sizes_px: Sequence[int]) -> UnitSpan:
        """Pack one scene's blocks; a scene without any block (unreadable header) counts as one of 0 px."""
        sizes = block_sizes_px or (0,)
        if len(sizes) > 1:
            self._rows = MAX_UNIT_ROWS  # closes the open unit
        first = self.add_block(sizes[0])
        for size_px in sizes[1:]:
            self.add_block(size_px)
        return UnitSpan(first, self._unit - first + 1)

    def add_block(self, size_px: int) -> int:
        """Pack one block and return its unit."""
        counted_px = max(size_px, self.tile_px**2)
        if self._rows >= MAX_UNIT_ROWS or self._num_px + counted_px > self.unit_px:
            self._unit, self._num_px, self._rows = self._unit + 1, 0, 0
        self._num_px += counted_px
        self._rows += 1
        return self._unit

    @property
    def num_units(self) -> int:
        return self._unit + 1


def split_blocks(block_sizes_px: Sequence[int], unit_px: int, tile_px: int) -> list[range]:
    """Return the block indices of each unit of one scene that starts a unit."""
    packer = UnitPacker(unit_px, tile_px)
    units = [packer.add_block(size_px) for size_px in block_sizes_px]
    starts = [index for index, unit in enumerate(units) if index == 0 or unit != units[index - 1]]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(units)], strict=True)]
