"""From the inputs of a job to all scenes of the archive, each with its label, its mask and their versions."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa

from segpipe.config.model import InputConfig
from segpipe.errors import ConfigError, InputError
from segpipe.rasters.catalogue_file import CatalogueFile, CatalogueRow, open_catalogue
from segpipe.rasters.listing import (
    Input,
    below,
    classify_input,
    is_run_file,
    is_scene_file,
    list_file_lines,
    list_objects,
)
from segpipe.rasters.scene import Version
from segpipe.rasters.scene_ids import (
    SHARD_SUFFIXES,
    check_scene_id,
    has_suffix,
    is_unicode,
    printable,
    scene_id_of,
)
from segpipe.rasters.scene_list import SceneList, scratch_explained
from segpipe.rasters.shards import is_catalogue, list_members
from segpipe.rasters.spool import Draft, Spool
from segpipe.rasters.templates import PathTemplate, parse_template, resolve_uri
from segpipe.rasters.versions import pin_versions
from segpipe.storage import ObjectInfo, join_uri, open_storage
from segpipe.wording import counted, few

MASK_SUFFIX: Final = ".msk"
"""``NAME.tif.msk`` is the validity mask of ``NAME.tif``."""

_THREADS: Final = 16


def list_scenes(config: InputConfig, output: str | None, *, need_labels: bool) -> SceneList:
    """All scenes of ``config.scenes``, in plan order, in a temporary database (close the list to free it).

    ``output``: the run's own folder, never taken for input. ``need_labels``: there must be a label template
    or labels in a catalogue or shard. Raises ``InputError`` for inputs that match nothing, missing scenes,
    labels or masks, ids that are unsafe or not unique, damaged shards and catalogues; ``ConfigError`` for
    templates; storage errors as they come.
    """
    if not config.scenes:
        raise ConfigError("no input is named", "inputs", "Name a folder, a glob, files or a catalogue.")
    with scratch_explained():
        spool = Spool()
        try:
            return _Builder(config, output, spool).build(need_labels)
        except BaseException:
            spool.close()
            raise


class _Builder:
    """The steps of ``list_scenes``."""

    def __init__(self, config: InputConfig, output: str | None, spool: Spool) -> None:
        self.config, self.spool = config, spool
        self.output = open_storage(output).root + "/" if output else None
        self.labels = parse_template(config.labels, "labels") if config.labels else None
        self.mask_template = parse_template(config.valid, "valid") if "{" in config.valid else None
        self.auto_masks = config.valid == "auto"
        self.ranked = self.names_files = False
        self.seen: list[str] = []
        self.runs: list[str] = []
        self.schemas: list[tuple[str, pa.Schema]] = []
        self.notes: list[str] = []
        self.idle_globs = {*config.include, *config.exclude}

    def build(self, need_labels: bool) -> SceneList:
        inputs = _look_at_all(self.config.scenes)
        self.ranked = any(source.kind == "catalogue" for source in inputs)
        self.names_files = self.ranked or any(source.kind == "list_file" for source in inputs)
        for rank, source in enumerate(inputs):
            if self.output and f"{source.uri.rstrip('/')}/".startswith(self.output):
                raise InputError("the input lies in the output", source.text, "Choose another --output.")
            before = self.spool.num_added
            self._add_input(source, rank)
            if self.spool.num_added == before:
                raise InputError("no scene there", source.text, _NOTHING_HINTS[source.kind])
        self.spool.index()
        self._drop()
        self._pin_scenes()
        self._expand_shards()
        if self.idle_globs:
            globs = few(sorted(map(printable, self.idle_globs)))
            self.notes.append(f"no scene matches {globs} of input.include and input.exclude")
        self.spool.check_ids()
        if need_labels and not self.spool.count("label IS NOT NULL"):
            fix = "Give --labels with a template, or a catalogue with a label column."
            raise ConfigError("no scene has a label", "labels", fix)
        self._pin_labels()
        self._pin_masks()
        return self.spool.finish(self._extra_schema(), self.notes)

    def _add_input(self, source: Input, rank: int) -> None:
        rank = rank if self.ranked else 0
        if source.kind == "listing":
            self._add_listing(source, rank)
        elif source.kind == "object":
            self._add(Draft(scene_id_of(source.key), source.uri, source.version, rank))
        elif source.kind == "list_file":
            for text in list_file_lines(source):
                uri = resolve_uri(text, source.base)
                self._add(Draft(scene_id_of(below(source.base, uri)), uri, None, rank))
        else:
            catalogue = open_catalogue(source.uri, source.version or Version(0, ""))
            self.schemas.append((source.uri, catalogue.extra))
            for row in catalogue.rows():
                self._add_row(catalogue, row, source.base, rank)

    def _add_listing(self, source: Input, rank: int) -> None:
        storage = open_storage(source.base)
        root = storage.root
        for page in list_objects(source):
            self.spool.add_objects(root, (info for info in page if self._may_be_named(info)))
            for info in page:
                uri = join_uri(root, info.key)
                if is_run_file(storage, info):
                    self.runs.append(uri.rpartition("/")[0])
                elif is_scene_file(info.key, source) and not (self.output and uri.startswith(self.output)):
                    version = Version(info.size_bytes, info.etag)
                    self._add(Draft(scene_id_of(info.key), uri, version, rank, listed=True))
        self.seen.append(f"{root.rstrip('/')}/{source.prefix}")

    def _may_be_named(self, info: ObjectInfo) -> bool:
        """Whether a list file, a catalogue or a template may name it: below `seen` these are all known."""
        if not is_unicode(info.key):
            return False  # the database takes no such name, and no template gives one
        if self.names_files or self.labels is not None or self.mask_template is not None:
            return True
        return self.auto_masks and info.key.endswith(MASK_SUFFIX)

    def _add_row(self, catalogue: CatalogueFile, row: CatalogueRow, base: str, rank: int) -> None:
        where = f"{catalogue.uri}, row {row.number}"
        uri = resolve_uri(row.uri, base)
        draft = Draft(
            row.scene_id if row.scene_id is not None else scene_id_of(below(base, uri)),
            uri,
            rank=rank,
            row=row.number,
            label_uri=resolve_uri(row.label, base) if row.label else None,
            valid_uri=resolve_uri(row.valid, base) if row.valid and self._reads_masks() else None,
            datetime=row.datetime,
            extra=row.extra,
        )
        if has_suffix(uri, SHARD_SUFFIXES) and (row.label or row.valid):
            raise InputError("a label or mask for a whole shard", where, "Leave the cell empty.")
        self._add(draft, own_label=catalogue.has_labels, own_mask=catalogue.has_masks, where=where)

    def _reads_masks(self) -> bool:
        return self.auto_masks or self.mask_template is not None

    def _add(self, draft: Draft, own_label: bool = False, own_mask: bool = False, where: str = "") -> None:
        """Add a scene or a shard, with the paths of its label and mask where nothing else gives them."""
        check_scene_id(draft.scene_id, where or draft.uri)
        if has_suffix(draft.uri, SHARD_SUFFIXES):
            excluded = self._matches(draft.scene_id, self.config.exclude)
            self.spool.add(replace(draft, shard=True, keep=not excluded))
            return
        self.spool.add(self._completed(draft, own_label, own_mask))

    def _completed(self, draft: Draft, own_label: bool, own_mask: bool, key: str | None = None) -> Draft:
        """The draft with template paths filled in; ``key`` names a member inside its shard."""
        changes: dict[str, Any] = {"keep": self._picked(draft.scene_id)}
        if not own_label and draft.label_uri is None:
            changes["label_uri"] = _fill(self.labels, draft, key)
        if not own_mask and draft.valid_uri is None:
            if self.mask_template is not None:
                changes["valid_uri"] = _fill(self.mask_template, draft, key)
            elif self.auto_masks and draft.member is None:
                changes |= {"valid_uri": draft.uri + MASK_SUFFIX, "valid_optional": True}
        return replace(draft, **changes)

    def _picked(self, scene_id: str) -> bool:
        excluded = self._matches(scene_id, self.config.exclude)
        return (not self.config.include or self._matches(scene_id, self.config.include)) and not excluded

    def _matches(self, scene_id: str, globs: Sequence[str]) -> bool:
        found = [glob for glob in globs if fnmatch.fnmatchcase(scene_id, glob)]
        self.idle_globs.difference_update(found)
        return bool(found)

    def _drop(self) -> None:
        """Take out runs, labels and masks among the listed files, then what was not picked."""
        for folder in self.runs:
            self._note(self.spool.drop_below(folder), f"below {folder}, the folder of a run")
        self._refuse_none_left(f"all of it lies in the folders of runs: {few(self.runs)}")
        self._note(self.spool.drop_named(), "named by the template of labels or masks")
        self._refuse_none_left("the template of labels or masks names the scenes themselves")
        self._note(self.spool.drop_unpicked(), "by input.include and input.exclude")
        self._refuse_none_left("input.include and input.exclude leave no scene")
        self.spool.drop_repeats()
        self.spool.check_files()

    def _note(self, count: int, why: str) -> None:
        if count:
            self.notes.append(f"left out {counted(count, 'file')} {why}")

    def _refuse_none_left(self, why: str) -> None:
        if not self.spool.count():
            raise InputError(why, "inputs", "Correct the input or the template.")

    def _pin_scenes(self) -> None:
        missing = pin_versions(self.spool, "uri", self.seen)
        if missing.count:
            what = f"no such file: {missing.text(with_ids=False)}"
            raise InputError(what, "inputs", "Correct the paths or take them out.")

    def _expand_shards(self) -> None:
        for shard in self.spool.shards():
            if has_suffix(shard.uri, (".parquet",)) and is_catalogue(shard.uri, _pinned(shard)):
                fix = "Name it as an input of its own, or leave it out."
                raise InputError("a catalogue (it has a uri column) lies among the scenes", shard.uri, fix)
            self._expand(shard)
        self.spool.drop_shards()
        self._refuse_none_left("input.include and input.exclude leave no scene")

    def _expand(self, shard: Draft) -> None:
        version, first, num_members = _pinned(shard), self.spool.next_row(), 0
        for member in list_members(shard.uri, version):
            scene_id = check_scene_id(f"{shard.scene_id}/{member.key}", f"{shard.uri}!{member.member}")
            draft = Draft(
                scene_id,
                shard.uri,
                version,
                shard.rank,
                shard.row,
                sort=f"{shard.scene_id}/{num_members:010d}",
                member=member.member,
                offset=member.offset,
                length=member.length,
                label_uri=shard.uri if member.has_label else None,
                label_version=version if member.has_label else None,
                label_offset=member.label_offset,
                label_length=member.label_length,
                datetime=shard.datetime,
                extra_text=shard.extra_text,
            )
            num_members += 1
            if self._picked(scene_id):
                self.spool.add(self._completed(draft, own_label=False, own_mask=False, key=member.key))
        if not num_members:
            raise InputError("the shard holds no row", shard.uri, "Leave it out.")
        self.spool.set_members(shard.uri, num_members, first)

    def _pin_labels(self) -> None:
        missing = pin_versions(self.spool, "label", self.seen)
        if missing.count:
            of = counted(self.spool.count(), "scene")
            what = f"no label for {missing.count} of {of}: {missing.text(with_ids=True)}"
            fix = "Correct the template, or give a catalogue whose label is empty where there is none."
            raise InputError(what, "labels", fix)

    def _pin_masks(self) -> None:
        missing = pin_versions(self.spool, "valid", self.seen)
        if missing.count:
            of = counted(self.spool.count(), "scene")
            what = f"no mask for {missing.count} of {of}: {missing.text(with_ids=True)}"
            raise InputError(what, "valid", "Correct the template or the catalogue.")

    def _extra_schema(self) -> pa.Schema:
        """One schema over all catalogues. Raises ``InputError`` where two disagree beyond widening."""
        whole = pa.schema([])
        for uri, schema in self.schemas:
            try:
                whole = pa.unify_schemas([whole, schema], promote_options="permissive")
            except pa.ArrowException as error:
                text = " ".join(str(error).split())[:200]
                raise InputError(
                    f"its columns do not fit the other catalogues': {text}", uri, "Align them."
                ) from None
        return whole


_NOTHING_HINTS: Final = {
    "listing": "Scenes end with .tif, .tiff, .png, .jpg, .jpeg, .webp, .tar or .parquet; hidden files and "
    "the output are passed over.",
    "list_file": "Write one path or URI a line.",
    "catalogue": "Write one row per scene.",
    "object": "",
}


def _look_at_all(texts: Sequence[str]) -> list[Input]:
    """Look at all inputs, several at a time. Raises ``InputError`` that counts those that are not there."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(classify_input, texts))
    absent = [text for text, source in zip(texts, found, strict=True) if source is None]
    if absent:
        what = f"no such file, or a folder or prefix with nothing in it: {few(list(map(printable, absent)))}"
        raise InputError(what, "inputs", "Correct the path; a glob needs quotes in a shell.")
    return [source for source in found if source is not None]


def _fill(template: PathTemplate | None, draft: Draft, key: str | None) -> str | None:
    return None if template is None else template.fill(draft.scene_id, draft.uri, key)


def _pinned(shard: Draft) -> Version:
    if shard.version is None:
        raise ValueError(f"{shard.uri} has no version yet")
    return shard.version
