"""Checking one stored unit against the plan: its file, its rows, its counts and, if asked, its masks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.errors import CheckError, ObjectMissing
from segpipe.geometry.georef import shift
from segpipe.geometry.grid import Window
from segpipe.masks.codec import check_mask, decode_mask
from segpipe.masks.damage import explain_damage, open_parquet
from segpipe.masks.ledger import DAMAGED, MISSING, SUPERSEDED, Tally
from segpipe.masks.plan import PlanPart, PlanScene
from segpipe.masks.run import RunInfo, unit_key
from segpipe.masks.schema import COUNT_COLUMNS, EMPTY, FAILED, MASK_FIELDS, OK, mask_schema
from segpipe.masks.write import encode_unit
from segpipe.metrics.counts import class_counts
from segpipe.storage import Storage

_REWRITE_BYTES: Final = 64 << 20  # larger ones are nearly all masks, which carry their own checksums
_MASK_ROWS: Final = 4  # masks that are in memory at a time
_NO_WINDOW: Final = Window(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Expected:
    """One row that the plan wants."""

    scene: PlanScene
    window: Window

    def columns(self, part: int, unit: int) -> dict[str, Any]:
        """Return the row's columns whose values follow from the plan."""
        header = self.scene.header
        return {
            "scene_id": self.scene.source.scene_id,
            "uri": self.scene.source.where,
            "version": self.scene.source.version_text,
            "part": part,
            "unit": unit,
            "row_off": self.window.row_off,
            "col_off": self.window.col_off,
            "height": self.window.height,
            "width": self.window.width,
            "scene_height": header.height if header else None,
            "scene_width": header.width if header else None,
            "datetime": self.scene.datetime,
            "label_uri": self.scene.source.label_uri,
        }


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What became of one planned unit. ``fault``: why its object is damaged; None also when missing."""

    part: int
    unit: int
    missing: bool
    fault: str | None
    tallies: tuple[Tally, ...]


class UnitChecker:
    """Checks units of one run; may be used from several threads."""

    def __init__(self, storage: Storage, info: RunInfo, full: bool) -> None:
        self._storage = storage
        self._info = info
        self._full = full
        self._rewrites = False

    def learn(self, part: int, unit: int) -> bool:
        """Find out from one object whether this machine writes a unit's rows into the same bytes again.

        Then ``check`` compares all bytes in full checks. It need not be so: another build of the compression
        library packs the same rows in another way.
        """
        key = unit_key(part, unit)
        with suppress(CheckError, ObjectMissing), explain_damage(key):
            data = self._storage.read(key)
            self._rewrites = len(data) <= _REWRITE_BYTES and self._rewritten(data) == data
        return self._rewrites

    @cached_property
    def _schema(self) -> Any:
        return mask_schema(self._info.recipe_key, self._info.card.classes)

    def check(self, part: PlanPart, unit: int, size_bytes: int | None, superseded: Set[str]) -> UnitReport:
        """Check one unit; ``size_bytes`` None = the listing has no object. Storage's errors are raised."""
        expected = list(expected_rows(part, unit))
        statuses: list[tuple[str, str | None]]
        fault = None
        missing = size_bytes is None
        if size_bytes is not None:
            try:
                statuses = self._check_object(part.part, unit, size_bytes, expected)
            except ObjectMissing:
                missing = True  # gone since it was listed
            except CheckError as error:
                fault = error.what
        if missing or fault is not None:
            statuses = [(MISSING if missing else DAMAGED, None)] * len(expected)
        else:
            names = (item.scene.source.scene_id for item in expected)
            statuses = [
                (SUPERSEDED, None) if name in superseded else status
                for name, status in zip(names, statuses, strict=True)
            ]
        return UnitReport(part.part, unit, missing, fault, tuple(_tallies(expected, statuses)))

    def _check_object(
        self, part: int, unit: int, size_bytes: int, expected: Sequence[Expected]
    ) -> list[tuple[str, str | None]]:
        """Return (status, kind) of each row; CheckError with the first fault."""
        key = unit_key(part, unit)
        where = self._storage.uri(key)
        with explain_damage(where), open_parquet(self._storage, key, size_bytes, check_pages=True) as file:
            self._check_file(file)
            present = set(file.schema_arrow.names)
            columns = [name for name in COUNT_COLUMNS if name in present]
            table = file.read(columns=columns, use_threads=False)
            if table.num_rows != len(expected):
                raise CheckError(f"it holds {table.num_rows} rows, the plan says {len(expected)}", where)
            rows = _count_rows(table)
            for index, (row, item) in enumerate(zip(rows, expected, strict=True)):
                try:
                    _check_place(row, item, part, unit)
                    self._check_counts(row, item)
                except CheckError as error:
                    name = item.scene.source.scene_id
                    raise CheckError(f"row {index} ({name}): {error.what}", where) from None
            if self._info.masks_uri is None:
                self._check_masks(file, rows)
        if self._full and self._rewrites and size_bytes <= _REWRITE_BYTES:
            data = self._storage.read(key)
            with explain_damage(where):
                if self._rewritten(data) != data:
                    raise CheckError("its bytes are not those that its rows are written as", where)
        return [(row["status"], row["error_kind"]) for row in rows]

    def _rewritten(self, data: bytes) -> bytes:
        """Return the bytes that the object's rows are written as."""
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        return encode_unit(table.to_pylist(), self._schema)

    def _check_file(self, file: Any) -> None:
        """Check schema and file metadata against what this run writes."""
        schema = file.schema_arrow
        for field in MASK_FIELDS:
            index = schema.get_field_index(field.name)
            if index < 0:
                if not field.nullable:
                    raise CheckError(f"it has no column {field.name!r}")
            elif not _same_type(schema.field(index).type, field.type):
                raise CheckError(f"column {field.name!r} is {schema.field(index).type}, not {field.type}")
        found = file.metadata.metadata or {}
        wanted = self._schema.metadata
        if found.get(b"segpipe.recipe_key") != wanted[b"segpipe.recipe_key"]:
            raise CheckError("it was made by another recipe than run.json says")
        for name, value in wanted.items():
            text = name.decode()
            if name not in found:
                raise CheckError(f"its file metadata lacks {text!r}")
            # Other versions may describe the columns in other words; those must only be readable.
            if found[name] != value and name.startswith(b"segpipe."):
                raise CheckError(f"its file metadata {text!r} is not what this run writes")
            if not name.startswith(b"segpipe."):
                json.loads(found[name])

    def _check_counts(self, row: dict[str, Any], item: Expected) -> None:
        """Check one row's counts against its status and against each other."""
        status, valid_px, class_px = row["status"], row["valid_px"], row["class_px"]
        source = item.scene.source
        labelled = source.label_uri is not None or source.label_offset is not None
        compared = [row["compared_px"], row["confusion_px"]]
        if status == FAILED:
            if not row["error_kind"] or row["class_px"] is not None or row["confusion_px"] is not None:
                raise CheckError("a failed row has counts, or no error_kind")
            if valid_px != 0:
                raise CheckError(f"a failed row has {valid_px} valid pixels")
        elif status in (OK, EMPTY):
            if item.scene.header is None:
                raise CheckError(f"status {status} where no header could be read")
            if class_px is None or len(class_px) != self._info.card.num_classes or None in class_px:
                raise CheckError(f"class_px must hold {self._info.card.num_classes} counts")
            if min(class_px) < 0 or sum(class_px) != valid_px:
                raise CheckError(f"class_px add up to {sum(class_px)}, valid_px is {valid_px}")
            if not (0 < valid_px <= item.window.num_px if status == OK else valid_px == 0):
                raise CheckError(f"status {status} with {valid_px} of {item.window.num_px} pixels valid")
            if row["error_kind"] is not None:
                raise CheckError(f"status {status} with an error_kind")
            if labelled and (None in compared or row["label_px"] is None):
                raise CheckError("the scene has a label, but its counts are missing")
        if not labelled and [*compared, row["label_px"]] != [None] * 3:
            raise CheckError("label counts where the plan has no label")
        _check_label_counts(row, item.window, self._info.card.num_classes)

    def _check_masks(self, file: Any, rows: Sequence[dict[str, Any]]) -> None:
        """Check every mask's checksums and size, in full checks its pixels too, a few masks at a time."""
        if "mask" not in file.schema_arrow.names:
            raise CheckError("it has no column 'mask'")
        index = 0
        for batch in file.iter_batches(batch_size=_MASK_ROWS, columns=["mask"], use_threads=False):
            for png in batch.column(0).to_pylist():
                try:
                    self._check_mask(png, rows[index])
                except (CheckError, ValueError) as error:
                    what = error.what if isinstance(error, CheckError) else str(error)
                    raise CheckError(f"row {index} ({rows[index]['scene_id']}): {what}") from None
                index += 1

    def _check_mask(self, png: bytes | None, row: dict[str, Any]) -> None:
        if row["status"] not in (OK, EMPTY):
            if row["status"] == FAILED and png is not None:
                raise CheckError("a failed row has a mask")
            return
        if png is None:
            raise CheckError(f"status {row['status']} without a mask")
        mask = decode_mask(png) if self._full else None
        shape = check_mask(png) if mask is None else mask.shape
        if shape != (row["height"], row["width"]):
            raise CheckError(f"the mask is {shape}, the window ({row['height']}, {row['width']})")
        if mask is None:
            return
        class_px, _ = class_counts(mask, self._info.card.num_classes)
        if class_px.tolist() != row["class_px"]:
            raise CheckError(f"the mask holds {class_px.tolist()} pixels a class, class_px {row['class_px']}")


