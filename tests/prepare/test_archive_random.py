"""Random chips: pure, inside one split, and round rare classes as often as round common ones."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Array, Heard, config_of, files_of, prepared
from pydantic import ValidationError
from scenes import SMALL, blank, box, chips, write_areas, write_scene

from segpipe.config.prepare import ArchiveConfig
from segpipe.datasets import archive_places as places
from segpipe.datasets.archive_grid import ReducedGrid, reduce_label
from segpipe.geometry.grid import Window
from segpipe.pipelines.prepare import run_prepare


def random_chips(**archive: Any) -> dict[str, Any]:
    return {"archive": {"chip_px": 32, "chips": "random", **archive}}


def test_places_depend_on_seed_scene_and_number_alone(tmp_path: Path) -> None:
    blank(tmp_path, "a", 200)
    few = chips(tmp_path, **random_chips(chips_per_scene=5))
    blank(tmp_path, "b", 150)
    many = chips(tmp_path, **random_chips(chips_per_scene=9))
    assert [ref.sample_id for ref in few] == [f"a/n{number:05d}" for number in range(5)]
    assert [ref.window for ref in many[:5]] == [ref.window for ref in few]
    assert len({ref.window for ref in many}) == 18
    other = chips(tmp_path, **random_chips(chips_per_scene=9), split={"seed": 1})
    assert not {ref.window for ref in other} & {ref.window for ref in many}


def test_draws_are_these_for_ever() -> None:
    assert places.draw(0, "a", 0, 0) == (
        0.5922545618800465,
        0.24401958107392518,
        0.2072643176769614,
        0.7528437070137506,
    )
    every = np.array([places.draw(3, "scene", number, 0) for number in range(4000)])
    assert (every >= 0).all()
    assert (every < 1).all()
    assert np.allclose(every.mean(axis=0), 0.5, atol=0.02)
    assert abs(np.corrcoef(every.T) - np.eye(4)).max() < 0.06


def test_uniform_places_reach_every_pixel_and_no_further() -> None:
    grid = ReducedGrid(40, 33, 1)
    rows, cols = set(), set()
    for number in range(300):
        window = places.uniform_window(grid, 32, places.draw(0, "a", number, 0))
        assert (window.height, window.width) == (32, 32)
        rows.add(window.row_off)
        cols.add(window.col_off)
    assert (rows, cols) == (set(range(9)), {0, 1})


def test_a_scene_gives_no_more_chips_than_it_has_places(tmp_path: Path) -> None:
    blank(tmp_path, "a", 20)
    (ref,) = chips(tmp_path, **random_chips(chips_per_scene=50))
    assert ref.window == Window(0, 0, 20, 20)


def test_chips_per_million_pixels_count_reduced_pixels() -> None:
    config = ArchiveConfig(chips="random", chips_per_mpx=10.0)
    assert places.num_random(ReducedGrid(4000, 2000, 1), config) == 80
    assert places.num_random(ReducedGrid(4000, 2000, 2), config) == 20
    assert places.num_random(ReducedGrid(600, 600, 16), config) == 1


@settings(max_examples=40)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(1, 3),
    st.integers(32, 80),
    st.integers(0, 2**32 - 1),
)
def test_a_balanced_chip_holds_a_pixel_of_its_class(
    height: int, width: int, factor: int, chip_px: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    label = np.full((height, width), 255, np.uint8)
    for value in range(3):
        label[random.integers(0, height), random.integers(0, width)] = value
    grid = ReducedGrid(height, width, factor)
    found = places.find_classes(reader_of(label, grid), grid, chip_px)
    reduced = reduce_label(label, factor)
    classes = [int(value) for value in np.unique(reduced) if value != 255]
    for number in range(20):
        drawn = places.draw(0, "a", number, 0)
        window = found.window(drawn)
        assert window is not None
        assert 0 <= window.row_off <= window.row_stop <= grid.height
        assert 0 <= window.col_off <= window.col_stop <= grid.width
        inside = reduced[window.row_off : window.row_stop, window.col_off : window.col_stop]
        assert inside.shape == (min(chip_px, grid.height), min(chip_px, grid.width))
        assert classes[int(drawn[0] * len(classes))] in inside


def reader_of(label: Array, grid: ReducedGrid) -> Any:
    def read(window: Window) -> Array:
        at = grid.to_scene(window)
        return reduce_label(label[at.row_off : at.row_stop, at.col_off : at.col_stop], grid.factor)

    return read


def test_pieces_of_a_large_scene_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.random.default_rng(7).choice(np.array([0, 1, 255], np.uint8), (300, 260), p=(0.1, 0.01, 0.89))
    grid = ReducedGrid(300, 260, 1)
    whole = places.find_classes(reader_of(label, grid), grid, 64)
    monkeypatch.setattr(places, "_PIECE_PX", 3000)
    monkeypatch.setattr(places, "_PIECE_WIDTH_PX", 100)
    parts = places.find_classes(reader_of(label, grid), grid, 64)
    for one, other in zip(whole.cells, parts.cells, strict=True):
        assert np.array_equal(np.sort(one), np.sort(other))
    assert [int(sums[-1]) for sums in whole.cumulated] == [int((label == value).sum()) for value in (0, 1)]
    assert [int(sums[-1]) for sums in parts.cumulated] == [int(sums[-1]) for sums in whole.cumulated]


def test_a_scene_without_labelled_pixels_has_no_places() -> None:
    grid = ReducedGrid(50, 50, 1)
    found = places.find_classes(reader_of(np.full((50, 50), 255, np.uint8), grid), grid, 32)
    assert found.window((0.1, 0.1, 0.1, 0.1)) is None


def rare_house(root: Path) -> None:
    """A scene of 512 px with one house of 12 px: 0.05 % of it."""
    label = np.zeros((512, 512), np.uint8)
    label[400:412, 70:82] = 1
    write_scene(root, "a", np.full((3, 512, 512), 9, np.uint8), label)


def test_balanced_chips_aim_at_a_rare_class_as_often_as_at_a_common_one(tmp_path: Path) -> None:
    rare_house(tmp_path)
    seen = {}
    for balance in ("none", "classes"):
        refs = chips(tmp_path, **random_chips(chips_per_scene=200, balance=balance))
        windows = [ref.window for ref in refs if ref.window]
        seen[balance] = sum(
            w.row_off < 412 and w.row_stop > 400 and w.col_off < 82 and w.col_stop > 70 for w in windows
        )
        assert len(windows) == 200
    assert seen["none"] < 10  # 0.7 % of all places
    assert 80 <= seen["classes"] <= 120  # half of them


def test_balanced_areas_are_found_too(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", np.full((3, 300, 300), 9, np.uint8), None)
    write_areas(tmp_path / "labels/a.geojson", [box(200, -210, 206, -200)], "EPSG:32633")
    refs = chips(
        tmp_path,
        **random_chips(chips_per_scene=60, balance="classes"),
        labels="{parent}/../labels/{stem}.geojson",
    )
    near = sum(ref.window.col_stop > 200 and ref.window.col_off < 206 for ref in refs if ref.window)
    assert near > 20


def test_random_chips_keep_the_ground_of_the_splits_apart(tmp_path: Path) -> None:
    for number in range(4):  # neighbours overlap by half
        blank(tmp_path, f"s{number}", 192, left=96 * number)
    refs = chips(
        tmp_path, **random_chips(chips_per_scene=60), split={"fractions": {"val": 0.4}, "grid_m": 120}
    )
    ground: dict[tuple[int, int], set[str]] = defaultdict(set)
    for ref in refs:
        assert ref.window is not None
        left = 96 * int(ref.scene.scene_id[1:]) + ref.window.col_off
        for row in range(ref.window.row_off, ref.window.row_stop):
            for col in range(left, left + 32):
                ground[row, col].add(ref.split)
    assert max(map(len, ground.values())) == 1
    at_random = {ref.split for ref in refs if "/n" in ref.sample_id}
    on_the_grid = {ref.split for ref in refs if "/r" in ref.sample_id}
    assert (at_random, on_the_grid) == ({"train"}, {"val"})


def test_a_chip_without_a_place_is_left_out_and_counted(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", np.full((3, 64, 64), 9, np.uint8), np.zeros((64, 64), np.uint8))
    blank(tmp_path, "b", 64, left=5000)
    write_areas(tmp_path / "exclude.geojson", [box(-1, -64, 64, 1)], "EPSG:32633")
    options = SMALL | random_chips(chips_per_scene=3, exclude_area=str(tmp_path / "exclude.geojson"))
    heard = Heard()
    tree = run_prepare(config_of("archive", tmp_path / "scenes", tmp_path / "out", **options), heard).dataset
    assert (tree["samples"], tree["left_out"]) == (3, 3)


def test_random_chips_killed_and_repeated_give_the_same_bytes(tmp_path: Path) -> None:
    rare_house(tmp_path)
    options = SMALL | random_chips(chips_per_mpx=80, balance="classes") | {"shard_samples": 6}
    prepared("archive", tmp_path / "scenes", tmp_path / "out", **options)
    whole = files_of(tmp_path / "out")
    assert len(whole) == 5
    (tmp_path / "out/dataset.json").unlink()
    (tmp_path / "out/shards/part-00002.parquet").unlink()
    assert prepared("archive", tmp_path / "scenes", tmp_path / "out", **options).written == 1
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chips": "random"}, "chips_per_scene or chips_per_mpx"),
        ({"chips": "random", "chips_per_scene": 3, "chips_per_mpx": 2.0}, "one of them"),
        ({"chips_per_scene": 3}, "chips_per_scene: only for chips: random"),
        ({"balance": "classes"}, "balance: only for chips: random"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ArchiveConfig(**options)
