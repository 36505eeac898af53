"""Tiles and cells along one axis: pure integers that follow from the axis length alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Axis:
    """Tiles along one axis of a scene (on the reduced grid when the scene is downsampled).

    Tile j covers pixels ``origins[j] .. origins[j] + tile_px`` and keeps its cell
    ``edges[j] .. edges[j + 1]``: the pixels whose nearest tile centre is tile j's (ties: the first).
    An axis that fits in one tile has the single origin 0; the tile then reaches past the end.
    """

    n_px: int
    tile_px: int
    margin_px: int
    origins: tuple[int, ...]
    edges: tuple[int, ...]

    @property
    def num_tiles(self) -> int:
        return len(self.origins)

    def tile_stop(self, index: int) -> int:
        """End (exclusive) of the scene's pixels in tile ``index``."""
        return min(self.origins[index] + self.tile_px, self.n_px)

    def overlapping(self, start: int, stop: int) -> range:
        """Indices of all tiles that cover a pixel of ``start .. stop``."""
        first = next(j for j in range(self.num_tiles) if self.tile_stop(j) > start)
        last = next(j for j in reversed(range(self.num_tiles)) if self.origins[j] < stop)
        return range(first, last + 1)


@lru_cache(maxsize=4096)
def make_axis(n_px: int, tile_px: int, margin_px: int) -> Axis:
    """Lay tiles along an axis of ``n_px`` pixels.

    With k = ceil((n - 2m) / (T - 2m)) tiles spread evenly from 0 to n - T, neighbours overlap by at
    least 2m, so every kept pixel inside the scene has at least m pixels of context.
    Raises ValueError for sizes below 1 and for a margin over a quarter of the tile.
    """
    if n_px < 1 or tile_px < 1 or margin_px < 0:
        raise ValueError(f"axis of {n_px} px, tile of {tile_px} px, margin of {margin_px} px")
    if 4 * margin_px > tile_px:
        raise ValueError(f"margin_px {margin_px} is more than a quarter of tile_px {tile_px}")
    if n_px <= tile_px:
        return Axis(n_px, tile_px, margin_px, (0,), (0, n_px))
    num = -(-(n_px - 2 * margin_px) // (tile_px - 2 * margin_px))
    span = n_px - tile_px
    # Rounded half up in integers, so that no platform's floating point moves a tile.
    origins = tuple((2 * j * span + (num - 1)) // (2 * (num - 1)) for j in range(num))
    # Pixel centre i + 1/2 is nearer to tile j + 1 once it passes the midpoint of the two tile centres.
    inner = tuple((a + b + tile_px + 1) // 2 for a, b in pairwise(origins))
    return Axis(n_px, tile_px, margin_px, origins, (0, *inner, n_px))


def group_cells(num_cells: int, num_blocks: int) -> tuple[int, ...]:
    """Return the ``num_blocks + 1`` cell indices that cut an axis into blocks of whole cells."""
    return tuple(j * num_cells // num_blocks for j in range(num_blocks + 1))