def expected_rows(part: PlanPart, unit: int) -> Iterator[Expected]:
    """Iterate over the rows that the plan wants in one unit, in order."""
    for item in part.unit(unit):
        if item.scene.header is None:
            yield Expected(item.scene, _NO_WINDOW)
        for block in item.blocks:
            yield Expected(item.scene, block.window)


def _tallies(expected: Sequence[Expected], statuses: Sequence[tuple[str, str | None]]) -> list[Tally]:
    """Add up neighbouring rows of one scene and one status."""
    found: list[Tally] = []
    for item, (status, kind) in zip(expected, statuses, strict=True):
        name, header = item.scene.source.scene_id, item.scene.header
        blocks, pixels = 1, item.window.num_px
        if found and (found[-1].scene_id, found[-1].status, found[-1].kind) == (name, status, kind):
            last = found.pop()
            blocks, pixels = blocks + last.blocks, pixels + last.pixels
        found.append(Tally(name, status, kind, blocks, pixels, header.pixel_m if header else None))
    return found


_ROW_COLUMNS: Final = (
    *("scene_id", "uri", "version", "part", "unit", "row_off", "col_off", "height", "width"),
    *("scene_height", "scene_width", "datetime", "crs", "transform", "valid_px", "class_px"),
    *("label_uri", "label_px", "compared_px", "status", "error_kind"),
)


