from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from segpipe.config.train import AugmentConfig
from segpipe.datasets.augment import augment, rng_of

MEAN, STD = (100.0, 110.0, 120.0), (50.0, 40.0, 30.0)


def image(height: int, width: int, bands: int = 3, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (bands, height, width)).astype(dtype)


def label_like(pixels: np.ndarray) -> np.ndarray:
    """Class 1 exactly where the first band is bright."""
    return (pixels[0] > 127).astype(np.uint8)


def changed(pixels: np.ndarray, config: AugmentConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    bands = len(pixels)
    mean, std = (100.0,) * bands, (50.0,) * bands
    return augment(pixels, label_like(pixels), config, mean, std, rng_of(seed, 0, "a"))


def test_without_augmentation_a_sample_is_a_part_of_the_image() -> None:
    pixels = image(90, 100)
    config = AugmentConfig(preset="none", crop_px=32)
    found, target = augment(pixels, label_like(pixels), config, MEAN, STD, rng_of(3, 0, "a"))
    back = found * np.array(STD, np.float32)[:, None, None] + np.array(MEAN, np.float32)[:, None, None]
    places = [
        (row, col)
        for row in range(59)
        for col in range(69)
        if np.abs(pixels[:, row : row + 32, col : col + 32] - back).max() < 0.01
    ]
    assert len(places) == 1
    row, col = places[0]
    assert (label_like(pixels)[row : row + 32, col : col + 32] == target).all()


@pytest.mark.parametrize("preset", ["aerial", "street"])
def test_image_and_label_move_together(preset: str) -> None:
    pixels = np.zeros((3, 200, 200), np.uint8)
    pixels[:, 60:140, 40:110] = 200
    config = AugmentConfig(preset=preset, crop_px=96, colour=0, noise=0, band_dropout=0, rotate=True)  # type: ignore[arg-type]
    for number in range(20):
        found, target = changed(pixels, config, number)
        bright = found[0] > (100 - 100) / 50
        assert ((target == 1) != bright).mean() < 0.03


@pytest.mark.parametrize(
    ("bands", "dtype"), [(1, "uint8"), (3, "uint8"), (4, "uint8"), (5, "uint16"), (2, "float32")]
)
def test_any_bands_and_types_give_finite_squares(bands: int, dtype: str) -> None:
    for seed in range(10):
        found, target = changed(image(70, 50, bands, dtype), AugmentConfig(crop_px=64, rotate=True), seed)
        assert found.shape == (bands, 64, 64)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        assert set(np.unique(target)) <= {0, 1, 255}


def test_what_lies_outside_the_image_is_mirrored_and_ignored() -> None:
    pixels = image(20, 64)
    found, target = changed(pixels, AugmentConfig(preset="none", crop_px=64))
    assert (target == 255).sum() == 44 * 64
    rows = np.flatnonzero((target != 255).all(axis=1))
    assert len(rows) == 20
    assert np.array_equal(found[:, rows[0] - 1], found[:, rows[0]])


def test_a_sample_is_the_same_again_and_another_in_another_epoch() -> None:
    pixels = image(100, 100)
    config = AugmentConfig(crop_px=64)
    one, two = (augment(pixels, label_like(pixels), config, MEAN, STD, rng_of(1, 4, "x"))[0] for _ in "ab")
    assert np.array_equal(one, two)
    assert not np.array_equal(
        one, augment(pixels, label_like(pixels), config, MEAN, STD, rng_of(1, 5, "x"))[0]
    )


def test_the_eight_symmetries_all_come_and_are_exact() -> None:
    pixels = image(64, 64)
    config = AugmentConfig(crop_px=64, scale=(1, 1), colour=0, noise=0, band_dropout=0)
    flat = label_like(pixels)
    whole = {np.rot90(side, turns).tobytes() for side in (flat, flat[:, ::-1]) for turns in range(4)}
    seen = set()
    for seed in range(200):
        _, target = augment(pixels, flat, config, MEAN, STD, rng_of(seed, 0, "a"))
        seen.add(
            min(whole, key=lambda other: np.count_nonzero(np.frombuffer(other, np.uint8) != target.ravel()))
        )
    assert seen == whole


def test_recoloured_pixels_stay_within_those_of_a_file() -> None:
    pixels = image(64, 64)
    config = AugmentConfig(preset="aerial", crop_px=32, noise=0, band_dropout=0)
    for seed in range(20):
        found, _ = augment(pixels, label_like(pixels), config, (0,) * 3, (1,) * 3, rng_of(seed, 0, "a"))
        assert found.min() >= 0
        assert found.max() <= 255


def test_pixels_on_another_scale_are_changed_alike() -> None:
    config = AugmentConfig(preset="aerial", crop_px=32)
    found = []
    for factor in (1, 200):
        pixels = image(64, 64, 4, "uint16") * factor
        mean, std = (100.0 * factor,) * 4, (50.0 * factor,) * 4
        found.append(augment(pixels, label_like(image(64, 64)), config, mean, std, rng_of(1, 0, "a"))[0])
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


SAMPLE = """
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from segpipe.config.train import AugmentConfig
from segpipe.datasets.augment import augment, rng_of

pixels, label = np.zeros((3, 40, 40), np.uint8), np.zeros((40, 40), np.uint8)
augment(pixels, label, AugmentConfig(preset="aerial", crop_px=32), (0,) * 3, (1,) * 3, rng_of(1, 0, "a"))
"""


def test_a_second_process_finds_the_compiled_loops_on_disk(tmp_path: Path) -> None:
    compiled = []
    for _ in range(2):
        env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", SAMPLE], env=env, check=True)
        compiled.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")})
    assert len(compiled[0]) >= 2
    assert compiled[0] == compiled[1]
