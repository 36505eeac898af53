"""README.md of a trained model: what it is, how well it does on what, and how it came about.

The text depends on nothing but its arguments: no time, no machine.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ruamel.yaml import YAML

from segpipe.config.card import ModelCard
from segpipe.datasets.prepared import PreparedDataset
from segpipe.metrics.scores import OVERALL_SCORES
from segpipe.training.history import iou_columns
from segpipe.wording import few

LEFT_OUT: Final = ("output", "cluster", "tracking")
"""Sections of the config that say where a training ran, not how: they are not part of its recipe."""

_SCORE_WORDS: Final = {
    "miou": "mean IoU over the classes",
    "mdice": "mean Dice (F1) over the classes",
    "accuracy": "correct pixels of all",
    "mean_accuracy": "mean recall over the classes",
    "fw_iou": "IoU weighted by the pixels of each class",
    "kappa": "Cohen's kappa",
}
_USER: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://)[^\s/?#]*@")
_QUERY: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://[^\s?#]*)\?[^\s#]*")


def card_text(
    card: ModelCard, run: Mapping[str, Any], scores: Any, dataset: PreparedDataset, start_lines: Sequence[str]
) -> str:
    """Return the Markdown text.

    Args:
        card: Of the model file.
        run: ``config`` (the config as a tree of plain values), ``steps``, ``epochs``, ``kept_step``,
            ``parameters``, ``device`` (cpu or cuda), ``workers``, ``metric``.
        scores: Arrow table of `history.scores_schema`.
        dataset: What it was trained on.
        start_lines: How the weights began, a sentence a line.
    """
    kept = next((row for row in scores.to_pylist() if row["step"] == run["kept_step"]), None)
    parts = [
        f"# {_escaped(card.family)}: {_escaped(few([info.name for info in card.classes], 6))}",
        "A model for semantic segmentation, trained by segpipe.",
        _network(card, run),
        _use(card),
        _scores(run, kept, dataset),
        _classes(card, run, kept, dataset),
        "## Curves\n\n![Loss, learning rate and validation scores over the steps](curves.png)\n\n"
        "The tables behind them are `history/steps-*.parquet` and `history/epochs-*.parquet`.",
        _data(run, dataset),
        _training(run, start_lines),
        _limits(card, dataset, kept),
    ]
    return "\n\n".join(parts) + "\n"


def without_credentials(text: str) -> str:
    """Return a text with user, password and query (it may hold a signature) taken out of all its URIs."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def _network(card: ModelCard, run: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}: {value}" for name, value in sorted(card.options.items())) or "none"
    rows = [
        ("family", card.family),
        ("options", options),
        ("parameters", f"{run['parameters']:,}"),
        ("bands", ", ".join(card.bands)),
        ("pixel type", card.dtype),
        ("pixel size", _pixel_size(card.pixel_m)),
        ("tile", f"{card.tile_px} x {card.tile_px} px"),
    ]
    return "## Network\n\n" + _table(("property", "value"), rows)


def _use(card: ModelCard) -> str:
    command = "segpipe predict IMAGES --model model.safetensors --output RUN"
    return (
        "## Use\n\n"
        + _fenced(command, "bash")
        + f"\n\n`model.safetensors` names its family, classes, bands and normalisation itself. Images need "
        f"{_count(len(card.bands), 'band')} ({_escaped(few(card.bands, 8))}) of type {card.dtype}."
    )


def _scores(run: Mapping[str, Any], kept: Mapping[str, Any] | None, dataset: PreparedDataset) -> str:
    if kept is None:
        return (
            f"## Scores\n\nThe weights kept are those after step {run['kept_step']:,}. They were not scored."
        )
    splits = run["config"].get("validation", {}).get("splits", ())
    images = dataset.num_samples(splits)
    chosen = str(run["metric"])
    rows = [(name, _number(kept[name]), _SCORE_WORDS[name]) for name in OVERALL_SCORES if name in kept]
    return (
        f"## Scores\n\nOf the weights kept, those after step {run['kept_step']:,}, on whole images of "
        f"{_escaped(few(splits, 8))} ({_count(images, 'sample')}, {kept['compared_px']:,} pixels with a "
        f"label). The weights were judged by {_escaped(chosen)}: {_number(kept['metric'])}.\n\n"
        + _table(("score", "value", "meaning"), rows)
    )


