"""Which samples form which shard: a pure function of the samples and the config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from segpipe.config.prepare import PrepareConfig
from segpipe.datasets.layout import SampleRef
from segpipe.errors import InputError

FORMAT: Final = 1
SHARD_VERSION: Final = 2
"""Raised only when the same samples give other bytes, or a default of the config changes."""

_FIRST_SPLITS: Final = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard: its name, and what will lie in it."""

    number: int
    key: str
    """Name below the output."""
    split: str
    content_key: str
    """sha256 over config and samples: a shard of another content key is another shard."""
    refs: tuple[SampleRef, ...]


def plan_shards(refs: Iterable[SampleRef], config: PrepareConfig) -> list[ShardPlan]:
    """Cut the samples, sorted by split and id, into shards of one split each.

    A shard is closed when it has ``shard_samples`` samples or the next would pass ``shard_bytes``.
    Raises `InputError` for samples with one id.
    """
    ordered = sorted(refs, key=lambda ref: (_split_rank(ref.split), ref.sample_id))
    _check_ids(ordered)
    recipe = _recipe(config)
    shards: list[ShardPlan] = []
    group: list[SampleRef] = []
    size_bytes = 0
    for ref in ordered:
        full = len(group) >= config.shard_samples or size_bytes + ref.size_bytes > config.shard_bytes
        if group and (full or ref.split != group[0].split):
            shards.append(_shard(len(shards), group, recipe, config))
            group, size_bytes = [], 0
        group.append(ref)
        size_bytes += ref.size_bytes
    if group:
        shards.append(_shard(len(shards), group, recipe, config))
    return shards


def dataset_key(shards: Iterable[ShardPlan]) -> str:
    """sha256 over the content keys of all shards."""
    return hashlib.sha256("\n".join(shard.content_key for shard in shards).encode()).hexdigest()


def shard_key(number: int, form: str) -> str:
    return f"shards/part-{number:05d}.{form}"


def _split_rank(split: str) -> tuple[int, str]:
    return (_FIRST_SPLITS.index(split) if split in _FIRST_SPLITS else len(_FIRST_SPLITS)), split


def _check_ids(ordered: list[SampleRef]) -> None:
    seen: dict[str, SampleRef] = {}
    for ref in ordered:
        if (other := seen.setdefault(ref.sample_id, ref)) is not ref:
            where = f"{other.scene.where} and {ref.scene.where}"
            raise InputError(f"two samples have the id {ref.sample_id!r}", where, "Rename one.")


def _recipe(config: PrepareConfig) -> dict[str, Any]:
    """What decides the content of a shard, besides its samples; defaults are left out, so that a new key
    changes no old data set."""
    unimportant = {"cluster", "output", "sources", "licence", "limits"}
    tree = config.model_dump(mode="json", exclude=unimportant, exclude_defaults=True)
    return {"format": FORMAT, "engine_version": SHARD_VERSION, **tree}


def _shard(number: int, refs: list[SampleRef], recipe: dict[str, Any], config: PrepareConfig) -> ShardPlan:
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for ref in refs:
        window = ref.window
        place = (window.row_off, window.col_off, window.height, window.width) if window else None
        row = (ref.sample_id, ref.split, ref.scene.scene_id, ref.scene.version_text, place, ref.payload)
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return ShardPlan(number, shard_key(number, config.format), refs[0].split, digest.hexdigest(), tuple(refs))
