"""The score table on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from segpipe.metrics.scores import OVERALL_SCORES
from segpipe.reports.html import format_count, format_percent, format_score, visible
from segpipe.reports.totals import SCENE_STATUSES
from segpipe.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ANY_WIDTH: Final = 1_000_000
_MOST_KINDS: Final = 5

_AGAIN: Final = "run the same command again, which computes what has changed"
_REPAIR: Final = f"repair the sources and {_AGAIN}."
_LABELS: Final = f"correct the labels and {_AGAIN}"
_NEWER: Final = "run the same command again, which takes the new version."
_ELSEWHERE: Final = "and choose another --output."
_ADVICE: Final = {
    "label_read": f"{_LABELS}.",
    "label_size": f"{_LABELS}.",
    "label_value": f"{_LABELS}, or map their values with input.label_map {_ELSEWHERE}",
    "scene_changed": _NEWER,
    "shard_count": _NEWER,
    "bands": f"repair the sources and {_AGAIN}, or name other input.bands {_ELSEWHERE}",
    "limit": f"repair the sources, or raise input.limits if you trust them, and {_AGAIN}.",
    "mask_missing": f"predict these scenes into the run of --masks and {_AGAIN}.",
    # A run keeps the failed unit of a file that stays the same.
    "kills_worker": f"leave these scenes out, or give workers more memory or less to do, {_ELSEWHERE}",
}
"""What ends the failures of a kind; of all others, ``_REPAIR``."""


def print_scores(summary: Mapping[str, Any], console: Console) -> None:
    """Print one row per class, and the averages, of ``summary`` (the content of summary.json)."""
    from rich.table import Table
    from rich.text import Text

    scored = summary["scores"] is not None
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("class", no_wrap=True)
    score_columns = ("iou", "dice", "precision", "recall") if scored else ()
    for name in (*score_columns, *(("label px",) if scored else ()), "mask px", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    valid_px = summary["pixels"]["valid"]
    for row in summary["classes"]:
        cells = [format_score(row[name]) for name in score_columns]
        cells += [format_count(row["support_px"])] if scored else []
        cells += [format_count(row["px"]), format_percent(row["px"] / valid_px if valid_px else None)]
        table.add_row(Text(visible(row["class"])), *cells)
    _print_whole(console, table)
    if scored:
        overall = [f"{name} {format_score(summary['scores'][name])}" for name in OVERALL_SCORES]
        _plain(console, "  ".join(overall))
        compared_px, label_px = summary["compared_px"], summary["label_px"]
        share = format_percent(compared_px / label_px if label_px else None)
        _plain(
            console,
            f"compared {format_count(compared_px)} of {format_count(label_px)} labelled pixels ({share})",
        )
    if summary["uncounted_label_blocks"]:
        uncounted = counted(summary["uncounted_label_blocks"], "block")
        _plain(console, f"in none of these counts: the labels of {uncounted} that could not be read")
    _plain(console, _coverage(summary))


def failure_lines(summary: Mapping[str, Any]) -> list[str]:
    """Say why scenes have failed and what to do about it, the kinds of most scenes first."""
    failures = summary["failures"]
    kinds = sorted(failures, key=lambda kind: (-failures[kind]["scenes"], kind))
    lines = []
    for kind in kinds[:_MOST_KINDS]:
        found = failures[kind]
        first = visible(f"{found['first_scene']}: {found['first_error']}")
        lines.append(f"failed: {_kind_count(kind, found)}, first {first}")
    if rest := kinds[_MOST_KINDS:]:
        lines.append(f"failed: {', '.join(_kind_count(kind, failures[kind]) for kind in rest)}")
    advised: dict[str, list[str]] = {}
    for kind in kinds:
        advised.setdefault(_ADVICE.get(kind, _REPAIR), []).append(visible(kind))
    return lines + [f"what to do about {', '.join(of)}: {advice}" for advice, of in advised.items()]


def _kind_count(kind: str, found: Mapping[str, Any]) -> str:
    return f"{visible(kind)} in {counted(found['scenes'], 'scene')}"


def _print_whole(console: Console, table: Table) -> None:
    """Print all of every cell: a narrow terminal wraps the lines, but a number that is cut is a wrong one."""
    from rich.measure import Measurement

    width = console.width
    options = console.options.update(max_width=_ANY_WIDTH)
    console.width = max(width, Measurement.get(console, options, table).maximum)
    try:
        console.print(table)
    finally:
        console.width = width


def _coverage(summary: Mapping[str, Any]) -> str:
    scenes = summary["scenes"]
    parts = [f"scenes: {format_count(scenes['all'])}"]
    parts += [f"{format_count(scenes[status])} {status}" for status in SCENE_STATUSES if scenes[status]]
    if summary["scores"] is not None and scenes["labelled"] < scenes["all"]:
        parts.append(f"{format_count(scenes['labelled'])} labelled")
    parts += [f"{kind}: {format_count(found['scenes'])}" for kind, found in summary["failures"].items()]
    return ", ".join(parts)


def _plain(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
