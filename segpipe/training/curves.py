"""The picture of a training: loss, learning rate and validation scores over the steps.

Drawn by matplotlib's objects on its Agg canvas: no window, no pyplot, nothing written to a home folder.
"""

from __future__ import annotations

import atexit
import io
import itertools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from segpipe.metrics.scores import OVERALL_SCORES
from segpipe.training.history import iou_columns

Array = np.ndarray[Any, Any]

WIDTH_PX: Final = 1200
HEIGHT_PX: Final = 420
MAX_POINTS: Final = 1200
"""Most points of a line: more would share pixels."""
NAMED_CLASSES: Final = 8

_DPI: Final = 100
_SMOOTH_PARTS: Final = 40  # the smoothed line is a mean over this part of all steps
_LR_DECADES: Final = 4  # a schedule that ends near 0 would leave no room for the rest
_NAME_CHARS: Final = 20
_LEFT_BOTTOM_WIDTH_HEIGHT: Final = (
    (0.045, 0.13, 0.255, 0.7),
    (0.355, 0.13, 0.2, 0.7),
    (0.6, 0.13, 0.255, 0.7),
)

# Okabe and Ito's colours, distinct to colour-blind readers as well; their yellow is too pale for a line.
_BLACK: Final = "#000000"
_BLUE: Final = "#0072B2"
_ORANGE: Final = "#E69F00"
_RED: Final = "#D55E00"
_GREY: Final = "#BBBBBB"
_CLASS_LINES: Final = (
    *((colour, "-") for colour in (_ORANGE, "#56B4E9", "#009E73", _RED, "#CC79A7")),
    *((colour, (0, (4, 1.5))) for colour in (_ORANGE, "#56B4E9", "#009E73")),
)
_STYLE: Final = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so a picture looks alike everywhere
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "text.usetex": False,
    "text.parse_math": False,  # names may hold dollar signs
    "path.simplify": True,
}
_TITLES: Final = {
    "miou": "mIoU",
    "mdice": "mDice",
    "mean_accuracy": "mean accuracy",
    "fw_iou": "weighted IoU",
}


def draw_curves(steps: Any, scores: Any, class_names: Sequence[str], title: str) -> bytes:
    """Return a PNG of WIDTH_PX x HEIGHT_PX.

    Args:
        steps: Arrow table of `history.steps_schema`; may be empty, or hold nulls and NaN.
        scores: Arrow table of `history.scores_schema`; may be empty.
        class_names: All classes, in order; NAMED_CLASSES of them get a colour and a name.
        title: Line above the panels.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
        figure = matplotlib.figure.Figure(figsize=(WIDTH_PX / _DPI, HEIGHT_PX / _DPI), dpi=_DPI)
        canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        figure.text(0.045, 0.94, _shortened(title, 150), fontsize=11, weight="bold")
        loss, rate, validation = (figure.add_axes(place) for place in _LEFT_BOTTOM_WIDTH_HEIGHT)
        done = _floats(steps, "step")
        _draw_loss(loss, done, _floats(steps, "loss"))
        _draw_rate(rate, done, _floats(steps, "lr"))
        _draw_scores(validation, scores, class_names)
        last = max([1.0, *done[-1:], *_floats(scores, "step")[-1:]])
        for axes in (loss, rate, validation):
            axes.set_xlim(0, last * 1.03)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter(_step_text)
        sink = io.BytesIO()
        canvas.print_png(sink, metadata={"Software": None})
    return sink.getvalue()


def thinned(x: Array, y: Array, max_points: int = MAX_POINTS) -> tuple[Array, Array]:
    """Return at most ``max_points`` of a line's points: the least and the largest of each stretch.

    NaN points are left out. So a spike of one step stays in a line of a million.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) <= max_points:
        return x, y
    edges = np.linspace(0, len(y), max_points // 2 + 1).astype(np.int64)
    stretches = list(itertools.pairwise(edges))
    places = [start + part(y[start:end]) for start, end in stretches for part in (np.argmin, np.argmax)]
    kept = np.unique(places)
    return x[kept], y[kept]


def smoothed(y: Array, width: int) -> Array:
    """Return the mean over ``width`` points around each (fewer at the ends), NaN points left out."""
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(y))
    half = width // 2
    start, end = np.maximum(place - half, 0), np.minimum(place + half + 1, len(y))
    count = counts[end] - counts[start]
    return np.divide(sums[end] - sums[start], count, out=np.full(len(y), np.nan), where=count > 0)


