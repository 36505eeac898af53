"""Builds run folders without any model: real plan parts, real mask objects, made-up classes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from segpipe.config.card import IGNORE, ClassInfo, ModelCard
from segpipe.geometry.georef import shift
from segpipe.geometry.grid import Window
from segpipe.geometry.units import UnitPacker
from segpipe.masks.codec import encode_mask
from segpipe.masks.ledger import RunTotals, count_part
from segpipe.masks.plan import PlanPart, PlanScene, block_sizes_px, encode_part, load_part
from segpipe.masks.run import (
    SUCCESS_KEY,
    Facts,
    RunInfo,
    adopt_or_create,
    list_parts,
    list_units,
    plan_key,
    unit_key,
)
from segpipe.masks.schema import mask_schema
from segpipe.masks.verify import Verification
from segpipe.masks.write import Counts, Row, encode_unit, failed_row, mask_row
from segpipe.metrics.counts import class_counts, confusion, to_pairs
from segpipe.rasters.scene import SceneHeader, SceneSource, Version
from segpipe.storage import Storage, open_storage

CLASSES = (
    ClassInfo(name="background", color=(0, 0, 0)),
    ClassInfo(name="building & shed", color=(200, 30, 40)),
    ClassInfo(name="water", color=(10, 20, 250)),
)

UTM_TRANSFORM = (0.5, 0.0, 450_000.0, 0.0, -0.5, 60_000.0)


@dataclass(frozen=True)
class MadeScene:
    """One scene of a made-up run."""

    scene_id: str
    height: int = 40
    width: int = 50
    version: str = "a"
    labelled: bool = False
    empty: bool = False
    failed: Mapping[int, str] = field(default_factory=dict)
    """Block index to error kind."""
    unreadable: str | None = None
    """Error kind of a header that could not be read."""
    crs: str | None = "EPSG:32632"
    transform: tuple[float, ...] | None = UTM_TRANSFORM
    pixel_m: float | None = 0.5
    strips: bool = False
    coarser: bool | None = False
    valid_source: str = "nodata"
    uri: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def classes(self) -> Any:
        """Return the whole mask, uint8 (height, width): a pattern with a no-data corner."""
        seed = zlib.crc32(f"{self.scene_id} {self.version}".encode())
        coarse = np.random.default_rng(seed).integers(
            0, len(CLASSES), (-(-self.height // 7), -(-self.width // 9))
        )
        mask = np.kron(coarse, np.ones((7, 9), np.uint8))[: self.height, : self.width].astype(np.uint8)
        mask[: self.height // 5, : self.width // 4] = IGNORE
        return np.full_like(mask, IGNORE) if self.empty else mask

    def label(self) -> Any:
        """Return the label: the mask moved a little, with ignored rows of its own."""
        label = np.roll(self.classes(), 3, axis=1)
        label[-2:] = IGNORE
        return label


def make_facts(**changes: Any) -> Facts:
    """Return facts with small tiles, so that small scenes have several blocks and units."""
    values = {
        "tile_px": 32,
        "margin_px": 4,
        "block_px": 64,
        "unit_px": 20_000,
        "blend": "crop",
        "batch_size": 4,
        "threads_per_worker": 1,
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
    }
    return Facts(**(values | changes))


def make_info(recipe_key: str = "0" * 64, **changes: Any) -> RunInfo:
    card = ModelCard(
        family="unet", bands=("red",), mean=(0.0,), std=(1.0,), pixel_m=0.5, tile_px=32, classes=CLASSES
    )
    return RunInfo({"asked": recipe_key}, recipe_key, make_facts(**changes), card, "f" * 64, {})


def plan_scenes(scenes: Sequence[MadeScene], facts: Facts, replaces: Mapping[str, int]) -> list[PlanScene]:
    """Return the plan of one part."""
    packer = UnitPacker(facts.unit_px, facts.tile_px)
    planned = []
    for scene in scenes:
        bare = _plan_scene(scene, replaces.get(scene.scene_id))
        span = packer.add(block_sizes_px(bare.grid(facts)))
        planned.append(_plan_scene(scene, bare.replaces_part, span.first_unit, span.num_units))
    return planned


def _plan_scene(scene: MadeScene, replaces: int | None, first_unit: int = 0, units: int = 0) -> PlanScene:
    uri = scene.uri or f"/archive/{scene.scene_id}.tif"
    source = SceneSource(
        scene_id=scene.scene_id,
        uri=uri,
        version=Version(100, scene.version),
        label_uri=f"/labels/{scene.scene_id}.tif" if scene.labelled else None,
        label_version=Version(9, "l") if scene.labelled else None,
        extra=dict(scene.extra),
    )
    header = SceneHeader(
        height=scene.height,
        width=scene.width,
        num_bands=1,
        dtype="uint8",
        driver="GTiff",
        bands=(1,),
        valid_source=scene.valid_source,
        file_block=(64, 64),
        strips=scene.strips,
        crs=scene.crs,
        transform=scene.transform,  # type: ignore[arg-type]
        pixel_m=scene.pixel_m,
    )
    return PlanScene(
        source,
        None if scene.unreadable else header,
        coarser_than_model=scene.coarser,
        first_unit=first_unit,
        units=units,
        replaces_part=replaces,
        error_kind=scene.unreadable,
        error="cannot be read" if scene.unreadable else None,
    )


def unit_rows(part: PlanPart, unit: int, made: Mapping[str, MadeScene]) -> list[Row]:
    """Return the rows of one unit as the pipeline would make them."""
    rows = []
    for item in part.unit(unit):
        scene, header = made[item.scene.source.scene_id], item.scene.header
        base: Row = {
            "scene_id": scene.scene_id,
            "uri": item.scene.source.uri,
            "version": item.scene.source.version_text,
            "part": part.part,
            "unit": unit,
            "label_uri": item.scene.source.label_uri,
        }
        if header is None:
            rows.append(failed_row(base, None, scene.unreadable or "", "cannot be read", None))
            continue
        for block in item.blocks:
            place = base | {
                "scene_height": header.height,
                "scene_width": header.width,
                "crs": header.crs,
                "transform": list(shift(header.transform, block.window)) if header.transform else None,
            }
            rows.append(_block_row(place, block.index, block.window, scene))
    return rows


def _block_row(base: Row, index: int, window: Window, scene: MadeScene) -> Row:
    rows, cols = slice(window.row_off, window.row_stop), slice(window.col_off, window.col_stop)
    label = scene.label()[rows, cols] if scene.labelled else None
    label_px = None if label is None else int(np.count_nonzero(label != IGNORE))
    if index in scene.failed:
        return failed_row(base, window, scene.failed[index], "cannot be read", label_px)
    mask = np.ascontiguousarray(scene.classes()[rows, cols])
    counts = None
    if label is not None:
        matrix = confusion(np.ascontiguousarray(label), mask, len(CLASSES))
        counts = Counts(label_px or 0, int(matrix.sum()), to_pairs(matrix))
    return mask_row(base, window, encode_mask(mask), class_counts(mask, len(CLASSES))[0].tolist(), counts)


@dataclass
class MadeRun:
    """A run folder that was built here."""

    storage: Storage
    info: RunInfo
    num_units: list[int]
    """Units of each part."""

    def key(self, unit: int, part: int = 0) -> str:
        return unit_key(part, unit)


def build_run(
    uri: str,
    parts: Sequence[Sequence[MadeScene]],
    *,
    info: RunInfo | None = None,
    replaces: Mapping[int, Mapping[str, int]] | None = None,
    success: bool = True,
) -> MadeRun:
    """Build a finished run. ``replaces``: part to {scene id: the part whose scene it replaces}."""
    storage = open_storage(uri)
    info = adopt_or_create(storage, info or make_info())
    num_units = []
    for number, scenes in enumerate(parts):
        planned = plan_scenes(scenes, info.facts, (replaces or {}).get(number, {}))
        storage.put_if_absent(plan_key(number), encode_part(planned))
        part = load_part(storage, number, info.facts)
        made = {scene.scene_id: scene for scene in scenes}
        for unit in range(part.num_units):
            put_unit(storage, info, number, unit, unit_rows(part, unit, made))
        num_units.append(part.num_units)
    if success:
        storage.put(SUCCESS_KEY, success_totals(storage, info).to_json())
    return MadeRun(storage, info, num_units)


def success_totals(storage: Storage, info: RunInfo) -> RunTotals:
    """Return what ``_SUCCESS`` says of a finished run, from the plan and a listing of the mask objects."""
    total = RunTotals()
    for number in list_parts(storage):
        count = count_part(load_part(storage, number, info.facts))
        num_bytes = sum(
            size for page in list_units(storage, number) for unit, size in page if unit < count.units
        )
        total += RunTotals(1, count.units, count.rows, count.pixels, num_bytes)
    return total


def put_unit(storage: Storage, info: RunInfo, part: int, unit: int, rows: Sequence[Row]) -> None:
    """Put (or replace) one mask object."""
    storage.put(unit_key(part, unit), encode_unit(rows, mask_schema(info.recipe_key, info.card.classes)))


def damage(verification: Verification, key: str) -> str:
    """Return the reason of the one damaged object, which must be ``key``."""
    assert verification.damaged.count == 1
    assert verification.exit_code == 4
    name, _, reason = verification.damaged.first[0].partition(": ")
    assert name == key
    return reason
