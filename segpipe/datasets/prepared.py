"""A prepared data set as training sees it: what dataset.json says, and its samples in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from segpipe.config.card import ClassInfo
from segpipe.config.recipe import DATASET_KEY
from segpipe.datasets.dataset_file import read_dataset
from segpipe.datasets.shards import ROW_GROUP_SAMPLES
from segpipe.errors import InputError
from segpipe.storage import open_storage


@dataclass(frozen=True, slots=True)
class ShardRef:
    """One shard: its key below the data set's folder, its split, how many samples it must hold."""

    key: str
    split: str
    samples: int


@dataclass(frozen=True, slots=True)
class GroupRef:
    """Samples that are read together: a row group of a Parquet shard, or as many members of a tar."""

    shard_key: str
    index: int
    """Place in the shard; its first sample is ``index * ROW_GROUP_SAMPLES``."""
    samples: int


@dataclass(frozen=True, slots=True)
class PreparedDataset:
    """The content of dataset.json that training needs."""

    uri: str
    key: str
    """Digest of all samples and how they are stored."""
    classes: tuple[ClassInfo, ...]
    bands: int
    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per band, in pixel values."""
    pixel_m: float | None
    licence: str | None
    shards: tuple[ShardRef, ...]
    class_px: dict[str, tuple[int, ...]]
    """Pixels of each class, by split."""
    present_px: dict[str, tuple[int, ...]]
    """Of each class the labelled pixels of all samples that hold it, by split."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that hold samples, sorted."""
        return tuple(sorted({shard.split for shard in self.shards if shard.samples}))

    def groups(self, splits: Sequence[str]) -> tuple[GroupRef, ...]:
        """All groups of some splits, in shard order; known without opening a shard."""
        return tuple(
            GroupRef(shard.key, start // ROW_GROUP_SAMPLES, min(ROW_GROUP_SAMPLES, shard.samples - start))
            for shard in self.shards
            if shard.split in splits
            for start in range(0, shard.samples, ROW_GROUP_SAMPLES)
        )

    def num_samples(self, splits: Sequence[str]) -> int:
        return sum(shard.samples for shard in self.shards if shard.split in splits)

    def split_class_px(self, splits: Sequence[str]) -> tuple[int, ...]:
        """Pixels of each class in some splits together."""
        return self._together(self.class_px, splits)

    def split_present_px(self, splits: Sequence[str]) -> tuple[int, ...] | None:
        """Of each class the labelled pixels of all samples in some splits that hold it; None = not known."""
        counts = self._together(self.present_px, splits)
        return counts if any(counts) else None

    def _together(self, counts: dict[str, tuple[int, ...]], splits: Sequence[str]) -> tuple[int, ...]:
        rows = [counts[name] for name in splits if name in counts]
        return tuple(map(sum, zip(*rows, strict=True))) if rows else (0,) * len(self.classes)


def open_dataset(uri: str) -> PreparedDataset:
    """Read the dataset.json below ``uri``.

    Raises `InputError` where there is none (it is written last by ``segpipe prepare``), or one that cannot be
    read, or one without samples.
    """
    storage = open_storage(uri)
    tree = read_dataset(storage)
    where = storage.uri(DATASET_KEY)
    if tree is None:
        raise InputError(
            "there is no dataset.json", uri, "Give the --output of `segpipe prepare`, run to its end."
        )
    try:
        dataset = _from_tree(uri, tree)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise InputError(f"it cannot be read ({error})", where, "Run `segpipe prepare` again.") from error
    if not dataset.splits:
        raise InputError("the data set has no samples", where, "Look at its `dropped` and `left_out`.")
    return dataset


def _from_tree(uri: str, tree: dict[str, Any]) -> PreparedDataset:
    classes = tuple(ClassInfo.model_validate(item) for item in tree["classes"])
    return PreparedDataset(
        uri=uri,
        key=tree["key"],
        classes=classes,
        bands=int(tree["bands"]),
        dtype=tree["dtype"],
        mean=tuple(map(float, tree["mean"])),
        std=tuple(map(float, tree["std"])),
        pixel_m=tree.get("pixel_m"),
        licence=tree.get("licence"),
        shards=tuple(ShardRef(item["key"], item["split"], item["samples"]) for item in tree["shards"]),
        class_px=_by_split(tree, "class_px", len(classes)),
        present_px=_by_split(tree, "present_px", len(classes)),
    )


def _by_split(tree: dict[str, Any], name: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    return {split: tuple(item.get(name, ())) or (0,) * num_classes for split, item in tree["splits"].items()}