def _draw_loss(axes: Any, steps: Array, loss: Array) -> None:
    axes.set_title("loss", loc="left")
    mean = smoothed(loss, max(1, len(loss) // _SMOOTH_PARTS))
    x, y = thinned(steps, loss)
    axes.plot(x, y, color=_GREY, linewidth=0.7, marker="." if len(x) == 1 else None)
    shown = thinned(steps, mean)
    axes.plot(*shown, color=_BLUE, linewidth=1.8)
    if len(shown[1]):
        # by the smoothed line: the spikes of single steps would press it to the floor
        low, high = float(shown[1].min()), float(max(shown[1].max(), np.quantile(y, 0.98)))
        axes.set_ylim(min(0.0, low * 1.1), max(high, low + 1e-12) * 1.08)


def _draw_rate(axes: Any, steps: Array, rate: Array) -> None:
    axes.set_title("learning rate", loc="left")
    axes.set_yscale("log")
    x, y = thinned(steps, np.where(rate > 0, rate, np.nan))
    axes.plot(x, y, color=_BLUE, linewidth=1.5, marker="." if len(x) == 1 else None)
    if len(y):
        highest = float(y.max())
        lowest = max(float(y.min()), highest / 10**_LR_DECADES)
        axes.set_ylim(lowest / 1.5, highest * 1.5)
        if highest / lowest < 10:  # no power of ten may lie in view
            axes.set_yticks([lowest, highest] if highest > 1.2 * lowest else [highest])
    axes.yaxis.set_major_formatter(_rate_text)
    axes.yaxis.set_minor_formatter(lambda value, _: "")


def _draw_scores(axes: Any, scores: Any, class_names: Sequence[str]) -> None:
    axes.set_title("validation", loc="left")
    axes.set_ylim(0, 1.02)
    if scores.num_rows == 0:
        axes.text(0.5, 0.5, "no validation", ha="center", transform=axes.transAxes, color="#666666")
        return
    steps, metric = _floats(scores, "step"), _floats(scores, "metric")
    axes.set_ylim(min(0.0, *metric[np.isfinite(metric)] * 1.1, 0.0), 1.02)  # kappa may be negative
    dots = "." if scores.num_rows <= 40 else None
    lines: list[tuple[Any, str]] = []

    def plot(values: Array, name: str | None, **style: Any) -> None:
        (line,) = axes.plot(*thinned(steps, values), marker=dots, **style)
        if name is not None:
            lines.append((line, name))

    chosen = _chosen_name(scores, class_names)
    plot(metric, chosen, color=_BLACK, linewidth=2.0, zorder=4)
    if chosen != _TITLES["miou"]:
        plot(_floats(scores, "miou"), _TITLES["miou"], color=_BLUE, linewidth=1.6, zorder=3)
    shown = others = 0
    for column, name in zip(iou_columns(class_names), class_names, strict=True):
        values = _floats(scores, column)
        if not np.isfinite(values).any():
            continue
        if shown < NAMED_CLASSES:
            colour, dashes = _CLASS_LINES[shown]
            plot(values, name, color=colour, linestyle=dashes, linewidth=1.1, zorder=2)
            shown += 1
        else:
            plot(values, None, color=_GREY, linewidth=0.7, zorder=1)
            others += 1
    if others:
        lines.append((axes.plot([], [], color=_GREY)[0], "other classes"))
    best = _mark_best(axes, scores)
    _legend(axes, lines if best is None else [*lines, best])


def _mark_best(axes: Any, scores: Any) -> tuple[Any, str] | None:
    """Put a ring around the best validation and return it for the legend; None where no score is defined."""
    metric = _floats(scores, "metric")
    best = np.flatnonzero(np.asarray(scores["is_best"].fill_null(False)) & np.isfinite(metric))
    if len(best) == 0:
        return None
    step, value = _floats(scores, "step")[best[-1]], metric[best[-1]]
    style = {"marker": "o", "markersize": 9, "markeredgewidth": 1.6, "linestyle": "none"}
    (mark,) = axes.plot([step], [value], markerfacecolor="none", color=_RED, zorder=5, clip_on=False, **style)
    return mark, f"best: {value:.3f}\nat step {step:,.0f}"


def _legend(axes: Any, lines: Sequence[tuple[Any, str]]) -> None:
    handles = [line for line, _ in lines]
    # a leading "_" would hide an entry
    names = [f" {name}" if name.startswith("_") else name for name in (_shortened(n) for _, n in lines)]
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.03), "borderaxespad": 0.0}
    axes.legend(handles, names, frameon=False, handlelength=1.6, labelspacing=0.45, **place)


def _chosen_name(scores: Any, class_names: Sequence[str]) -> str:
    """The name of the score that equals ``metric`` in all rows; "chosen score" where none does."""
    metric = _floats(scores, "metric")
    names = {name: _TITLES.get(name, name) for name in OVERALL_SCORES}
    names |= dict(zip(iou_columns(class_names), (f"IoU {name}" for name in class_names), strict=True))
    for column, name in names.items():
        if np.array_equal(_floats(scores, column), metric, equal_nan=True):
            return name
    return "chosen score"


def _floats(table: Any, name: str) -> Array:
    """A column as float64, NaN for null; all NaN where there is no such column."""
    if name not in table.schema.names:
        return np.full(table.num_rows, np.nan)
    return np.asarray(table[name].to_numpy(), dtype=np.float64)


def _rate_text(value: float, _: int) -> str:
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def _step_text(value: float, _: int) -> str:
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if value >= 10 * unit or (value >= unit and value % unit == 0):
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _shortened(text: str, chars: int = _NAME_CHARS) -> str:
    lines = text.split("\n")
    return "\n".join(line if len(line) <= chars else f"{line[: chars - 1]}…" for line in lines)


def _matplotlib() -> Any:
    """Import matplotlib with its folder of settings and fonts in a temporary place.

    Unless MPLCONFIGDIR is set, importing it would make folders below the home folder (and warn on a worker
    that has none). It looks for them once, so the variable is taken back afterwards.
    """
    fresh = "matplotlib" not in sys.modules and "MPLCONFIGDIR" not in os.environ
    if fresh:
        folder = tempfile.mkdtemp(prefix="segpipe-curves-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["MPLCONFIGDIR"] = folder
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.ticker
    finally:
        if fresh:
            del os.environ["MPLCONFIGDIR"]
    return matplotlib
