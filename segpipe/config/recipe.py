"""The recipe: what was asked and turns pixels into classes, and its key. ``auto`` stays ``auto``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from segpipe.config.card import ModelCard
from segpipe.config.model import SegpipeConfig

RUN_KEY: Final = "run.json"
"""Names a folder of ours: of a run or a training."""

DATASET_KEY: Final = "dataset.json"
"""Names the folder of a prepared data set."""

FORMAT: Final = 1
"""Version of the stored run format."""

ENGINE_VERSION: Final = 1
"""Raised only when the bytes of masks change for the same recipe."""

_ABSENT: Final = object()


def recipe(config: SegpipeConfig, card: ModelCard, weights_sha256: str) -> dict[str, Any]:
    """All that decides mask bytes besides the scenes themselves, as JSON-ready values.

    Left out on purpose: scenes, labels, output, cluster, failures, limits and every file name, so that the
    same question asked from another place has the same key.
    """
    asked = config.model_dump(mode="json")
    return {
        "format": FORMAT,
        "engine_version": ENGINE_VERSION,
        "weights_sha256": weights_sha256,
        "classes": [{"name": info.name, "color": list(info.color)} for info in card.classes],
        "bands": asked["input"]["bands"],
        "valid": asked["input"]["valid"],
        "inference": asked["inference"],
    }


def masks_recipe(source_key: str, label_map: Mapping[str, int]) -> dict[str, Any]:
    """The recipe of scores made from a finished run's masks; ``source_key`` is that run's recipe key."""
    return {
        "format": FORMAT,
        "engine_version": ENGINE_VERSION,
        "masks_of": source_key,
        "label_map": dict(label_map),
    }


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over the recipe as canonical JSON (sorted keys, no spaces, ASCII)."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """One line a value that differs: ``inference.tile_px: 512 here, 1024 there`` (a = here, b = there)."""
    here, there = dict(_leaves(a, "")), dict(_leaves(b, ""))
    lines = []
    for key in sorted(here.keys() | there.keys()):
        left, right = here.get(key, _ABSENT), there.get(key, _ABSENT)
        if left != right:
            lines.append(f"{key}: {_show(key, left)} here, {_show(key, right)} there")
    return lines


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of everything in a tree; a list of plain values counts as one value."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}[{index}]")
    else:
        yield key, value


def _show(key: str, value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if key == "weights_sha256" or key.endswith("masks_of") else text
