from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from segpipe.training.curves import MAX_POINTS, draw_curves, smoothed, thinned
from segpipe.training.history import ScoreRow, scores_table, steps_schema

CLASSES = ("water", "land")


def steps_of(losses: list[float | None], lr: float = 1e-3) -> pa.Table:
    count = len(losses)
    return pa.table(
        {
            "step": pa.array(range(1, count + 1), pa.int64()),
            "loss": pa.array(losses, pa.float64()),
            "lr": pa.array([lr] * count),
        }
    )


def score_row(
    step: int, metric: float | None, is_best: bool = False, classes: tuple[str, ...] = CLASSES
) -> ScoreRow:
    return ScoreRow(step, 1.0, metric, is_best, {"miou": metric}, dict.fromkeys(classes, metric), 9, None)


def pixels_of(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def has_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((np.abs(pixels - np.array(colour)).max(axis=-1) < 12).any())


BLUE, RED = (0, 114, 178), (213, 94, 0)


def test_a_picture_is_1200_by_420_and_the_same_each_time() -> None:
    scores = scores_table([score_row(2, 0.5, is_best=True), score_row(3, 0.4)], CLASSES)
    first = draw_curves(steps_of([3.0, 2.0, 1.0]), scores, CLASSES, "unet")
    assert pixels_of(first).shape == (420, 1200, 3)
    assert first == draw_curves(steps_of([3.0, 2.0, 1.0]), scores, CLASSES, "unet")


def test_the_best_validation_has_a_ring_only_where_there_is_one() -> None:
    steps = steps_of([3.0, 2.0, 1.0])
    marked = draw_curves(steps, scores_table([score_row(2, 0.5, is_best=True)], CLASSES), CLASSES, "")
    plain = draw_curves(steps, scores_table([score_row(2, 0.5)], CLASSES), CLASSES, "")
    assert has_colour(pixels_of(marked), RED)
    assert not has_colour(pixels_of(plain), RED)


@pytest.mark.parametrize(
    ("steps", "rows"),
    [
        (steps_schema().empty_table(), []),
        (steps_of([1.0]), []),
        (steps_of([None, float("nan"), float("inf"), 1.0]), [score_row(4, None)]),
        (steps_of([-0.5, -0.25], lr=0.0), [score_row(1, float("nan")), score_row(2, -0.2, is_best=True)]),
    ],
    ids=["nothing", "one step", "undefined values", "negative values"],
)
def test_short_and_undefined_histories_are_drawn(steps: pa.Table, rows: list[ScoreRow]) -> None:
    png = draw_curves(steps, scores_table(rows, CLASSES), CLASSES, "unet")
    assert pixels_of(png).shape == (420, 1200, 3)


def test_names_with_dollar_signs_underscores_and_other_scripts_are_drawn_as_text() -> None:
    names = ("$x^{", "_hidden", "水域", "a very long name of a class that would not fit")
    rows = [score_row(1, 0.25, classes=names)]
    png = draw_curves(steps_of([1.0]), scores_table(rows, names), names, "$\\frac{ " * 40)
    assert pixels_of(png).shape == (420, 1200, 3)


def test_only_eight_of_many_classes_get_a_colour() -> None:
    names = tuple(f"class {index}" for index in range(30))
    iou = {name: (0.9 if index < 8 else 0.1) for index, name in enumerate(names)}
    rows = [ScoreRow(step, 1.0, 0.5, False, {"miou": 0.5}, iou, 9, None) for step in (1, 2)]
    pixels = pixels_of(draw_curves(steps_of([1.0, 1.0]), scores_table(rows, names), names, ""))
    panel = pixels[55:365, 720:1026]
    low = panel[248:]  # below the score 0.2: the grey lines only
    assert (low.max(axis=-1) - low.min(axis=-1)).max() < 12
    assert (panel.max(axis=-1) - panel.min(axis=-1)).max() > 100


def test_thinning_keeps_the_spike_of_a_single_step() -> None:
    loss = np.ones(1_000_000)
    loss[123_456], loss[777_777] = 50.0, np.nan
    x, y = thinned(np.arange(len(loss)), loss)
    assert len(y) <= MAX_POINTS
    assert x[y == 50.0].tolist() == [123_456]
    assert (np.diff(x) > 0).all()


def test_a_million_steps_are_drawn() -> None:
    count = 1_000_000
    table = pa.table({"step": np.arange(count), "loss": np.linspace(2, 1, count), "lr": np.full(count, 1e-3)})
    assert has_colour(pixels_of(draw_curves(table, scores_table([], CLASSES), CLASSES, "")), BLUE)


def test_smoothing_is_the_mean_of_the_known_neighbours() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    assert smoothed(values, 3).tolist() == [1.5, 1.5, 3.0, 6.5, 6.5]
    assert np.isnan(smoothed(np.full(3, np.nan), 3)).all()


def test_drawing_writes_nothing_to_the_home_folder_and_loads_no_window_system(tmp_path: Path) -> None:
    script = (
        "import os, sys; from segpipe.training.curves import draw_curves;"
        "from segpipe.training.history import scores_schema, steps_schema;"
        "draw_curves(steps_schema().empty_table(), scores_schema().empty_table(), (), 'a');"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'MPLCONFIGDIR' not in os.environ"
    )
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    unset = ("MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    subprocess.run(
        [sys.executable, "-c", script], env={**env, "HOME": str(home), "TMPDIR": str(scratch)}, check=True
    )
    assert list(home.iterdir()) == []
    assert list(scratch.iterdir()) == []
