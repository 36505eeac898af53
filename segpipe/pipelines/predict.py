"""The driver of ``segpipe predict`` and ``segpipe evaluate``: plan, run what is missing, report.

The driver holds names and counts, never pixels. Everything it knows it reads from the run folder, so the
same command goes on after any interruption.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from segpipe.config.card import ModelCard
from segpipe.config.recipe import recipe_key
from segpipe.errors import ConfigError, InputError, StorageError, nothing_written
from segpipe.inference.memory import return_freed_pages
from segpipe.masks.plan import PART_SCENES, PlanScene, iter_plan
from segpipe.masks.run import (
    Facts,
    RunInfo,
    adopt,
    adopt_or_create,
    list_parts,
    read_run,
    refuse_other_folder,
    take_back,
)
from segpipe.pipelines.events import Events
from segpipe.pipelines.executor import Executor, start_executor
from segpipe.pipelines.job import Job
from segpipe.pipelines.local import LocalExecutor
from segpipe.pipelines.mask_index import MaskIndex
from segpipe.pipelines.plan import (
    Inspect,
    PlanTotals,
    beyond_limits,
    known_scenes,
    make_plan,
    plan_part,
    still_beyond,
)
from segpipe.pipelines.resources import (
    Hardware,
    Pool,
    check_facts,
    mask_facts,
    plan_pool,
    resolve_facts,
    units_per_task,
)
from segpipe.pipelines.units import PartUnits, Unit, missing_units
from segpipe.pipelines.worker import UnitResult, WorkerSetup
from segpipe.rasters.catalogue import list_scenes
from segpipe.rasters.scene import SceneSource
from segpipe.rasters.scene_list import SceneList
from segpipe.storage import Storage, open_storage
from segpipe.storage.uris import normalize_root
from segpipe.versions import versions_of
from segpipe.wording import Named, counted

_PACKAGES = ("segpipe", "torch", "torchvision", "ray", "pyarrow", "rasterio", "numpy")


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    uri: str
    units: int = 0
    missing: int = 0
    computed: int = 0
    failed_scenes: int = 0
    scenes: int = 0
    max_fraction: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)
    deferred: list[str] = field(default_factory=list)
    """Why units were not committed: the first few reasons."""
    bug: bool = False
    damaged: bool = False
    """Whether units were not committed because a stored object that they need is damaged."""

    @property
    def exit_code(self) -> int:
        if self.bug:
            return 1
        if self.missing:
            return 4 if self.damaged else 3
        # A quotient, for 0.29 * 100 is less than 29.
        return 5 if self.failed_scenes and self.failed_scenes / self.scenes > self.max_fraction else 0


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do."""

    totals: PlanTotals
    known_scenes: int
    units_left: int
    """Of the scenes that are planned already: what is still to be computed."""
    facts: Facts
    pool: Pool


def run_job(job: Job, events: Events, *, need_labels: bool = False) -> Outcome:
    """Make the run whole: plan what is new, compute what is missing, write index, reports and _SUCCESS.

    Raises InputError before anything is written, StorageError when storage refuses later on.
    """
    storage = open_storage(job.output)
    with _scenes(job, need_labels, events) as scenes:
        executor, is_new = start_executor(job.config.cluster, events.warning), False
        try:
            with nothing_written():
                facts, pool, hardware = _resolve(job, storage, executor.hardware)
                asked = _run_info(job, facts)
                info = adopt_or_create(storage, asked)
            is_new = info is asked
            _check_start(job, info, hardware, storage.root)
            index = MaskIndex(open_storage(job.masks_uri)) if job.masks_uri is not None else None
            inspect = _inspector(job, executor, info)
            totals = make_plan(storage, scenes, info.facts, inspect, events, index)
            _announce(totals, scenes, info.card, events)
            if index is not None:
                what = "whose file is not the one that the masks were made from"
                _warn_of(index.other_version, what, events)
                index.close()
            return _complete(job, storage, info, pool, executor, events)
        except InputError:
            # What only a worker sees, weights that do not fit say, is wrong input too: nothing stays written.
            if is_new:
                take_back(storage)
            raise
        finally:
            executor.close()


