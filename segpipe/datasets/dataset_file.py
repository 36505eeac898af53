"""dataset.json: what a prepared data set is, written when all its shards are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from segpipe.config.card import IGNORE, ClassInfo
from segpipe.config.prepare import PrepareConfig
from segpipe.config.recipe import DATASET_KEY
from segpipe.datasets.plan import FORMAT, ShardPlan, dataset_key
from segpipe.datasets.shards import ShardMeta
from segpipe.datasets.statistics import Sums
from segpipe.errors import InputError
from segpipe.geometry.resolution import is_finer
from segpipe.storage import Storage


def dataset_tree(
    config: PrepareConfig,
    classes: Sequence[ClassInfo],
    shards: Sequence[ShardPlan],
    metas: Sequence[ShardMeta],
    left_out: int,
) -> dict[str, Any]:
    """The content of dataset.json; mean and std are those of ``train``, else of all samples."""
    total, splits = Sums(), dict[str, Sums]()
    for shard, meta in zip(shards, metas, strict=True):
        total.merge(meta.sums)
        splits.setdefault(shard.split, Sums()).merge(meta.sums)
    of = "train" if "train" in splits and splits["train"].valid_px else "all"
    mean, std = (splits["train"] if of == "train" else total).mean_and_std()
    filled = next((meta for meta in metas if meta.bands), None)
    return {
        "format": FORMAT,
        "key": dataset_key(shards),
        "layout": config.layout,
        "shard_format": config.format,
        "classes": [info.model_dump(mode="json") for info in classes],
        "ignore_value": IGNORE,
        "bands": filled.bands if filled else 0,
        "dtype": filled.dtype if filled else "",
        "mean": mean,
        "std": std,
        "statistics_of": of,
        **_pixel_sizes(config, total),
        "samples": total.samples,
        "dropped": total.dropped,
        "left_out": left_out,
        "valid_px": total.valid_px,
        "ignore_px": total.ignore_px,
        "class_px": total.class_px,
        "absent_classes": [info.name for info, px in zip(classes, total.class_px, strict=False) if not px],
        "splits": {
            name: {
                "samples": sums.samples,
                "ignore_px": sums.ignore_px,
                "class_px": sums.class_px,
                "present_px": sums.present_px,
            }
            for name, sums in splits.items()
        },
        "shards": [
            {"key": shard.key, "split": shard.split, "samples": meta.sums.samples}
            for shard, meta in zip(shards, metas, strict=True)
        ],
        "sources": {"inputs": list(config.sources), **_sources(shards)},
        "licence": config.licence,
    }


def with_licence(tree: dict[str, Any], config: PrepareConfig) -> dict[str, Any]:
    """The same data set with the licence text of the config, where it gives one: no shard depends on it."""
    return tree if config.licence is None else {**tree, "licence": config.licence}


def to_json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()


def read_dataset(storage: Storage) -> dict[str, Any] | None:
    """The dataset.json that is there, or None. Raises `InputError` for one that cannot be read."""
    if storage.stat(DATASET_KEY) is None:
        return None
    try:
        tree: dict[str, Any] = json.loads(storage.read(DATASET_KEY))
        if int(tree["format"]) > FORMAT:
            raise InputError(
                f"it has format {tree['format']}, this version of segpipe reads up to {FORMAT}",
                storage.uri(DATASET_KEY),
                "Install a newer segpipe.",
            )
        return tree
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"it cannot be read ({error})", storage.uri(DATASET_KEY), "Choose another folder."
        ) from error


def _pixel_sizes(config: PrepareConfig, total: Sums) -> dict[str, Any]:
    """``pixel_m``: what was asked for, else what the samples have in common, metres; null where unknown.

    What was asked for counts unless all scenes are too fine to be reduced to it.
    """
    asked = config.archive.pixel_m if config.layout == "archive" else None
    sizes = None if total.pixel_m_min is None else [total.pixel_m_min, total.pixel_m_max]
    reached = asked is not None and sizes is not None and not is_finer(asked, sizes[1])
    return {
        "pixel_m": asked if reached else total.common_pixel_m(),
        "pixel_m_range": sizes,
        "pixel_m_unknown": total.pixel_m_unknown,
    }


def _sources(shards: Sequence[ShardPlan]) -> dict[str, Any]:
    """Count, bytes and one digest of all source objects; a row's own etags are its ``version`` column."""
    objects: dict[str, str] = {}
    size_bytes = 0
    for shard in shards:
        for ref in shard.refs:
            scene = ref.scene
            for uri, version in ((scene.uri, scene.version), (scene.label_uri, scene.label_version)):
                if uri is not None and version is not None and uri not in objects:
                    objects[uri] = str(version)
                    size_bytes += version.size_bytes
    lines = "\n".join(sorted(objects.values()))
    return {
        "objects": len(objects),
        "bytes": size_bytes,
        "etags_sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }
