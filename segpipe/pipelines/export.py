"""Exports a finished run as one Cloud-Optimized GeoTIFF a scene.

A plain thread pool does the work: GDAL and zlib let go of the GIL, pixels go from an object to a file and no
further, and one machine writes as fast as its disk or network takes it, so Ray would only add a start-up.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal

import segpipe
from segpipe.errors import CheckError, IncompleteError, InputError, ObjectMissing, StorageRefused
from segpipe.masks.ledger import Replacements, count_part, part_scenes
from segpipe.masks.plan import PlanPart, PlanScene, iter_plan, load_part
from segpipe.masks.run import RunInfo, done_units, list_parts, require_run
from segpipe.masks.scene_masks import StoredUnit
from segpipe.masks.schema import EMPTY, OK
from segpipe.rasters.cog import CogSpec, category_names, full, scratch_bytes, write_cog
from segpipe.storage import Storage, open_storage
from segpipe.threads import map_in_order
from segpipe.wording import Named, counted

EXPORT_FORMAT: Final = 1
"""Raised when an export of the same masks becomes another file."""

_HEAD_BYTES: Final = 128 << 10  # a COG's tags lie before its tile offsets
_KEY_TAG: Final = "SEGPIPE_EXPORT_KEY"

SceneOutcome = Literal["exported", "already_there", "failed", "incomplete", "damaged", "conflict"]

OnProgress = Callable[[int, int], None]
"""Called with (scenes done, scenes to do)."""


@dataclass(frozen=True, slots=True)
class SceneExport:
    """What became of one scene; ``reason`` says why it was left out."""

    scene_id: str
    outcome: SceneOutcome
    reason: str = ""
    pixels: int = 0
    object_bytes: int = 0


@dataclass(slots=True)
class ExportResult:
    """What an export did. The lists hold the first names and the whole count."""

    output: str
    exported: int = 0
    already_there: int = 0
    """Scenes whose file was there before, made from the same masks."""
    pixels: int = 0
    """Pixels of the scenes that were exported now."""
    object_bytes: int = 0
    failed: Named = field(default_factory=Named)
    """Scenes left out because blocks of them failed."""
    incomplete: Named = field(default_factory=Named)
    """Scenes left out because units of them are missing (``partial`` only)."""
    damaged: Named = field(default_factory=Named)
    """Scenes left out because an object of theirs is damaged."""
    conflict: Named = field(default_factory=Named)
    """Scenes whose file was there before, made from other masks, and left as it is; or whose name is too long
    for the output."""

    @property
    def exit_code(self) -> int:
        """0 done (failed and incomplete scenes are named), 4 damaged objects, or other files in the way."""
        return 4 if self.damaged.count or self.conflict.count else 0

    def add(self, scene: SceneExport) -> None:
        """Count one scene."""
        if scene.outcome == "exported":
            self.exported += 1
            self.pixels += scene.pixels
            self.object_bytes += scene.object_bytes
        elif scene.outcome == "already_there":
            self.already_there += 1
        else:
            getattr(self, scene.outcome).add(f"{scene.scene_id}: {scene.reason}")

    def to_tree(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Task:
    """Scenes that share one unit, or one scene of several units."""

    part: PlanPart
    scenes: tuple[PlanScene, ...]
    done: bool
    """Whether all of their units are there."""


def export_run(
    run_uri: str,
    output_uri: str,
    *,
    scenes_glob: str | None = None,
    partial: bool = False,
    workers: int = 2,
    on_progress: OnProgress | None = None,
    on_scene: Callable[[SceneExport], None] | None = None,
) -> ExportResult:
    """Write ``<scene_id>.tif`` for every scene of a run, create-only, with its ``.aux.xml`` beside it.

    A scene is taken from its newest part. ``scenes_glob``: a scene id, or a glob (``*`` matches slashes too).
    ``partial``: export the scenes of an unfinished run that are done, and name the others. ``on_scene`` is
    told of every scene. Raises IncompleteError for an unfinished run, InputError where there is no run or no
    scene matches, StorageError (StorageFull where the scratch folder is too small); then the same call goes
    on where it stopped.
    """
    storage = open_storage(run_uri)
    info = require_run(storage)
    if info.masks_uri is not None:
        raise InputError(
            "this run holds scores and no masks", storage.root, f"Export {info.masks_uri} instead."
        )
    output = open_storage(output_uri)
    if f"{output.root}/".startswith(f"{storage.root}/"):
        raise InputError("the output lies in the run itself", output.root, "Give another --output.")
    run = _Run(storage, info, scenes_glob)
    total = run.check(partial)
    result = ExportResult(output.root)
    done = 0
    with tempfile.TemporaryDirectory(prefix="segpipe-export-") as folder:
        exporter = _Exporter(storage, info, output, Path(folder))
        for scenes in map_in_order(exporter.export, run.tasks(), workers):
            for scene in scenes:
                result.add(scene)
                done += 1
                if on_scene is not None:
                    on_scene(scene)
                if on_progress is not None:
                    on_progress(done, total)
    return result


class _Run:
    """The scenes to export, streamed from the plan."""

    def __init__(self, storage: Storage, info: RunInfo, scenes_glob: str | None) -> None:
        self._storage = storage
        self._info = info
        self._glob = scenes_glob
        self._parts = list_parts(storage)
        self._replacements = Replacements(storage, self._parts)

    def check(self, partial: bool) -> int:
        """Return how many scenes there are to export; InputError for none, IncompleteError if unfinished."""
        if not self._parts:
            raise IncompleteError("nothing is planned yet", self._storage.root, "Run its command again.")
        scenes = units = missing = 0
        for number in self._parts:
            part = load_part(self._storage, number, self._info.facts)
            count = count_part(part)
            units += count.units
            missing += count.units - sum(done_units(self._storage, number, count.units))
            scenes += self._count_scenes(number)
        if missing and not partial:
            raise IncompleteError(
                f"{missing} of {counted(units, 'unit')} missing",
                self._storage.root,
                "Run its command again to finish it, or export what is done with --partial.",
            )
        if scenes == 0:
            raise InputError(f"no scene matches {self._glob!r}", self._storage.root, "Change --scenes.")
        return scenes

    def _count_scenes(self, number: int) -> int:
        replaced = self._replacements.of(number)
        names = (
            name
            for batch in iter_plan(self._storage, number, ["scene_id"])
            for name in batch.column(0).to_pylist()
        )
        return sum(self._wants(name) and name not in replaced for name in names)

    def _wants(self, scene_id: str) -> bool:
        """Whether to export it; an id is taken literally too, since ids may hold brackets."""
        return self._glob is None or scene_id == self._glob or fnmatchcase(scene_id, self._glob)

    def tasks(self) -> Iterator[_Task]:
        """Iterate over the work in plan order."""
        for number in self._parts:
            part = load_part(self._storage, number, self._info.facts)
            replaced = self._replacements.of(number)
            done = done_units(self._storage, number, part.num_units)
            group: list[PlanScene] = []
            for scene in part_scenes(part):
                if scene.source.scene_id in replaced or not self._wants(scene.source.scene_id):
                    continue
                if group and (scene.units > 1 or scene.first_unit != group[0].first_unit):
                    yield _task(part, group, done)
                    group = []
                group.append(scene)
                if scene.units > 1:
                    yield _task(part, group, done)
                    group = []
            if group:
                yield _task(part, group, done)


def _task(part: PlanPart, scenes: Sequence[PlanScene], done: Sequence[int]) -> _Task:
    first, last = scenes[0].first_unit, scenes[-1].first_unit + scenes[-1].units
    return _Task(part, tuple(scenes), all(done[first:last]))


class _OpenUnit:
    """Keeps the last opened mask object: scenes that share a unit open it once."""

    def __init__(self, storage: Storage, part: PlanPart) -> None:
        self._storage = storage
        self._part = part
        self._unit = -1
        self._stored: StoredUnit | None = None

    def get(self, unit: int) -> StoredUnit:
        """Return the open object of ``unit`` and close the one before."""
        if self._stored is None or unit != self._unit:
            self.close()
            self._stored, self._unit = StoredUnit(self._storage, self._part, unit), unit
        return self._stored

    def close(self) -> None:
        """Close what is open; may be called again."""
        if self._stored is not None:
            self._stored.close()
            self._stored = None


class _Exporter:
    """Exports scenes; may be used from several threads."""

    def __init__(self, storage: Storage, info: RunInfo, output: Storage, folder: Path) -> None:
        self._storage = storage
        self._info = info
        self._output = output
        self._folder = folder
        self._names = category_names(info.card.classes)
        self._lock = threading.Lock()
        self._reserved_bytes = 0
        self._serial = 0

    def export(self, task: _Task) -> list[SceneExport]:
        """Export the scenes of one task; faults of single scenes are outcomes."""
        with closing(_OpenUnit(self._storage, task.part)) as opened:
            return [self._export_or_name(task, scene, opened) for scene in task.scenes]

    def _export_or_name(self, task: _Task, scene: PlanScene, opened: _OpenUnit) -> SceneExport:
        """Export a scene; one whose name is too long for the output is an outcome, no end of the export."""
        try:
            return self._export_scene(task, scene, opened)
        except InputError as error:
            self._output.stat("any.tif")  # raises where the output itself is at fault
            return SceneExport(scene.source.scene_id, "conflict", str(error))

    def _export_scene(self, task: _Task, scene: PlanScene, opened: _OpenUnit) -> SceneExport:
        scene_id = scene.source.scene_id
        if scene.header is None:
            return SceneExport(scene_id, "failed", scene.error_kind or "header")
        if not task.done:
            return SceneExport(scene_id, "incomplete", "units are missing")
        export_key = self._export_key(scene)
        there = self._there(scene_id, export_key)
        if there is not None:
            return there
        try:
            return self._write_scene(scene, export_key, opened)
        except ObjectMissing as error:
            return SceneExport(scene_id, "incomplete", str(error))
        except CheckError as error:
            return SceneExport(scene_id, "damaged", str(error))

    def _export_key(self, scene: PlanScene) -> str:
        """Return what tells exports apart: which masks, of which scene, in which format.

        Other labels make other scores and the same masks.
        """
        source, info = scene.source, self._info
        versions = [None if each is None else str(each) for each in (source.version, source.valid_version)]
        facts = asdict(replace(info.facts, block_px=0, unit_px=0))  # these two change no mask
        asked = [EXPORT_FORMAT, info.recipe_key, facts, source.scene_id, versions]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _there(self, scene_id: str, export_key: str) -> SceneExport | None:
        """What a file of the scene's name is, where there is one."""
        key = f"{scene_id}.tif"
        info = self._output.stat(key)
        if info is None:
            return None
        head = self._output.read_range(key, 0, min(info.size_bytes, _HEAD_BYTES))
        if export_key.encode() in head:
            return SceneExport(scene_id, "already_there")
        if _KEY_TAG.encode() in head:
            return SceneExport(scene_id, "conflict", "the file that is there was made from other masks")
        return SceneExport(scene_id, "conflict", "the file that is there is no export of segpipe")

    def _write_scene(self, scene: PlanScene, export_key: str, opened: _OpenUnit) -> SceneExport:
        scene_id, header = scene.source.scene_id, scene.header
        assert header is not None
        units = range(scene.first_unit, scene.first_unit + scene.units)
        png_bytes = covered_px = 0
        for unit in units:
            stored = opened.get(unit)
            png_bytes += stored.mask_bytes(scene_id)
            for block in stored.blocks(scene_id):
                if block.status not in (OK, EMPTY):
                    return SceneExport(scene_id, "failed", block.error_kind or block.status)
                covered_px += block.window.num_px
        num_px = header.height * header.width
        if covered_px != num_px:
            raise CheckError(f"its blocks cover {covered_px} of {num_px} pixels", scene_id)
        spec = CogSpec(
            header.height,
            header.width,
            self._info.card.classes,
            header.crs,
            header.transform,
            self._tags(scene, export_key),
        )
        masks = (block for unit in units for block in opened.get(unit).masks(scene_id))
        with self._scratch(scratch_bytes(num_px, png_bytes)) as name:
            path = write_cog(spec, masks, self._folder, name)
            object_bytes = path.stat().st_size
            try:
                # First: a GeoTIFF that is there has its names beside it.
                named = self._put_names(f"{scene_id}.tif.aux.xml")
                made = named and self._output.put_file_if_absent(f"{scene_id}.tif", path)
            except ObjectMissing as error:  # not one of the run's
                fix = "Choose another --output."
                raise StorageRefused("nothing can be written there", self._output.root, fix) from error
            finally:
                path.unlink(missing_ok=True)
        if not made:  # another export was quicker, of this run or of another
            there = self._there(scene_id, export_key)
            return there or SceneExport(scene_id, "conflict", "class names of another model are there")
        return SceneExport(scene_id, "exported", "", num_px, object_bytes)

    def _put_names(self, key: str) -> bool:
        """Whether the class names are there now; not where those of other classes were left behind."""
        return self._output.put_if_absent(key, self._names) or self._output.read(key) == self._names

    def _tags(self, scene: PlanScene, export_key: str) -> dict[str, str]:
        source = scene.source
        tags = {
            "SEGPIPE_VERSION": segpipe.__version__,
            _KEY_TAG: export_key,
            "SEGPIPE_RECIPE_KEY": self._info.recipe_key,
            "SEGPIPE_MODEL_SHA256": self._info.model_sha256,
            "SEGPIPE_SCENE_ID": source.scene_id,
            "SEGPIPE_SOURCE": _without_query(source.where),
            "SEGPIPE_SOURCE_VERSION": str(source.version),
        }
        if scene.datetime is not None:
            tags["SEGPIPE_SOURCE_DATETIME"] = scene.datetime
        return tags

    @contextmanager
    def _scratch(self, need_bytes: int) -> Iterator[str]:
        """Reserve scratch space for one scene and name its file; StorageFull where there is too little."""
        with self._lock:
            # What running scenes have written is gone from the free space, and reserved as well.
            written_bytes = sum(map(_disk_bytes, Path(self._folder).iterdir()))
            free_bytes = shutil.disk_usage(self._folder).free + written_bytes - self._reserved_bytes
            if free_bytes < need_bytes:
                what = f"{need_bytes} bytes of scratch space are needed, {max(free_bytes, 0)} are free"
                raise full(self._folder, what)
            self._reserved_bytes += need_bytes
            self._serial += 1
            name = f"{self._serial}.tif"
        try:
            yield name
        finally:
            with self._lock:
                self._reserved_bytes -= need_bytes


def _disk_bytes(path: Path) -> int:
    with suppress(FileNotFoundError):  # its scene has just ended
        return path.stat().st_blocks * 512
    return 0


def _without_query(uri: str) -> str:
    """Leave out what follows a ``?`` of a URI: signed links carry their signature there."""
    return uri.split("?", 1)[0] if "://" in uri else uri
