"""Hypothesis strategies for geometry: axes, grids and block sizes as archives have them, and odder ones."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from segpipe.geometry.grid import SceneGrid, make_grid


@st.composite
def axis_settings(draw: st.DrawFn, max_px: int = 3000) -> tuple[int, int, int]:
    """(n_px, tile_px, margin_px): any length, a margin of at most a quarter of the tile."""
    tile_px = draw(st.integers(1, 160))
    margin_px = draw(st.integers(0, tile_px // 4))
    near_multiples = st.builds(
        lambda tiles, extra: max(1, tiles * (tile_px - 2 * margin_px) + 2 * margin_px + extra),
        st.integers(1, 6),
        st.integers(-2, 2),
    )
    n_px = draw(st.one_of(st.integers(1, max_px), near_multiples))
    return n_px, tile_px, margin_px


@st.composite
def grid_settings(draw: st.DrawFn, max_px: int = 400) -> dict[str, Any]:
    """Keyword arguments of ``make_grid``."""
    tile_px = draw(st.integers(4, 64))
    return {
        "height": draw(st.integers(1, max_px)),
        "width": draw(st.integers(1, max_px)),
        "tile_px": tile_px,
        "margin_px": draw(st.integers(0, tile_px // 4)),
        "block_px": draw(st.integers(1, 2 * max_px)),
        "downsample": draw(st.integers(1, 5)),
        "blend": draw(st.sampled_from(["crop", "linear"])),
        "strips": draw(st.booleans()),
    }


def grids(max_px: int = 400) -> st.SearchStrategy[SceneGrid]:
    return grid_settings(max_px).map(lambda settings: make_grid(**settings))


def scene_blocks(max_scenes: int = 30) -> st.SearchStrategy[list[list[int]]]:
    """Block sizes in pixels of the scenes of a part; an empty list is a scene without a readable header."""
    sizes = st.integers(1, 5000)
    scene = st.one_of(st.lists(sizes, max_size=1), st.lists(sizes, min_size=2, max_size=40))
    return st.lists(scene, max_size=max_scenes)
