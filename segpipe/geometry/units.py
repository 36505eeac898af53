"""Packing of blocks into units: the pieces that are computed, written and resumed as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    _rows: int = field(default=0, init=False)

    def add(self, block_sizes_px: Sequence[int]) -> UnitSpan:
        """Pack one scene's blocks; a scene without any block (unreadable header) counts as one of 0 px."""
        sizes = block_sizes_px or (0,)
        if len(sizes) > 1:
            self._close()
        first = -1
        for size_px in sizes:
            self._pack(max(size_px, self.tile_px**2))
            first = self._unit if first < 0 else first
        return UnitSpan(first, self._unit - first + 1)

    def _pack(self, size_px: int) -> None:
        if self._unit < 0 or self._num_px + size_px > self.unit_px or self._rows >= MAX_UNIT_ROWS:
            self._close()
            self._unit += 1
        self._num_px += size_px
        self._rows += 1

    def _close(self) -> None:
        # The next block opens a unit; an open one without rows cannot exist.
        self._num_px, self._rows = self.unit_px, MAX_UNIT_ROWS

    @property
    def num_units(self) -> int:
        return self._unit + 1


def split_blocks(block_sizes_px: Sequence[int], unit_px: int, tile_px: int) -> list[range]:
    """Return the block indices of each unit of one scene that starts a unit."""
    packer = UnitPacker(unit_px, tile_px)
    starts: list[int] = []
    for index, size_px in enumerate(block_sizes_px):
        packer._pack(max(size_px, tile_px**2))
        if packer._rows == 1:
            starts.append(index)
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(block_sizes_px)], strict=True)]


def pack_scenes(scenes: Iterable[Sequence[int]], unit_px: int, tile_px: int) -> Iterator[UnitSpan]:
    """Pack all scenes of a part; ``scenes`` are their block sizes in pixels."""
    packer = UnitPacker(unit_px, tile_px)
    return (packer.add(sizes) for sizes in scenes)