def _count_rows(table: Any) -> list[dict[str, Any]]:
    """Return the rows as dicts; of the confusion only its pixel counts and the largest class."""
    present = [name for name in _ROW_COLUMNS if name in table.column_names]
    rows = table.select(present).to_pylist()
    absent = dict.fromkeys(name for name in _ROW_COLUMNS if name not in present)
    confusion = table["confusion"].combine_chunks() if "confusion" in table.column_names else None
    if isinstance(confusion, pa.ChunkedArray):
        confusion = pa.concat_arrays(confusion.chunks) if confusion.num_chunks else None
    if confusion is None or confusion.null_count == len(confusion):
        return [{**absent, **row, "confusion_px": None, "confusion_classes": (0, 0)} for row in rows]
    pairs, offsets = confusion.values, confusion.offsets.to_numpy()
    if any(pairs.field(name).null_count for name in ("label", "predicted", "px")):
        raise CheckError("the confusion holds nulls")
    px = pairs.field("px").to_numpy()
    classes = np.stack([pairs.field(name).to_numpy() for name in ("label", "predicted")])
    for index, row in enumerate(rows):
        cells = slice(offsets[index], offsets[index + 1])
        known = confusion[index].is_valid
        row |= absent
        row["confusion_px"] = sum(px[cells].tolist()) if known else None
        row["confusion_classes"] = (0, 0)
        if known and px[cells].size:
            row["confusion_classes"] = (int(classes[:, cells].min()), int(classes[:, cells].max()))
            if px[cells].min() < 1:
                row["confusion_px"] = -1  # zeros are left out, so any is a fault
    return rows


def _check_place(row: dict[str, Any], item: Expected, part: int, unit: int) -> None:
    """Check that a row is the planned one and lies where the plan says."""
    for name, wanted in item.columns(part, unit).items():
        if row[name] != wanted:
            raise CheckError(f"{name} is {row[name]!r}, the plan says {wanted!r}")
    header = item.scene.header
    crs = header.crs if header else None
    if row["crs"] is not None and row["crs"] != crs:
        raise CheckError(f"crs is {row['crs']!r}, the plan says {crs!r}")
    if row["transform"] is not None:
        transform = header.transform if header else None
        placed = list(shift(transform, item.window)) if transform is not None else None
        if row["transform"] != placed:
            raise CheckError(f"transform is {row['transform']}, the plan says {placed}")


def _check_label_counts(row: dict[str, Any], window: Window, num_classes: int) -> None:
    label_px, compared_px, confusion_px = row["label_px"], row["compared_px"], row["confusion_px"]
    if label_px is not None and not 0 <= label_px <= window.num_px:
        raise CheckError(f"label_px is {label_px} in a window of {window.num_px} pixels")
    if confusion_px is None:
        return
    if compared_px is None or label_px is None or not 0 <= compared_px <= min(label_px, row["valid_px"]):
        raise CheckError(f"compared_px is {compared_px}, label_px {label_px}, valid_px {row['valid_px']}")
    if confusion_px != compared_px:
        raise CheckError(f"the confusion adds up to {confusion_px}, compared_px is {compared_px}")
    smallest, largest = row["confusion_classes"]
    if smallest < 0 or largest >= num_classes:
        raise CheckError(f"the confusion names class {largest if smallest >= 0 else smallest}")


def _same_type(found: Any, wanted: Any) -> bool:
    """Compare types by their stored form: names and nullability of list items differ between readers."""
    if pa.types.is_list(wanted):
        return pa.types.is_list(found) and _same_type(found.value_type, wanted.value_type)
    if pa.types.is_struct(wanted):
        if not pa.types.is_struct(found) or found.num_fields < wanted.num_fields:
            return False
        pairs = ((found.field(i), wanted.field(i)) for i in range(wanted.num_fields))
        return all(a.name == b.name and _same_type(a.type, b.type) for a, b in pairs)
    return bool(found == wanted)
