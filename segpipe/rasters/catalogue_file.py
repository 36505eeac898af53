"""Catalogue files: CSV or Parquet tables with a ``uri`` column, read twice as streams, never held whole."""

from __future__ import annotations

import csv
import datetime as dt
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.errors import InputError, SegpipeError
from segpipe.rasters.scene import Version
from segpipe.rasters.scene_ids import has_suffix
from segpipe.storage import open_object

OWN_COLUMNS: Final = ("uri", "scene_id", "label", "valid", "datetime")
"""Columns with a meaning here; all others are carried into the plan."""

_BATCH_ROWS: Final = 1024
_CSV_TYPES: Final = (
    pa.int64(),
    pa.bool_(),
    pa.float64(),
    pa.date32(),
    pa.timestamp("us"),
    pa.timestamp("us", "UTC"),
)
"""Types tried for a CSV column, in this order; text if none fits all values."""


@dataclass(frozen=True, slots=True)
class CatalogueRow:
    """One row; empty cells are None."""

    number: int
    """From 1, without the header line."""
    uri: str
    scene_id: str | None
    label: str | None
    valid: str | None
    datetime: str | None
    """ISO 8601."""
    extra: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CatalogueFile:
    """An opened catalogue. ``extra`` is the schema of the columns that have no meaning here."""

    uri: str
    version: Version
    columns: tuple[str, ...]
    extra: pa.Schema

    @property
    def has_labels(self) -> bool:
        return "label" in self.columns

    @property
    def has_masks(self) -> bool:
        return "valid" in self.columns

    def rows(self) -> Iterator[CatalogueRow]:
        """All rows in order. Raises ``InputError`` for a damaged file and a row without uri."""
        number = 0
        with _explained(self.uri), _opened(self.uri, self.version) as file:
            for batch in self._batches(file):
                for row in _typed(batch, self.extra).to_pylist():
                    number += 1
                    yield _row(number, row, self.extra.names, self.uri)

    def _batches(self, file: BinaryIO) -> Iterator[pa.RecordBatch]:
        if has_suffix(self.uri, (".csv",)):
            yield from _csv(file, self.columns)
        else:
            table = pq.ParquetFile(pa.PythonFile(file, mode="r"))
            yield from table.iter_batches(_BATCH_ROWS, use_threads=False)


def open_catalogue(uri: str, version: Version) -> CatalogueFile:
    """Read the columns and, for CSV, the types that fit every row. Raises ``InputError``."""
    with _explained(uri):
        if has_suffix(uri, (".csv",)):
            with _opened(uri, version) as file:
                columns = next(_csv_rows(file), [])
                if not columns:
                    raise ValueError("it is empty")
                file.seek(0)
                types = _infer(columns, _csv(file, columns))
            extra = pa.schema([(name, types[name]) for name in columns if name not in OWN_COLUMNS])
        else:
            with _opened(uri, version) as file:
                schema = pq.ParquetFile(pa.PythonFile(file, mode="r")).schema_arrow
            columns = schema.names
            extra = pa.schema([_plain_field(item) for item in schema if item.name not in OWN_COLUMNS])
    doubled = sorted({name for name in columns if columns.count(name) > 1})
    if doubled:
        raise InputError(f"two columns are called {doubled[0]!r}", uri, "Rename one.")
    if "uri" not in columns:
        found = ", ".join(columns)[:300]
        raise InputError(
            f"a catalogue needs a column 'uri'; found: {found}", uri, "Rename the column of paths."
        )
    return CatalogueFile(uri, version, tuple(columns), extra)


def _row(number: int, row: dict[str, Any], extra: Sequence[str], where: str) -> CatalogueRow:
    uri = row["uri"]
    if not isinstance(uri, str) or not uri.strip():
        raise InputError(f"row {number} has no uri", where, "Fill it in or take the row out.")
    scene_id = row.get("scene_id")
    if "scene_id" in row and (scene_id is None or scene_id == ""):
        raise InputError(f"row {number} has no scene_id", where, "Fill it in or take the whole column out.")
    return CatalogueRow(
        number,
        uri.strip(),
        None if scene_id is None else str(scene_id),
        _text(row.get("label"), "label", number, where),
        _text(row.get("valid"), "valid", number, where),
        _iso(row.get("datetime")),
        {name: row[name] for name in extra},
    )


def _text(value: Any, column: str, number: int, where: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise InputError(
            f"row {number}: {column} is {value!r}, not a path", where, "Give a path or leave it empty."
        )
    return value.strip() or None


def _iso(value: Any) -> str | None:
    if isinstance(value, dt.datetime | dt.date):
        return value.isoformat()
    return str(value).strip() or None if value is not None else None


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except SegpipeError:
        raise
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(
            f"the catalogue cannot be read: {text}", uri, "Correct it; CSV is UTF-8 with commas."
        ) from None


@contextmanager
def _opened(uri: str, version: Version) -> Iterator[BinaryIO]:
    storage, key = open_object(uri)
    with storage.open_range(key, version.etag, version.size_bytes) as file:
        yield file


def _csv_rows(file: BinaryIO) -> Iterator[list[str]]:
    """The header and all rows that are not blank, each of as many cells as the header."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        width = 0
        reader = csv.reader(text, strict=True)
        for row in reader:
            if not row:
                continue
            width = width or len(row)
            if len(row) != width:
                shown = ",".join(row)[:80]
                raise ValueError(f"line {reader.line_num}: {width} cells are wanted, not {len(row)}: {shown}")
            yield row
    finally:
        text.detach()  # the file is its opener's to close


def _csv(file: BinaryIO, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches with every column as text; an empty cell is null."""
    rows = itertools.islice(_csv_rows(file), 1, None)
    while page := list(itertools.islice(rows, _BATCH_ROWS)):
        cells = zip(*page, strict=True)
        arrays = [pa.array([cell or None for cell in column], pa.string()) for column in cells]
        yield pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _infer(columns: Sequence[str], batches: Iterable[pa.RecordBatch]) -> dict[str, pa.DataType]:
    """The first type of _CSV_TYPES that fits all values of a column, whatever the order of the rows."""
    fitting: dict[str, list[pa.DataType]] = {
        name: [] if name in OWN_COLUMNS else list(_CSV_TYPES) for name in columns
    }
    filled: set[str] = set()
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            fitting[name] = [kind for kind in fitting[name] if _fits(column, kind)]
            if column.null_count < len(column):
                filled.add(name)
    return {name: kinds[0] if kinds and name in filled else pa.string() for name, kinds in fitting.items()}


def _fits(column: pa.Array, kind: pa.DataType) -> bool:
    try:
        column.cast(kind)
    except pa.ArrowException:
        return False
    return True


def _typed(batch: pa.RecordBatch, extra: pa.Schema) -> pa.RecordBatch:
    """The batch with the further columns in their final types."""
    columns = [
        column.cast(extra.field(name).type, safe=False) if name in extra.names else column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type under which a Parquet column is carried, at any depth.

    Times in microseconds, since Python has no finer ones; no dictionaries, no extensions. Views of lists stay
    as they are: Arrow cannot cast them.
    """
    types = pa.types
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    if types.is_time(kind):
        return pa.time64("us")
    if types.is_duration(kind):
        return pa.duration("us")
    if types.is_struct(kind):
        return pa.struct([_plain_field(item) for item in kind])
    if types.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type), kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    return kind


def _plain_field(item: pa.Field) -> pa.Field:
    return pa.field(item.name, _plain(item.type))
