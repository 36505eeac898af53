"""Scenes to plan parts: headers are read, units packed, parts put create-only as they are ready."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from segpipe.config.card import ModelCard
from segpipe.config.model import SegpipeConfig
from segpipe.errors import CheckError, ObjectMissing, SceneError
from segpipe.geometry.resolution import choose_downsample, is_coarser
from segpipe.geometry.units import UnitPacker
from segpipe.masks.damage import explain_damage, open_parquet
from segpipe.masks.plan import PART_SCENES, PlanScene, block_sizes_px, encode_part, iter_plan
from segpipe.masks.run import FAILURES_KEY, Facts, list_parts, plan_key
from segpipe.pipelines.events import Events
from segpipe.pipelines.mask_index import MaskIndex
from segpipe.rasters.band_names import contradict
from segpipe.rasters.header import inspect_scene
from segpipe.rasters.scene import SceneSource
from segpipe.rasters.scene_list import KnownScene, SceneList
from segpipe.storage import Storage
from segpipe.wording import Named, counted

Inspect = Callable[[Sequence[SceneSource]], Iterable[PlanScene]]

_MOST_NAMINGS: Final = 8
_BEYOND_LIMITS: Final = "limit"
"""In place of the version of a planned scene that was beyond the limits."""


def inspect_source(source: SceneSource, config: SegpipeConfig, card: ModelCard) -> PlanScene:
    """Read one scene's header; a fault of the scene becomes a planned failure."""
    try:
        header = inspect_scene(source, len(card.bands), config.input)
        if header.dtype != card.dtype:
            raise SceneError(
                "dtype",
                f"its pixels are {header.dtype}, the model was trained on {card.dtype}",
                source.where,
                f"Convert it to {card.dtype}, or leave it out.",
            )
    except SceneError as error:
        return PlanScene(source, None, error_kind=error.kind, error=str(error))
    asked = config.inference.downsample
    factor = choose_downsample(card.pixel_m, header.pixel_m) if asked == "auto" else asked
    coarser = is_coarser(card.pixel_m, header.pixel_m)
    names = header.band_names if contradict(header.band_names, card.bands) else None
    return PlanScene(source, header, factor, coarser, bands_named=names)


@dataclass(slots=True)
class PlanTotals:
    """What a plan amounts to; the numbers of ``--dry-run``."""

    scenes: int = 0
    failed_kinds: dict[str, int] = field(default_factory=dict)
    units: int = 0
    blocks: int = 0
    tiles: int = 0
    scene_px: int = 0
    area_m2: float = 0.0
    source_bytes: int = 0
    coarser: Named = field(default_factory=Named)
    validity: dict[str, int] = field(default_factory=dict)
    extra_bands: Named = field(default_factory=Named)
    bands_named: dict[str, Named] = field(default_factory=dict)
    """What bands are called, where the model takes others -> the scenes."""

    def add(self, scene: PlanScene, facts: Facts) -> None:
        self.scenes += 1
        self.source_bytes += scene.source.length or scene.source.version.size_bytes
        header, grid = scene.header, scene.grid(facts)
        if header is None or grid is None:
            kind = scene.error_kind or "header"
            self.failed_kinds[kind] = self.failed_kinds.get(kind, 0) + 1
            self.blocks += 1
            return
        self.blocks += grid.num_blocks
        self.tiles += grid.num_passes
        self.scene_px += header.height * header.width
        if header.pixel_m is not None:
            self.area_m2 += header.height * header.width * header.pixel_m**2
        self.validity[header.valid_source] = self.validity.get(header.valid_source, 0) + 1
        if scene.coarser_than_model:
            self.coarser.add(scene.source.scene_id)
        if header.num_bands - header.num_alpha_bands > len(header.bands):
            self.extra_bands.add(scene.source.scene_id)
        if scene.bands_named is not None:
            names = ", ".join(name or "?" for name in scene.bands_named)
            if names not in self.bands_named and len(self.bands_named) >= _MOST_NAMINGS:
                names = "otherwise"  # memory is bounded whatever the archive
            self.bands_named.setdefault(names, Named()).add(scene.source.scene_id)


def plan_part(scenes: Iterable[PlanScene], facts: Facts, totals: PlanTotals) -> list[PlanScene]:
    """Pack the scenes of one part into units."""
    packer = UnitPacker(facts.unit_px, facts.tile_px)
    planned = []
    for scene in scenes:
        span = packer.add(block_sizes_px(scene.grid(facts)))
        planned.append(replace(scene, first_unit=span.first_unit, units=span.num_units))
        totals.add(scene, facts)
    totals.units += packer.num_units
    return planned