def plan_job(job: Job, events: Events, *, need_labels: bool = False) -> DryRun:
    """Plan in memory and write nothing; Ray is started only to ask a cluster that is named."""
    storage = open_storage(job.output)
    named = job.config.cluster.address or os.environ.get("RAY_ADDRESS")
    executor = start_executor(job.config.cluster, events.warning) if named else LocalExecutor()
    totals = PlanTotals()
    try:
        with _scenes(job, need_labels, events) as scenes, nothing_written():
            facts, pool, hardware = _resolve(job, storage, executor.hardware)
            existing = read_run(storage)
            if existing is None:
                refuse_other_folder(storage)
            info = adopt(existing, _run_info(job, facts), storage.root)
            _check_start(job, info, hardware, storage.root)
            index = MaskIndex(open_storage(job.masks_uri)) if job.masks_uri is not None else None
            scenes.forget_known(known_scenes(storage, list_parts(storage), index))
            if index is not None:
                index.close()
            inspect = _inspector(job, executor, info)
            done, total = 0, len(scenes)
            for page in scenes.pages(PART_SCENES):
                beyond, found = beyond_limits(scenes, page), inspect([source for source, _ in page])
                plan_part((one for one in found if not still_beyond(one, beyond)), info.facts, totals)
                done += len(page)
                events.planned(done, total)
            _announce(totals, scenes, info.card, events)
            left = sum(map(len, missing_units(storage)[0]))
            return DryRun(totals, scenes.num_known, left, info.facts, pool)
    finally:
        executor.close()


def _check_start(job: Job, info: RunInfo, hardware: Hardware, where: str) -> None:
    """Refuse a later start that would not go on with the same masks and scores."""
    check_facts(info.facts, job.config, hardware, where, of_masks=job.masks is not None)
    if info.masks_uri != job.masks_uri:
        raise InputError(
            f"it scores the masks of {info.masks_uri}, and not of {job.masks_uri}",
            where,
            "Choose another --output.",
        )
    if job.config.input.label_map != info.config["input"]["label_map"]:
        raise ConfigError(
            "label_map is not the one that the run was started with, and its counts stay",
            where,
            "Give that one, or choose another --output.",
        )


def _scenes(job: Job, need_labels: bool, events: Events) -> SceneList:
    with nothing_written():
        scenes = list_scenes(job.config.input, job.output, need_labels=need_labels)
    for note in scenes.notes:
        events.message(note)
    return scenes


def _resolve(job: Job, storage: Storage, hardware: Hardware) -> tuple[Facts, Pool, Hardware]:
    if job.masks is not None:
        hardware = hardware.without_gpus()
        return mask_facts(job.config, job.masks.facts), plan_pool(hardware, job.config), hardware
    existing = read_run(storage)
    pool = plan_pool(hardware, job.config)
    facts = existing.facts if existing else resolve_facts(job.config, job.card, hardware, pool)
    return facts, pool, hardware


def _run_info(job: Job, facts: Facts) -> RunInfo:
    return RunInfo(
        recipe=job.recipe,
        recipe_key=recipe_key(job.recipe),
        facts=facts,
        card=job.card,
        model_sha256=job.model_sha256,
        config=job.config.model_dump(mode="json"),
        versions=versions_of(_PACKAGES),
        masks_uri=job.masks_uri,
    )


def _inspector(job: Job, executor: Executor, info: RunInfo) -> Inspect:
    def inspect(sources: Sequence[SceneSource]) -> Iterable[PlanScene]:
        found = executor.inspect(sources, job.read_config, info.card)
        if job.masks is None:
            return found
        # The masks that are scored were made of the bands that their run was told to take.
        return (replace(scene, bands_named=None) for scene in found)

    return inspect


