"""Chips on the reduced grid: the mean of the valid pixels, the majority of the labels."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import Array, Heard, config_of, pixels_of, prepared, rows_of
from scenes import CLASSES, RASTERS, SMALL, blank, write_scene

from segpipe.datasets.archive_grid import ReducedGrid, reduce_label, reduce_pixels
from segpipe.geometry.georef import apply, coarser
from segpipe.geometry.grid import Window
from segpipe.geometry.resolution import choose_downsample, is_coarser, is_finer
from segpipe.masks.codec import decode_mask
from segpipe.pipelines.prepare import run_prepare


def naive_pixels(pixels: Array, valid: Array, factor: int) -> Array:
    bands, height, width = pixels.shape
    out = np.empty((bands, math.ceil(height / factor), math.ceil(width / factor)), pixels.dtype)
    for band, row, col in np.ndindex(*out.shape):
        part = np.s_[row * factor : (row + 1) * factor, col * factor : (col + 1) * factor]
        values = pixels[band][part][valid[part]]
        mean = values.mean(dtype=np.float64) if values.size else pixels[band][part][0, 0]
        out[band, row, col] = math.floor(mean + 0.5) if pixels.dtype.kind in "iu" else mean
    return out


def naive_label(label: Array, factor: int) -> Array:
    out = np.empty((math.ceil(label.shape[0] / factor), math.ceil(label.shape[1] / factor)), np.uint8)
    for row, col in np.ndindex(*out.shape):
        part = label[row * factor : (row + 1) * factor, col * factor : (col + 1) * factor]
        votes = Counter(int(value) for value in part.ravel() if value != 255)
        out[row, col] = min(votes, key=lambda value: (-votes[value], value)) if votes else 255
    return out


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**32 - 1), st.booleans())
def test_reduced_pixels_are_means_of_valid_pixels_and_labels_majorities(
    height: int, width: int, factor: int, seed: int, whole: bool
) -> None:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 60_000, (2, height, width)).astype(np.uint16 if whole else np.float32)
    valid = random.random((height, width)) < random.random()
    pixels[:, ~valid] = 65_535 if whole else np.nan
    label = random.choice(np.array([0, 1, 2, 254, 255], np.uint8), (height, width))
    found, any_valid = reduce_pixels(pixels, valid, factor)
    expected = naive_pixels(pixels, valid, factor)
    assert found.dtype == pixels.dtype
    np.testing.assert_allclose(found, expected, rtol=0 if whole else 1e-6)
    assert np.array_equal(any_valid, naive_label(np.where(valid, 0, 255), factor) == 0)
    assert np.array_equal(reduce_label(label, factor), naive_label(label, factor))
    plain, all_valid = reduce_pixels(np.nan_to_num(pixels), None, factor)
    assert all_valid is None
    every = np.ones_like(valid)
    np.testing.assert_allclose(plain, naive_pixels(np.nan_to_num(pixels), every, factor), rtol=1e-6)


@pytest.mark.parametrize(
    ("wanted_m", "scene_m", "factor"),
    [
        (0.15, 0.07, 2),
        (0.15, 0.099, 2),
        (0.15, 0.11, 1),
        (0.1, 9.0, 1),
        (10.0, 0.1, 16),
        (None, 1, 1),
        (1, None, 1),
    ],
)
def test_the_factor_is_the_nearest_whole_number(
    wanted_m: float | None, scene_m: float | None, factor: int
) -> None:
    assert choose_downsample(wanted_m, scene_m) == factor


@pytest.mark.parametrize(
    ("wanted_m", "scene_m", "coarse", "fine"),
    [
        (0.2, 0.29, False, False),
        (0.2, 0.31, True, False),
        (0.31, 0.2, False, True),
        (None, 0.2, None, None),
        (0.2, None, None, None),
    ],
)
def test_scenes_that_are_much_coarser_or_finer_than_wanted_are_told_apart(
    wanted_m: float | None, scene_m: float | None, coarse: bool | None, fine: bool | None
) -> None:
    assert (is_coarser(wanted_m, scene_m), is_finer(wanted_m, scene_m)) == (coarse, fine)


def test_a_coarser_transform_keeps_every_place() -> None:
    fine = (0.3, 0.1, 7.0, -0.1, 0.3, 9.0)
    assert apply(coarser(fine, 3), 5, 4) == pytest.approx(apply(fine, 15, 12))


def test_windows_of_the_reduced_grid_end_at_the_scene() -> None:
    grid = ReducedGrid(101, 64, 4)
    assert (grid.height, grid.width) == (26, 16)
    assert grid.to_scene(Window(10, 0, 16, 16)) == Window(40, 0, 61, 64)


def test_chips_are_cut_from_the_reduced_scene(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    image = random.integers(1, 250, (3, 131, 96), dtype=np.uint8)
    label = random.choice(np.array([0, 1, 255], np.uint8), (131, 96))
    image[:, 40:90, 10:30] = 0
    write_scene(tmp_path, "a", image, label, pixel_m=0.5, nodata=0)
    options = SMALL | {"archive": {"chip_px": 32, "pixel_m": 1.1}}
    tree = prepared("archive", tmp_path / "scenes", tmp_path / "out", **options).dataset
    assert tree["pixel_m"] == 1.1
    assert tree["pixel_m_range"] == pytest.approx([1.0, 1.0], rel=1e-3)
    valid = (image != 0).any(axis=0)
    whole = naive_pixels(image, valid, 2)
    truth = naive_label(np.where(valid, label, 255), 2)
    truth_valid = naive_label(np.where(valid, np.uint8(0), np.uint8(255)), 2) == 0
    rows = rows_of(tmp_path / "out")
    seen = np.zeros((66, 48), bool)
    for name, row in rows.items():
        top, left, height, width = (row["window"][key] for key in ("row_off", "col_off", "height", "width"))
        assert name == f"a/r{top:05d}_c{left:05d}"
        part = np.s_[top // 2 : (top + height + 1) // 2, left // 2 : (left + width + 1) // 2]
        stored, known = pixels_of(row["image"]), truth_valid[part]
        assert np.array_equal(stored[..., :3], whole[:, *part].transpose(1, 2, 0))
        assert stored.shape[-1] == (3 if known.all() else 4)
        assert known.all() or np.array_equal(stored[..., 3], known * np.uint8(255))
        assert np.array_equal(decode_mask(row["label"]), truth[part])
        assert decode_mask(row["label"]).shape == (32, 32)
        assert row["transform"] == [1, 0, 500_000 + left / 2, 0, -1, 5_000_000 - top / 2]
        seen[part] = True
    assert seen.all()


def test_large_chips_are_read_in_parts_to_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segpipe.datasets import archive

    random = np.random.default_rng(5)
    image = random.integers(0, 250, (3, 130, 70), dtype=np.uint8)
    image[:, :50] += 1  # no-data pixels in the later parts only
    write_scene(tmp_path, "a", image, random.integers(0, 2, (130, 70), dtype=np.uint8), nodata=0)
    options = SMALL | {"archive": {"chip_px": 64, "pixel_m": 3.0}}
    prepared("archive", tmp_path / "scenes", tmp_path / "whole", **options)
    monkeypatch.setattr(archive, "_PART_PX", 500)
    prepared("archive", tmp_path / "scenes", tmp_path / "parts", **options)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


def test_scenes_of_two_zooms_become_one_data_set(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "hot-fair-buildings"
    options: dict[str, Any] = {"labels": "{parent}/../masks/{stem}.tif", "classes": CLASSES}
    names = ("kampala_z19_309612_261632_chips21", "banepa_z18_193345_110121_chips19")
    for name in names:
        for folder in ("scenes", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.tif").symlink_to(root / folder / f"{name}.tif")
    archive = {"pixel_m": 0.15, "chip_px": 256}
    tree = prepared("archive", tmp_path / "scenes", tmp_path / "out", archive=archive, **options).dataset
    assert tree["pixel_m"] == 0.15
    assert max(tree["pixel_m_range"]) < 1.2 * min(tree["pixel_m_range"])
    kinds = Counter(row["scene_id"] for row in rows_of(tmp_path / "out").values())
    assert kinds == {names[0]: 4, names[1]: 16}
    plain = prepared("archive", tmp_path / "scenes", tmp_path / "plain", archive={}, **options).dataset
    assert plain["pixel_m"] is None  # 0.075 m beside 0.13 m


@pytest.mark.parametrize(("sizes", "common"), [((1.0, 1.05), 1.025), ((1.0, 1.2), None), ((1.0, None), None)])
def test_the_common_pixel_size_is_that_of_all_scenes(
    tmp_path: Path, sizes: tuple[float | None, ...], common: float | None
) -> None:
    for number, size in enumerate(sizes):
        image, label = np.ones((3, 40, 40), np.uint8), np.zeros((40, 40), np.uint8)
        write_scene(tmp_path, f"s{number}", image, label, pixel_m=size)
    tree = prepared("archive", tmp_path / "scenes", tmp_path / "out", **SMALL).dataset
    assert tree["pixel_m"] == (common if common is None else pytest.approx(common, rel=2e-3))
    assert tree["pixel_m_unknown"] == 4 * sizes.count(None)


def test_scenes_that_cannot_have_the_asked_size_are_said(tmp_path: Path) -> None:
    for number, size in enumerate((None, 4.0)):
        write_scene(
            tmp_path, f"s{number}", np.ones((3, 32, 32), np.uint8), np.zeros((32, 32), np.uint8), pixel_m=size
        )
    heard = Heard()
    options = {"labels": RASTERS, "classes": CLASSES, "archive": {"pixel_m": 2.0, "chip_px": 32}}
    tree = run_prepare(config_of("archive", tmp_path / "scenes", tmp_path / "out", **options), heard).dataset
    assert tree["samples"] == 2
    assert "1 sample without ground pixel size: not reduced to 2.0 m" in heard.warnings
    assert any("much coarser than archive.pixel_m" in line for line in heard.warnings)


def test_scenes_too_fine_to_be_reduced_as_far_as_asked_are_said_with_their_true_size(tmp_path: Path) -> None:
    blank(tmp_path, "a", 64)
    options = {"labels": RASTERS, "classes": CLASSES, "archive": {"pixel_m": 100.0, "chip_px": 32}}
    heard = Heard()
    tree = run_prepare(config_of("archive", tmp_path / "scenes", tmp_path / "out", **options), heard).dataset
    assert tree["pixel_m"] == pytest.approx(16.0, rel=1e-3)
    assert any("much finer than archive.pixel_m, 100.0 m" in line for line in heard.warnings)


def test_without_any_georeference_there_is_no_pixel_size(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", np.ones((3, 64, 64), np.uint8), np.zeros((64, 64), np.uint8), pixel_m=None)
    options = SMALL | {"archive": {"chip_px": 32, "pixel_m": 2.0}}
    tree = prepared("archive", tmp_path / "scenes", tmp_path / "out", **options).dataset
    assert (tree["samples"], tree["pixel_m"], tree["pixel_m_range"]) == (4, None, None)
