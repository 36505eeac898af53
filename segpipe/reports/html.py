"""The report as one plain page: no script, nothing fetched, every name from outside escaped.

The style is allowed by its hash in the page's content security policy, and colours come as style rules, so
that not even a style attribute gets through.

The page names its run by model and recipe and not by its place: a run that is repeated elsewhere has the same
bytes, and one that is moved keeps its right name.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any, Final

from segpipe.config.card import ClassInfo
from segpipe.metrics.scores import OVERALL_SCORES
from segpipe.reports.tables import Reports
from segpipe.wording import plain

MAX_MATRIX_CLASSES: Final = 40
"""A larger confusion matrix is left to ``confusion.parquet``."""

_ABSENT: Final = "–"
_DIGEST_CHARS: Final = 12  # of a digest where it only tells one from another
_SHADES: Final = 10
_LABELS: Final = {
    "miou": "mean IoU",
    "mdice": "mean Dice",
    "mean_accuracy": "mean accuracy",
    "fw_iou": "frequency-weighted IoU",
    "recipe_key": "recipe key",
    "model_sha256": "model sha256",
}
_MEASURED: Final = {
    *("scenes", "blocks", "missing", "failures", "pixels", "km2", "label_px", "compared_px"),
    *("uncounted_label_blocks", "scores", "classes"),
}


def render_html(reports: Reports, classes: Sequence[ClassInfo], title: str = "Segmentation report") -> str:
    """Return the page of a run's reports as one HTML document."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "score": format_score,
        "percent": format_percent,
        "grouped": format_count,
        "area": plain,
        "visible": visible,
        "label": lambda name: _LABELS.get(name, name.replace("_", " ")),
    }
    summary = reports.summary
    style = _style(classes)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    scored = summary["scores"] is not None
    names, ledger = _ledger(summary)
    return environment.from_string(_resource("page.html.j2")).render(
        title=title,
        identity=", ".join(_identity(summary)),
        style=_Markup(style),
        style_hash=f"sha256-{digest}",
        summary=summary,
        compared_share=_share(summary["compared_px"], summary["label_px"]) if scored else None,
        notes=_notes(summary),
        score_names=OVERALL_SCORES,
        class_names=[info.name for info in classes],
        matrix=_matrix(reports, classes) if scored and len(classes) <= MAX_MATRIX_CLASSES else None,
        ledger_columns=names,
        ledger=ledger,
        worst_scenes=reports.worst_scenes,
        failures=reports.failures,
        about=[(name, value) for name, value in summary.items() if name not in _MEASURED],
    )


def format_score(value: float | None) -> str:
    """Four decimals; a dash where the score is undefined."""
    return _ABSENT if value is None else f"{value:.4f}"


def format_percent(value: float | None) -> str:
    """A share in percent that says 0 or 100 only where it is so."""
    if value is None:
        return _ABSENT
    if value in (0.0, 1.0):
        return f"{value:.0%}"
    return f"{min(max(value, 0.0001), 0.9999):.2%}"


def format_count(value: int | None) -> str:
    return _ABSENT if value is None else f"{value:,}"


def visible(text: str) -> str:
    """Return text with characters that would not show (control, text direction) written as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class _Markup(str):
    """Our own style text, which must reach the page as it is or its hash would not fit."""

    def __html__(self) -> str:
        return self


def _resource(name: str) -> str:
    return resources.files("segpipe.reports").joinpath(name).read_text(encoding="utf-8")


def _style(classes: Sequence[ClassInfo]) -> str:
    swatches = [
        f".c{index} {{ background: rgb({info.color[0]} {info.color[1]} {info.color[2]}); }}"
        for index, info in enumerate(classes)
    ]
    shades = [
        f".{name}{step} {{ background: rgb(var(--{name}) / {0.5 * step / _SHADES:.2f}); }}"
        for name in ("good", "bad")
        for step in range(1, _SHADES + 1)
    ]
    return "\n".join([_resource("page.css"), *swatches, *shades])


def _identity(summary: dict[str, Any]) -> list[str]:
    """Say what tells a run from others, digests shortened: in full they stand at the end of the page."""
    parts = [f"model {summary['family']}"] if "family" in summary else []
    for key, label in (("model_sha256", "sha256"), ("recipe_key", "recipe")):
        if key in summary:
            parts.append(f"{label} {summary[key][:_DIGEST_CHARS]}")
    return parts


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _matrix(reports: Reports, classes: Sequence[ClassInfo]) -> list[dict[str, Any]]:
    rows = []
    for index, (info, counts) in enumerate(zip(classes, reports.matrix.tolist(), strict=True)):
        total_px = sum(counts)
        shares = [_share(px, total_px) for px in counts]
        cells = [
            {"share": share, "shade": _shade(share, "good" if column == index else "bad")}
            for column, share in enumerate(shares)
        ]
        rows.append({"name": info.name, "cells": cells, "px": total_px})
    return rows


def _shade(share: float | None, name: str) -> str:
    step = round((share or 0.0) * _SHADES)
    return f"{name}{step}" if step else ""


def _ledger(summary: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return column names and rows of the coverage table, cells as text."""
    columns = ["written", "done", "partial", "no data", "failed", "missing"]
    missing, km2 = summary["missing"], summary["km2"]
    keys = {
        "scenes": ("all", "ok", "partial", "empty", "failed"),
        "blocks": ("all", "ok", "", "empty", "failed"),
        "pixels": ("all", "valid", "", "no_data", "failed"),
    }
    ledger = []
    for name, states in keys.items():
        values = [*(summary[name].get(state) for state in states), missing.get(name)]
        ledger.append({"name": name, "cells": [format_count(value) for value in values]})
    if km2:
        cells = [plain(km2[name]) for name in ("all", "valid", "no_data", "failed")]
        ledger.append({"name": "km²", "cells": [*cells[:2], _ABSENT, *cells[2:], _ABSENT]})
    return columns, ledger


def _notes(summary: dict[str, Any]) -> list[str]:
    """Say what a reader of the scores would otherwise not see."""
    scenes, blocks, missing = summary["scenes"], summary["blocks"], summary["missing"]
    notes = []
    if any(missing.values()):
        parts = [_counted(value, name.removesuffix("s")) for name, value in missing.items() if value]
        notes.append(f"The run is not finished. Of the plan still without a mask: {', '.join(parts)}.")
    if blocks["failed"]:
        notes.append(
            f"{format_count(blocks['failed'])} of {_counted(blocks['all'], 'block')} failed: "
            f"{_counted(scenes['failed'], 'scene')} as a whole, {format_count(scenes['partial'])} in part."
        )
    if summary["scores"] is not None and summary["label_px"] > summary["compared_px"]:
        unseen = _counted(summary["label_px"] - summary["compared_px"], "labelled pixel")
        notes.append(f"Not in the scores: {unseen} without a prediction.")
    if summary["uncounted_label_blocks"]:
        uncounted = _counted(summary["uncounted_label_blocks"], "block")
        notes.append(f"Neither in the scores nor in any count: the labels of {uncounted}.")
    if scenes["coarser_than_model"]:
        coarse = _counted(scenes["coarser_than_model"], "scene")
        notes.append(f"Pixels more than 1.5 x coarser than the model was trained for: {coarse}.")
    return notes


def _counted(value: int, noun: str) -> str:
    return f"{format_count(value)} {noun}{'' if value == 1 else 's'}"