def _announce(totals: PlanTotals, scenes: SceneList, card: ModelCard, events: Events) -> None:
    if scenes.num_known:
        known = counted(scenes.num_known, "scene")
        events.message(f"{known} planned already, {totals.scenes} new or changed")
    if scenes.num_same_file:
        same = counted(scenes.num_same_file, "scene")
        events.warning(f"{same} planned again with the same file: the label or validity mask is another one")
    what = "under an id that an earlier start had planned from another path"
    _warn_of(scenes.other_path, what, events)
    _warn_of(totals.coarser, "with pixels more than 1.5 x coarser than the model's", events)
    what = "with more bands than the model takes, of which the first are used"
    _warn_of(totals.extra_bands, what, events)
    for names, named in totals.bands_named.items():
        wanted = ", ".join(card.bands)
        what = f"whose bands are named {names} where the model takes {wanted} (set input.bands)"
        _warn_of(named, what, events)


def _warn_of(scenes: Named, what: str, events: Events) -> None:
    if scenes.count:
        events.warning(f"{counted(scenes.count, 'scene')} {what}: {scenes.text()}")


def _complete(
    job: Job, storage: Storage, info: RunInfo, pool: Pool, executor: Executor, events: Events
) -> Outcome:
    outcome = Outcome(job.output, max_fraction=job.config.failures.max_fraction)
    # Absolute: workers may have another working folder.
    model = None if job.config.model is None else normalize_root(job.config.model)
    setup = WorkerSetup(storage.root, info, job.read_config.input, model)
    missing, outcome.units = missing_units(storage)
    num_missing = sum(map(len, missing))
    events.started(outcome.units, num_missing)
    size = units_per_task(num_missing, _mean_unit_px(storage, info), pool.workers)
    tasks = [task for units in missing for task in units.split(size)]
    pool = replace(pool, workers=min(pool.workers, max(1, len(tasks))))
    if tasks and (line := executor.busy(pool.workers, pool.cpus_per_worker, pool.gpus_per_worker)):
        events.warning(line)
    deferred = _consume(executor.run(setup, pool, tasks), outcome, events)
    return_freed_pages()  # listings and reports take what the results took
    lost = [unit for unit in _still_missing(storage, missing) if unit not in deferred]
    if lost:
        events.warning(f"{counted(len(lost), 'unit')} ended with a worker and will run again alone")
        _consume(executor.isolate(setup, pool, lost), outcome, events)
    from segpipe.pipelines.report import make_reports  # not before: the first unit need not wait for it

    outcome.summary, outcome.missing, outcome.units = make_reports(storage, info, executor, events)
    outcome.scenes = outcome.summary["scenes"]["all"]
    outcome.failed_scenes = outcome.summary["scenes"]["failed"] + outcome.summary["scenes"]["partial"]
    return outcome


def _still_missing(storage: Storage, before: Sequence[PartUnits]) -> Iterator[Unit]:
    """Those that were missing before; what another command has planned meanwhile is its own to compute."""
    own = {units.part: units.units for units in before}
    for units in missing_units(storage)[0]:
        if units.part in own:
            yield from PartUnits(units.part, np.intersect1d(units.units, own[units.part]))


def _consume(results: Iterable[UnitResult], outcome: Outcome, events: Events) -> set[Unit]:
    """Count results; a fault that would stop every unit ends the run here."""
    deferred: set[Unit] = set()
    for result in results:
        events.unit(result)
        if result.status == "done":
            outcome.computed += not result.skipped
            continue
        deferred.add((result.part, result.unit))
        outcome.bug = outcome.bug or result.bug
        outcome.damaged = outcome.damaged or result.damaged
        if result.error not in outcome.deferred and len(outcome.deferred) < 5:
            outcome.deferred.append(result.error)
        if result.fatal:
            # The text names the place already, and often what to do.
            goes_on = "The same command goes on where this one stopped."
            raise StorageError(
                result.error.removesuffix("."), fix="" if "same command" in result.error else goes_on
            )
    return deferred


def _mean_unit_px(storage: Storage, info: RunInfo) -> float:
    """Return the mean scene pixels of a unit in the newest part: all parts are cut by the same rule."""
    parts = list_parts(storage)
    if not parts:
        return float(info.facts.unit_px)
    scene_px = units = 0
    for batch in iter_plan(storage, parts[-1], ("height", "width", "first_unit", "units")):
        for row in batch.to_pylist():
            scene_px += (row["height"] or 0) * (row["width"] or 0)
            units = row["first_unit"] + row["units"]
    return scene_px / max(1, units)
