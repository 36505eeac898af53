"""The invariants of tiles, cells, blocks and units, for random sizes."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import axis_settings, grid_settings, grids, scene_blocks

from segpipe.geometry.axis import group_cells, make_axis
from segpipe.geometry.grid import SceneGrid, Window, make_grid
from segpipe.geometry.units import MAX_UNIT_ROWS, UnitPacker, split_blocks


@given(axis_settings())
def test_every_pixel_of_an_axis_belongs_to_exactly_one_cell(settings: tuple[int, int, int]) -> None:
    axis = make_axis(*settings)
    assert axis.edges[0] == 0
    assert axis.edges[-1] == axis.n_px
    assert list(axis.edges) == sorted(set(axis.edges))
    assert len(axis.edges) == axis.num_tiles + 1


@given(axis_settings())
def test_a_pixel_belongs_to_the_tile_whose_centre_is_nearest_and_to_the_first_of_two(
    settings: tuple[int, int, int],
) -> None:
    axis = make_axis(*settings)
    if axis.num_tiles == 1:
        return
    pixels = 2 * np.arange(axis.n_px) + 1  # twice the pixel's centre
    centres = 2 * np.array(axis.origins) + axis.tile_px
    nearest = np.abs(pixels[:, None] - centres).argmin(axis=1)
    owners = np.searchsorted(axis.edges, np.arange(axis.n_px), side="right") - 1
    np.testing.assert_array_equal(owners, nearest)


@given(axis_settings())
def test_kept_pixels_have_the_margin_as_context_but_at_the_ends_of_the_scene(
    settings: tuple[int, int, int],
) -> None:
    axis = make_axis(*settings)
    for j, origin in enumerate(axis.origins):
        start, stop = axis.edges[j], axis.edges[j + 1]
        assert origin <= start < stop <= axis.tile_stop(j)
        if j > 0:
            assert start - origin >= axis.margin_px
        if j < axis.num_tiles - 1:
            assert origin + axis.tile_px - stop >= axis.margin_px


@given(axis_settings())
def test_tiles_stay_inside_the_scene_and_are_as_few_as_can_be(settings: tuple[int, int, int]) -> None:
    n_px, tile_px, margin_px = settings
    axis = make_axis(*settings)
    assert axis.origins[0] == 0
    assert list(axis.origins) == sorted(axis.origins)
    if n_px <= tile_px:
        assert axis.origins == (0,)
        return
    assert axis.origins[-1] == n_px - tile_px
    fewer = axis.num_tiles - 1
    assert tile_px + (fewer - 1) * (tile_px - 2 * margin_px) < n_px
    gaps = np.diff(axis.origins)
    assert gaps.max() - gaps.min() <= 1  # spread evenly
    assert gaps.max() <= tile_px - 2 * margin_px


@given(axis_settings())
def test_origins_are_even_steps_rounded_half_up(settings: tuple[int, int, int]) -> None:
    axis = make_axis(*settings)
    steps = max(1, axis.num_tiles - 1)
    for j, origin in enumerate(axis.origins):
        exact = Fraction(j * max(0, axis.n_px - axis.tile_px), steps)
        assert origin == math.floor(exact + Fraction(1, 2))


@given(axis_settings(), st.data())
def test_overlapping_names_all_tiles_that_cover_a_pixel_of_a_range(
    settings: tuple[int, int, int], data: st.DataObject
) -> None:
    axis = make_axis(*settings)
    start = data.draw(st.integers(0, axis.n_px - 1))
    stop = data.draw(st.integers(start + 1, axis.n_px))
    covering = [j for j in range(axis.num_tiles) if axis.origins[j] < stop and axis.tile_stop(j) > start]
    assert list(axis.overlapping(start, stop)) == covering


@pytest.mark.parametrize("settings", [(0, 8, 0), (-1, 8, 0), (8, 0, 0), (8, 8, -1), (100, 8, 3), (5, 3, 1)])
def test_sizes_that_make_no_axis_are_refused(settings: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="px"):
        make_axis(*settings)


@given(st.integers(1, 500), st.data())
def test_groups_of_cells_are_contiguous_even_and_never_empty(num_cells: int, data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, num_cells))
    sizes = np.diff(group_cells(num_cells, num_blocks))
    assert sizes.sum() == num_cells
    assert len(sizes) == num_blocks
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


@given(grids())
def test_blocks_cover_every_pixel_of_the_scene_exactly_once(grid: SceneGrid) -> None:
    covered = np.zeros((grid.height, grid.width), np.uint8)
    for block in grid.blocks():
        rows, cols = block.window.slices_in(Window(0, 0, grid.height, grid.width))
        covered[rows, cols] += 1
        assert block.window == grid.block_window(block.index)
        assert block.window.num_px > 0
    assert (covered == 1).all()


@given(grids())
def test_a_block_reads_all_that_its_tiles_need_and_nothing_outside_the_scene(grid: SceneGrid) -> None:
    factor = grid.downsample
    for block in grid.blocks():
        read, plan = block.read, block.tiles
        assert (read.row_off % factor, read.col_off % factor) == (0, 0)
        assert 0 <= read.row_off < read.row_stop <= grid.height
        assert 0 <= read.col_off < read.col_stop <= grid.width
        assert (plan.row_off, plan.col_off) == (
            block.window.row_off - read.row_off,
            block.window.col_off - read.col_off,
        )
        assert (plan.out_height, plan.out_width) == (block.window.height, block.window.width)
        for spans, size in ((plan.rows, read.height), (plan.cols, read.width)):
            reduced = -(-size // factor)
            assert spans[0].start == 0
            assert max(span.start + span.size for span in spans) == reduced
            assert all(0 <= span.cell_start < span.cell_stop <= span.size for span in spans)


@given(grids())
def test_the_cells_of_a_block_fill_its_output(grid: SceneGrid) -> None:
    for block in grid.blocks():
        for spans, size in ((block.tiles.rows, block.window.height), (block.tiles.cols, block.window.width)):
            reduced = -(-size // grid.downsample)
            covered = np.zeros(reduced, int)
            for span in spans:
                covered[span.out_start : span.out_start + span.cell_stop - span.cell_start] += 1
            assert covered.min() >= 1
            if grid.blend == "crop":
                assert covered.max() == 1


@given(grid_settings())
def test_the_passes_of_a_grid_are_those_of_its_blocks(settings: dict[str, Any]) -> None:
    grid = make_grid(**settings)
    assert grid.num_passes == sum(block.tiles.num_tiles for block in grid.blocks())


@given(grid_settings())
def test_with_crop_all_blocks_together_compute_each_tile_once(settings: dict[str, Any]) -> None:
    grid = make_grid(**(settings | {"blend": "crop"}))
    assert sum(block.tiles.num_tiles for block in grid.blocks()) == grid.num_tiles


@given(grid_settings(), st.integers(1, 800), st.booleans())
def test_what_a_tile_sees_and_keeps_does_not_depend_on_the_block_size(
    settings: dict[str, Any], other_block_px: int, other_strips: bool
) -> None:
    one = make_grid(**settings)
    two = make_grid(**(settings | {"block_px": other_block_px, "strips": other_strips}))
    assert (one.rows, one.cols) == (two.rows, two.cols)
    assert kept_tiles(one) == kept_tiles(two)


def kept_tiles(grid: SceneGrid) -> set[tuple[int, ...]]:
    """Return what every output pixel is made of: (row, col, tile's place and size), in scene terms.

    Rows and columns are separable, so the pairs of their descriptions say it all.
    """
    found = set()
    for block in grid.blocks():
        for axis, spans, read_off, window_off in (
            (0, block.tiles.rows, block.read.row_off, block.window.row_off),
            (1, block.tiles.cols, block.read.col_off, block.window.col_off),
        ):
            for span in spans:
                origin = read_off // grid.downsample + span.start
                place = window_off // grid.downsample + span.out_start
                assert place == origin + span.cell_start
                for px in range(span.cell_start, span.cell_stop):
                    found.add((axis, origin + px, origin, span.size, px, span.first, span.last))
    return found


@given(grids())
def test_only_the_first_and_last_tiles_of_an_axis_say_so(grid: SceneGrid) -> None:
    for block in grid.blocks():
        for axis, spans, read_off in (
            (grid.rows, block.tiles.rows, block.read.row_off),
            (grid.cols, block.tiles.cols, block.read.col_off),
        ):
            for span in spans:
                origin = read_off // grid.downsample + span.start
                assert span.first == (origin == axis.origins[0])
                assert span.last == (origin == axis.origins[-1])


@given(grid_settings())
def test_the_number_of_blocks_follows_the_size_and_is_at_most_one_a_cell(settings: dict[str, Any]) -> None:
    grid = make_grid(**(settings | {"strips": False}))
    block_px = settings["block_px"]
    for axis, groups, n_px in (
        (grid.rows, grid.row_groups, grid.height),
        (grid.cols, grid.col_groups, grid.width),
    ):
        assert len(groups) - 1 == min(axis.num_tiles, max(1, -(-n_px // block_px)))


@given(grid_settings())
def test_blocks_of_a_file_in_strips_are_full_width_bands(settings: dict[str, Any]) -> None:
    grid = make_grid(**(settings | {"strips": True}))
    assert all(block.window.width == grid.width for block in grid.blocks())
    area = settings["block_px"] ** 2
    assert grid.num_blocks == min(grid.rows.num_tiles, max(1, -(-grid.height * grid.width // area)))


UNIT_SETTINGS = (st.integers(1, 20_000), st.integers(1, 80))


def units_of(scenes: list[list[int]], unit_px: int, tile_px: int) -> list[list[tuple[int, int]]]:
    """Return (scene, pixels) of the blocks of each unit."""
    packer = UnitPacker(unit_px, tile_px)
    units: dict[int, list[tuple[int, int]]] = {}
    for index, sizes in enumerate(scenes):
        span = packer.add(sizes)
        split = split_blocks(sizes or [0], unit_px, tile_px) if len(sizes) > 1 else [range(1)]
        assert len(split) == span.num_units
        for unit, blocks in enumerate(split, span.first_unit):
            units.setdefault(unit, []).extend((index, (sizes or [0])[i]) for i in blocks)
    assert sorted(units) == list(range(packer.num_units))
    return [units[unit] for unit in sorted(units)]


@given(scene_blocks(), *UNIT_SETTINGS)
def test_units_hold_every_block_once_and_in_plan_order(
    scenes: list[list[int]], unit_px: int, tile_px: int
) -> None:
    blocks = [block for unit in units_of(scenes, unit_px, tile_px) for block in unit]
    assert blocks == [(index, px) for index, sizes in enumerate(scenes) for px in (sizes or [0])]


@given(scene_blocks(), *UNIT_SETTINGS)
def test_a_unit_keeps_to_its_pixels_and_rows_unless_one_block_alone_is_larger(
    scenes: list[list[int]], unit_px: int, tile_px: int
) -> None:
    for unit in units_of(scenes, unit_px, tile_px):
        counted = [max(px, tile_px**2) for _, px in unit]
        assert len(unit) <= MAX_UNIT_ROWS
        assert len(unit) == 1 or sum(counted) <= unit_px


@given(scene_blocks(), *UNIT_SETTINGS)
def test_a_unit_is_closed_only_when_the_next_block_would_not_fit_or_starts_its_own(
    scenes: list[list[int]], unit_px: int, tile_px: int
) -> None:
    units = units_of(scenes, unit_px, tile_px)
    for unit, after in pairwise(units):
        counted = sum(max(px, tile_px**2) for _, px in unit)
        next_scene, next_px = after[0]
        starts_own = len(scenes[next_scene]) > 1 and unit[-1][0] != next_scene
        full = counted + max(next_px, tile_px**2) > unit_px or len(unit) == MAX_UNIT_ROWS
        assert starts_own or full


@given(scene_blocks(), *UNIT_SETTINGS)
def test_a_scene_of_several_blocks_starts_a_unit(scenes: list[list[int]], unit_px: int, tile_px: int) -> None:
    starts = {unit[0][0] for unit in units_of(scenes, unit_px, tile_px)}
    assert {index for index, sizes in enumerate(scenes) if len(sizes) > 1} <= starts


@given(scene_blocks(), scene_blocks(), *UNIT_SETTINGS)
def test_units_are_a_pure_function_of_the_scenes_before_them(
    scenes: list[list[int]], more: list[list[int]], unit_px: int, tile_px: int
) -> None:
    one, other = UnitPacker(unit_px, tile_px), UnitPacker(unit_px, tile_px)
    alone = [one.add(sizes) for sizes in scenes]
    assert [other.add(sizes) for sizes in [*scenes, *more]][: len(scenes)] == alone


def test_a_unit_of_tiny_scenes_ends_at_its_row_limit() -> None:
    packer = UnitPacker(10**9, 1)
    spans = [packer.add([1]) for _ in range(2 * MAX_UNIT_ROWS + 1)]
    assert [span.first_unit for span in spans[::MAX_UNIT_ROWS]] == [0, 1, 2]
    assert spans[MAX_UNIT_ROWS - 1].first_unit == 0