def make_plan(
    storage: Storage,
    scenes: SceneList,
    facts: Facts,
    inspect: Inspect,
    events: Events,
    index: MaskIndex | None = None,
) -> PlanTotals:
    """Plan all scenes that the run does not have yet, as new parts, and return what was added.

    ``index``: of the masks that are scored instead of made.

    Two drivers may plan at once: a part is put create-only, and the one that comes second forgets the
    scenes that the first has planned and goes on behind it.
    """
    totals = PlanTotals()
    known_parts = 0
    while True:
        parts = list_parts(storage)
        scenes.forget_known(known_scenes(storage, parts[known_parts:], index))
        known_parts = len(parts)
        next_part = parts[-1] + 1 if parts else 0
        if _plan_pages(storage, scenes, facts, inspect, events, next_part, totals, index):
            return totals
        totals = PlanTotals()


def _plan_pages(
    storage: Storage,
    scenes: SceneList,
    facts: Facts,
    inspect: Inspect,
    events: Events,
    part: int,
    totals: PlanTotals,
    index: MaskIndex | None,
) -> bool:
    """Put one part a page; False as soon as another driver was first with another content."""
    done, total, kept = 0, len(scenes), 0
    for page in scenes.pages(PART_SCENES):
        replaced = {source.scene_id: old for source, old in page if old is not None}
        masks = index.find([source for source, _ in page]) if index is not None else {}
        beyond = beyond_limits(scenes, page)
        inspected = []
        for scene in inspect([source for source, _ in page]):
            scene_id = scene.source.scene_id
            done += 1
            if done % 100 == 0 or done == total:
                events.planned(done, total)
            if still_beyond(scene, beyond):
                continue
            if scene_id in replaced and scene.error_kind == "scene_changed":
                kept += 1  # the plan may have the newer version from another driver
                continue
            inspected.append(replace(scene, replaces_part=replaced.get(scene_id), masks=masks.get(scene_id)))
        if not inspected:
            continue
        data = encode_part(plan_part(inspected, facts, totals), scenes.extra_schema)
        if not storage.put_if_absent(plan_key(part), data) and storage.read(plan_key(part)) != data:
            return False
        part += 1
    if kept:
        events.warning(
            f"{counted(kept, 'scene')} changed since the listing, and the masks that are there stay. "
            "Run the same command again."
        )
    return True


def beyond_limits(scenes: SceneList, page: Sequence[tuple[SceneSource, int | None]]) -> set[str]:
    """Return the scenes of a page that were planned, but beyond the limits."""
    return scenes.known_in(_BEYOND_LIMITS, (source.scene_id for source, old in page if old is not None))


def still_beyond(scene: PlanScene, beyond: Container[str]) -> bool:
    """Whether nothing has changed for a scene of `beyond_limits`: its failed row stands."""
    return scene.source.scene_id in beyond and scene.error_kind == "limit"


def known_scenes(
    storage: Storage, parts: Sequence[int], index: MaskIndex | None = None
) -> Iterator[KnownScene]:
    """Iterate over all planned scenes, in plan order.

    One that is to be planned anew has no version here: one that was gone when it was to be read, and is
    listed again; one whose masks of ``index`` are no longer those that were scored. One beyond the limits is
    to be looked at again, for the limits may be others now.
    """
    gone = _gone_scenes(storage)
    columns = ("scene_id", "uri", "version", "error_kind", "masks_part", "masks_first_unit")
    for part in parts:
        for batch in iter_plan(storage, part, columns):
            rows = zip(*(batch[name].to_pylist() for name in columns), strict=True)
            there = index.places(batch["scene_id"].to_pylist()) if index is not None else {}
            for scene_id, uri, version, kind, *place in rows:
                other_masks = index is not None and there.get(scene_id, (None, None)) != tuple(place)
                if (scene_id, part) in gone or other_masks:
                    version = ""
                elif kind == "limit":
                    version = _BEYOND_LIMITS
                yield KnownScene(scene_id, version, part, uri)


def _gone_scenes(storage: Storage) -> set[tuple[str, int]]:
    """(scene_id, part) by the reports of the run so far; none where those are not there, or damaged."""
    found = set()
    with suppress(ObjectMissing, CheckError), explain_damage(storage.uri(FAILURES_KEY)):
        file = open_parquet(storage, FAILURES_KEY)
        for batch in file.iter_batches(columns=["scene_id", "part", "error_kind"]):
            columns = batch.to_pydict()
            rows = zip(columns["scene_id"], columns["part"], columns["error_kind"], strict=True)
            found |= {(scene_id, part) for scene_id, part, kind in rows if kind == "not_found"}
    return found