def _classes(
    card: ModelCard, run: Mapping[str, Any], kept: Mapping[str, Any] | None, dataset: PreparedDataset
) -> str:
    pixels = dataset.split_class_px(_train_splits(run))
    total = sum(pixels)
    columns = iou_columns([info.name for info in card.classes])
    rows = []
    for index, (info, column) in enumerate(zip(card.classes, columns, strict=True)):
        share = f"{pixels[index] / total:.2%}" if total and index < len(pixels) else "-"
        iou = _number(kept.get(column)) if kept is not None else "-"
        rows.append((str(index), info.name, "#{:02x}{:02x}{:02x}".format(*info.color), share, iou))
    head = ("class", "name", "colour", "share of training pixels", "IoU")
    return (
        f"## Classes\n\n{_table(head, rows)}\n\n`-`: undefined, for want of such pixels or of a validation."
    )


def _data(run: Mapping[str, Any], dataset: PreparedDataset) -> str:
    used = dict.fromkeys(_train_splits(run), "training")
    for name in run["config"].get("validation", {}).get("splits", ()):
        used[name] = "training and validation" if name in used else "validation"
    rows = [(name, f"{dataset.num_samples([name]):,}", used.get(name, "not used")) for name in dataset.splits]
    licence = _escaped(dataset.licence) if dataset.licence else "not stated"
    return (
        f"## Data\n\n- Data set: {_code(without_credentials(dataset.uri))}\n"
        f"- Key of its content: {_code(dataset.key)}\n- Pixel size: {_pixel_size(dataset.pixel_m)}\n"
        f"- Licence: {licence}\n\n" + _table(("split", "samples", "used for"), rows)
    )


def _training(run: Mapping[str, Any], start_lines: Sequence[str]) -> str:
    lines = [
        f"{run['steps']:,} steps, {run['epochs']:.4g} passes over the training data.",
        f"Device: {run['device']}; {_count(run['workers'], 'worker')}.",
        *start_lines,
    ]
    recipe = {name: value for name, value in run["config"].items() if name not in LEFT_OUT}
    return (
        "## Training\n\n"
        + "\n".join(_item(without_credentials(line)) for line in lines)
        + "\n\nThe recipe; `segpipe train --config FILE --output FOLDER` repeats it:\n\n"
        + _fenced(_yaml(recipe), "yaml")
    )


def _limits(card: ModelCard, dataset: PreparedDataset, kept: Mapping[str, Any] | None) -> str:
    size = _pixel_size(card.pixel_m)
    lines = [
        f"Trained at a pixel size of {size}: objects look larger or smaller in images of another."
        if card.pixel_m
        else "The pixel size of the training images is unknown: try the model on images like them.",
        "Other sensors, places, seasons and light than those of the data are untested.",
        "The scores hold for the validation images only; where they lie close to the training images, new "
        "places may score lower."
        if kept is not None
        else "How good it is has not been measured.",
        f"The licence of the data applies to what is made from them: {_escaped(dataset.licence)}."
        if dataset.licence
        else "The licence of the data is not stated: ask for it before passing the model on.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _train_splits(run: Mapping[str, Any]) -> Sequence[str]:
    splits: Sequence[str] = run["config"].get("data", {}).get("train_splits", ("train",))
    return splits


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """A text as one line of Markdown that shows it as it is: no markup, no HTML, no end of a table cell."""
    line = html.escape(" ".join(text.split()), quote=False)
    line = re.sub(r"([\\`*\[\]|~$])", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)  # within a word it marks nothing up


def _item(text: str) -> str:
    """A text as a line of a list, not a heading or a list of its own."""
    line = re.sub(r"^([#+=-])", r"\\\1", _escaped(text))
    return "- " + re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def _code(text: str) -> str:
    """A text as a code span; its fence is longer than any run of backticks in it."""
    line = " ".join(text.split())
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _yaml(tree: Mapping[str, Any]) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.allow_unicode = True
    yaml.width = 100
    sink = io.StringIO()
    yaml.dump(_plain(tree), sink)
    return sink.getvalue()


def _plain(value: Any) -> Any:
    """The same with lists for tuples and without credentials."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _pixel_size(pixel_m: float | None) -> str:
    return "unknown" if pixel_m is None else f"{pixel_m:g} m"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
