"""The config of ``segpipe prepare``: which layout, where its pieces lie, how samples become shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from segpipe.config.card import ClassInfo
from segpipe.config.load import load_model_config
from segpipe.config.model import ExecutorConfig, LimitsConfig, Section

LAYOUTS: Final = ("archive", "camvid", "cityscapes", "coco", "folder", "voc")
LISTED_SPLITS: Final = ("camvid", "cityscapes", "coco", "voc")
"""Layouts whose own files say which split a sample belongs to."""

SplitName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class SplitConfig(Section):
    """Which samples of a folder or an archive belong to which split; the rest is ``train``."""

    fractions: dict[SplitName, Annotated[float, Field(gt=0, le=1)]] = {}
    """Share of each split, by a hash of the sample's id (folder) or of its place (archive)."""
    globs: dict[SplitName, tuple[str, ...]] = {}
    """Sample ids that belong to a split, as globs; they come before the fractions."""
    grid_m: float = Field(default=2000.0, gt=0)
    """archive: side of the ground cells, all of whose samples go to one split, metres."""
    seed: int = 0
    """Enters the hash."""

    @model_validator(mode="after")
    def _check(self) -> SplitConfig:
        if sum(self.fractions.values()) > 1 + 1e-9:
            raise ValueError("fractions: add up to more than 1")
        return self


class ArchiveConfig(Section):
    """How scenes become chips."""

    pixel_m: float | None = Field(default=None, gt=0)
    """Ground pixel size of the chips, metres: a finer scene is reduced by the nearest whole number."""
    chip_px: int = Field(default=512, ge=32, le=8192)
    """Side of a chip, pixels of the reduced scene; a smaller scene is one chip of its own size."""
    chips: Literal["grid", "random"] = "grid"
    """Chips that cover a scene once, or chips at places drawn from split.seed, scene id and number."""
    chips_per_scene: int | None = Field(default=None, ge=1, le=100_000)
    """chips: random: how many each scene gives."""
    chips_per_mpx: float | None = Field(default=None, gt=0, le=10_000)
    """chips: random: how many a scene gives for each 10^6 pixels of the reduced scene; at least one."""
    balance: Literal["none", "classes"] = "none"
    """chips: random: places all alike, or so that each class of a scene is aimed at equally often."""
    min_label_fraction: float = Field(default=0.0, ge=0, le=1)
    """Chips of which at most this part has a label (not 255) are left out."""
    exclude_area: str | None = None
    """URI of a file of areas (as vector labels are): chips that touch one are left out."""
    class_property: str | None = None
    """Property of an area that label_map maps; none: every area is class 1."""

    @model_validator(mode="after")
    def _check(self) -> ArchiveConfig:
        counts = [name for name in ("chips_per_scene", "chips_per_mpx") if getattr(self, name) is not None]
        if self.chips == "random" and len(counts) != 1:
            raise ValueError("chips: random needs chips_per_scene or chips_per_mpx, one of them")
        if self.chips == "grid" and counts:
            raise ValueError(f"{counts[0]}: only for chips: random")
        if self.chips == "grid" and self.balance != "none":
            raise ValueError("balance: only for chips: random")
        return self


class CocoConfig(Section):
    """Which annotations are read."""

    annotations: dict[SplitName, str] = {}
    """Annotation file of each split, below SRC; empty: the instances (else panoptic) files that are found."""
    crowd: Literal["auto", "class", "ignore"] = "auto"
    """Crowd regions: their class, or ignored; auto = ignored in instances, their class in panoptic."""
    maps: dict[SplitName, str] = {}
    """Folder of COCO-Stuff's PNG maps of each split, below SRC; they are read instead of annotations."""
    map_values: Literal["auto", "stuff_thing", "stuff"] = "auto"
    """stuff_thing: category id - 1, 255 unlabelled; stuff: category id, 0 unlabelled; auto: by the name."""

    @model_validator(mode="after")
    def _check(self) -> CocoConfig:
        if self.annotations and self.maps:
            raise ValueError("maps: give annotations or maps, not both")
        return self


class PrepareConfig(Section):
    """One ``segpipe prepare``."""

    layout: Literal["archive", "camvid", "cityscapes", "coco", "folder", "voc"]
    sources: tuple[str, ...] = Field(min_length=1)
    """Root folders of the data set; for folder and archive anything that names scenes."""
    output: str | None = None
    """URI of the folder for dataset.json and shards/."""
    labels: str | None = None
    """folder, archive: template of the label's path; {stem}, {parent}, {scene_id} are filled in."""
    label_map: dict[str, int] = {}
    """folder, archive: label value ("7"), colour ("#rrggbb") or property to class index; 255 = ignore."""
    classes: tuple[ClassInfo, ...] = Field(default=(), max_length=255)
    """folder, archive: names and colours; the index is the place in this list."""
    split: SplitConfig = SplitConfig()
    format: Literal["parquet", "tar"] = "parquet"
    """Parquet rows, or WebDataset tar members."""
    shard_samples: int = Field(default=256, ge=1)
    """Most samples of a shard."""
    shard_bytes: int = Field(default=1 << 26, ge=1)
    """A shard is closed when its images pass this many bytes."""
    licence: str | None = None
    """Licence text of the data, kept in dataset.json."""
    archive: ArchiveConfig = ArchiveConfig()
    coco: CocoConfig = CocoConfig()
    limits: LimitsConfig = LimitsConfig()
    cluster: ExecutorConfig = ExecutorConfig()

    @model_validator(mode="after")
    def _check(self) -> PrepareConfig:
        own = self.layout not in LISTED_SPLITS
        if own and not self.classes:
            raise ValueError("classes: name them, with colours, for this layout")
        if own and self.labels is None and self.layout == "archive":
            raise ValueError("labels: give the template of the label rasters or vector files")
        given = [name for name in ("labels", "label_map", "classes") if getattr(self, name)]
        given += ["split"] if self.split.fractions or self.split.globs else []
        if not own and given:
            raise ValueError(f"{given[0]}: the layout {self.layout} brings its own")
        top = len(self.classes)
        if any(index != 255 and not 0 <= index < top for index in self.label_map.values()):
            raise ValueError(f"label_map: class indices lie between 0 and {top - 1}, or are 255 (ignore)")
        return self


def load_prepare(
    text: str | None, overrides: Mapping[str, Any], sets: Sequence[str], where: str
) -> PrepareConfig:
    """The config of a YAML ``text``, then ``overrides`` (dotted key -> value), then ``sets`` ("a.b=c").

    Raises `ConfigError` that names unknown keys and values that do not fit.
    """
    fix = "See `segpipe config schema --of prepare` for all keys."
    return load_model_config(PrepareConfig, text, overrides, sets, where, fix, "prepare")
