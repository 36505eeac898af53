"""Windows, tiles and blocks of one scene. A block is what is read, segmented and written as one row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from segpipe.geometry.axis import Axis, group_cells, make_axis

Blend = Literal["crop", "linear"]


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of scene pixels."""

    row_off: int
    col_off: int
    height: int
    width: int

    @property
    def num_px(self) -> int:
        return self.height * self.width

    @property
    def row_stop(self) -> int:
        return self.row_off + self.height

    @property
    def col_stop(self) -> int:
        return self.col_off + self.width

    def slices_in(self, outer: Window) -> tuple[slice, slice]:
        """Return the (rows, columns) slices of this window in an array that holds ``outer``."""
        row, col = self.row_off - outer.row_off, self.col_off - outer.col_off
        return slice(row, row + self.height), slice(col, col + self.width)


@dataclass(frozen=True, slots=True)
class TileSpan:
    """One tile along one axis of a block, in reduced pixels (ceil(scene pixels / downsample) of them)."""

    start: int
    """Where the tile starts in the read window."""
    size: int
    """Pixels of the tile inside the scene; less than ``tile_px`` only if the scene is: pad by reflection."""
    cell_start: int
    """First pixel that the block takes from the tile, in tile coordinates."""
    cell_stop: int
    out_start: int
    """Where that pixel lands in the block's reduced output."""
    first: bool
    """The tile is the first of the scene's axis: a linear ramp does not fade towards its start."""
    last: bool
    """The tile is the last of the scene's axis."""


@dataclass(frozen=True, slots=True)
class TilePlan:
    """What the engine needs to know of one block; its tiles are ``rows`` x ``cols``, row by row."""

    tile_px: int
    downsample: int
    blend: Blend
    rows: tuple[TileSpan, ...]
    cols: tuple[TileSpan, ...]
    row_off: int
    """Where the block starts in the read window, scene pixels."""
    col_off: int
    out_height: int
    """Size of the block, scene pixels."""
    out_width: int

    @property
    def num_tiles(self) -> int:
        return len(self.rows) * len(self.cols)


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of whole cells: ``window`` is kept, ``read`` is needed to compute it (scene pixels)."""

    index: int
    window: Window
    read: Window
    tiles: TilePlan


@dataclass(frozen=True, slots=True)
class SceneGrid:
    """Tiles, cells and blocks of one scene: a pure function of the scene's size and the settings."""

    height: int
    width: int
    downsample: int
    blend: Blend
    rows: Axis
    cols: Axis
    row_groups: tuple[int, ...]
    col_groups: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        return (len(self.row_groups) - 1) * (len(self.col_groups) - 1)

    @property
    def num_tiles(self) -> int:
        """Tiles that cover the scene: the fewest forward passes that any run can do."""
        return self.rows.num_tiles * self.cols.num_tiles

    @property
    def num_passes(self) -> int:
        """Tiles of all blocks: with ``blend: linear`` one that reaches into several is computed for each."""
        return self._passes(self.rows, self.row_groups) * self._passes(self.cols, self.col_groups)

    def _passes(self, axis: Axis, groups: tuple[int, ...]) -> int:
        return sum(len(self._tiles(axis, groups, group)) for group in range(len(groups) - 1))

    def block_window(self, index: int) -> Window:
        """Return the scene pixels that block ``index`` keeps."""
        row, col = divmod(index, len(self.col_groups) - 1)
        row_off, height = self._extent(self.rows, self.row_groups, row, self.height)
        col_off, width = self._extent(self.cols, self.col_groups, col, self.width)
        return Window(row_off, col_off, height, width)

    def _extent(self, axis: Axis, groups: tuple[int, ...], group: int, n_px: int) -> tuple[int, int]:
        start = axis.edges[groups[group]] * self.downsample
        return start, min(axis.edges[groups[group + 1]] * self.downsample, n_px) - start

    def block(self, index: int) -> Block:
        """Return block ``index`` (blocks are numbered row by row)."""
        row, col = divmod(index, len(self.col_groups) - 1)
        window = self.block_window(index)
        rows, row_off, height = self._spans(self.rows, self.row_groups, row, self.height)
        cols, col_off, width = self._spans(self.cols, self.col_groups, col, self.width)
        read = Window(row_off, col_off, height, width)
        tiles = TilePlan(
            tile_px=self.rows.tile_px,
            downsample=self.downsample,
            blend=self.blend,
            rows=rows,
            cols=cols,
            row_off=window.row_off - read.row_off,
            col_off=window.col_off - read.col_off,
            out_height=window.height,
            out_width=window.width,
        )
        return Block(index, window, read, tiles)

    def _tiles(self, axis: Axis, groups: tuple[int, ...], group: int) -> range:
        """Return the tiles along one axis that a block computes."""
        first, stop = groups[group], groups[group + 1]
        if self.blend == "linear":
            return axis.overlapping(axis.edges[first], axis.edges[stop])
        return range(first, stop)

    def _spans(
        self, axis: Axis, groups: tuple[int, ...], group: int, n_px: int
    ) -> tuple[tuple[TileSpan, ...], int, int]:
        """Return the tiles of one block along one axis, and the (offset, size) to read in scene pixels."""
        tiles = self._tiles(axis, groups, group)
        block_start, block_stop = axis.edges[groups[group]], axis.edges[groups[group + 1]]
        read_start = axis.origins[tiles.start]
        read_stop = axis.tile_stop(tiles.stop - 1)
        spans = []
        for j in tiles:
            origin, tile_stop = axis.origins[j], axis.tile_stop(j)
            if self.blend == "linear":
                start, end = max(origin, block_start), min(tile_stop, block_stop)
            else:
                start, end = axis.edges[j], axis.edges[j + 1]
            spans.append(
                TileSpan(
                    start=origin - read_start,
                    size=tile_stop - origin,
                    cell_start=start - origin,
                    cell_stop=end - origin,
                    out_start=start - block_start,
                    first=j == 0,
                    last=j == axis.num_tiles - 1,
                )
            )
        offset = read_start * self.downsample
        return tuple(spans), offset, min(read_stop * self.downsample, n_px) - offset

    def blocks(self) -> Iterator[Block]:
        """Iterate over all blocks, row by row."""
        return (self.block(index) for index in range(self.num_blocks))


@lru_cache(maxsize=4096)
def make_grid(
    height: int,
    width: int,
    *,
    tile_px: int,
    margin_px: int,
    block_px: int,
    downsample: int = 1,
    blend: Blend = "crop",
    strips: bool = False,
) -> SceneGrid:
    """Cut a scene of ``height`` x ``width`` pixels into cells and blocks.

    Tiles, cells and ``margin_px`` lie on the grid of ceil(n / downsample) pixels; ``block_px`` is in scene
    pixels. With ``strips`` (a file stored in full-width strips) blocks are full-width bands of the same
    area, so that no strip is decoded for two blocks side by side.
    """
    rows = make_axis(-(-height // downsample), tile_px, margin_px)
    cols = make_axis(-(-width // downsample), tile_px, margin_px)
    if strips:
        num_rows, num_cols = -(-height * width // block_px**2), 1
    else:
        num_rows, num_cols = -(-height // block_px), -(-width // block_px)
    num_rows = min(rows.num_tiles, max(1, num_rows))
    num_cols = min(cols.num_tiles, max(1, num_cols))
    return SceneGrid(
        height=height,
        width=width,
        downsample=downsample,
        blend=blend,
        rows=rows,
        cols=cols,
        row_groups=group_cells(rows.num_tiles, num_rows),
        col_groups=group_cells(cols.num_tiles, num_cols),
    )
