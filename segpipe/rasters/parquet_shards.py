"""Parquet shards: one encoded image a row, found by column name, read row after row with bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.errors import InputError, ObjectMissing, SceneError, SegpipeError, first_line
from segpipe.rasters.scene import CHANGED_FIX, Version
from segpipe.storage import open_object
from segpipe.wording import counted

IMAGE_COLUMNS: Final = ("image", "img", "png", "jpg", "bytes")
LABEL_COLUMN: Final = "label"
ID_COLUMNS: Final = ("sample_id", "scene_id", "__key__", "key")
MAX_GROUP_BYTES: Final = 1 << 30
"""Most decoded bytes of the image column of one row group."""

_MAX_BATCH_ROWS: Final = 16
_KEPT_BATCHES: Final = 2
_OPEN_FILES: Final = 2  # the images and the labels of one shard; each may hold 32 MiB of read-ahead
_BUFFER_BYTES: Final = 1 << 22
FIX: Final = "Make the shard again, or leave it out."
"""What to do about a shard that is damaged or holds what it should not."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as listed."""

    number: int
    key: str
    has_label: bool


def parquet_columns(uri: str, version: Version) -> list[str]:
    """The column names of a Parquet file. Raises ``InputError`` where it is none."""
    with _listing(uri):
        return list(_open(uri, version).schema_arrow.names)


def list_parquet(uri: str, version: Version) -> Iterator[Row]:
    """The rows of a shard in order; the key is the first of ID_COLUMNS that is there, else the row number.

    Raises ``InputError`` for no or a damaged Parquet file, no image column, a row without key.
    """
    with _listing(uri):
        file = _open(uri, version)
        schema = file.schema_arrow
        _bytes_path(schema, "image", uri)
        label = _bytes_path(schema, "label", uri) if _is_bytes_column(schema, LABEL_COLUMN) else None
        key_column = next((name for name in ID_COLUMNS if name in schema.names), None)
        number = 0
        for group in range(file.metadata.num_row_groups):
            labelled = _labelled_rows(file, group, label)
            for key in _keys(file, group, key_column, number, uri):
                yield Row(number, key, next(labelled))
                number += 1


def _keys(file: Any, group: int, column: str | None, first: int, uri: str) -> Iterator[str]:
    """The keys of one row group."""
    if column is None:
        for number in range(first, first + file.metadata.row_group(group).num_rows):
            yield f"{number:08d}"
        return
    for batch in file.iter_batches(1024, row_groups=[group], columns=[column]):
        for value in batch.column(0).to_pylist():
            if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
                raise InputError(f"the column {column!r} holds {value!r}, which names no scene", uri, FIX)
            yield str(value)


def _labelled_rows(file: Any, group: int, path: str | None) -> Iterator[bool]:
    """Whether each row of a row group has a label. Pixels are read only where the footer does not tell."""
    group_info = file.metadata.row_group(group)
    num_rows = group_info.num_rows
    nulls = num_rows if path is None else _num_nulls(group_info, path)
    if nulls in (0, num_rows):
        yield from (nulls == 0 for _ in range(num_rows))
        return
    for batch in _batches(file, group, path or "", ""):
        yield from _values(batch).is_valid().to_pylist()


def _num_nulls(group_info: Any, path: str) -> int | None:
    chunk = _chunk(group_info, path)
    statistics = chunk.statistics if chunk is not None else None
    return int(statistics.null_count) if statistics is not None and statistics.has_null_count else None


def _chunk(group_info: Any, path: str) -> Any:
    chunks = (group_info.column(index) for index in range(group_info.num_columns))
    return next((chunk for chunk in chunks if chunk.path_in_schema == path), None)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_bytes_column(schema: pa.Schema, name: str) -> bool:
    if name not in schema.names:
        return False
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        return any(inner.name == "bytes" and _is_bytes(inner.type) for inner in kind)
    return _is_bytes(kind)


def _bytes_path(schema: pa.Schema, role: str, uri: str) -> str:
    """The Parquet path of the encoded images (or labels): a binary column or a struct with ``bytes``."""
    names = IMAGE_COLUMNS if role == "image" else (LABEL_COLUMN,)
    name = next((name for name in names if _is_bytes_column(schema, name)), None)
    if name is None:
        found = ", ".join(f"{item.name} ({item.type})" for item in schema)[:300]
        wanted = f"{', '.join(names)}: binary, or a struct with bytes"
        what = f"no column of encoded images ({wanted}); found: {found}"
        raise InputError(what, uri, "A catalogue needs a uri column. " + FIX)
    return f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name


def _open(uri: str, version: Version) -> Any:
    storage, key = open_object(uri)
    file = storage.open_range(key, version.etag, version.size_bytes)
    return pq.ParquetFile(pa.PythonFile(file, mode="r"), buffer_size=_BUFFER_BYTES, pre_buffer=False)


@contextmanager
def _listing(uri: str) -> Iterator[None]:
    try:
        yield
    except ObjectMissing:
        raise InputError("no such file", uri, "Correct the path.") from None
    except SceneError as error:
        raise InputError(error.what, uri, FIX) from None
    except SegpipeError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"no valid Parquet file: {first_line(error)}", uri, FIX) from None


def _batches(file: Any, group: int, path: str, where: str) -> Iterator[Any]:
    """Record batches of one column of a row group; no batch can decode to more than MAX_GROUP_BYTES.

    A value is at most as long as its column chunk, so the batch is cut where a dictionary-encoded bomb (a
    tiny file, the same huge value in each row) would pass the limit.
    """
    chunk = _chunk(file.metadata.row_group(group), path)
    chunk_bytes = chunk.total_uncompressed_size if chunk is not None else MAX_GROUP_BYTES + 1
    if chunk_bytes > MAX_GROUP_BYTES:
        what = f"a row group holds {chunk_bytes:,} bytes of images, more than {MAX_GROUP_BYTES:,}"
        raise SceneError("limit", what, where, "Write the shard with smaller row groups.")
    rows = max(1, min(_MAX_BATCH_ROWS, MAX_GROUP_BYTES // max(1, chunk_bytes)))
    return iter(file.iter_batches(rows, row_groups=[group], columns=[path], use_threads=False))


def _values(batch: Any) -> Any:
    column = batch.column(0)
    if pa.types.is_struct(column.type):
        column = column.flatten()[0]  # flatten, unlike field, makes a null struct a null value
    return column


@dataclass(slots=True)
class _Cursor:
    """A place in one column of one file: reading on is cheap, going back starts the row group again."""

    file: Any
    path: str
    where: str
    starts: list[int]
    """First row of each row group, and the number of rows."""
    group: int = -1
    next_row: int = 0
    batches: Iterator[Any] | None = None
    kept: deque[tuple[int, Any]] = field(default_factory=lambda: deque(maxlen=_KEPT_BATCHES))

    def read(self, row: int) -> bytes | None:
        found = self._kept(row)
        if found is None:
            group = next(index for index, start in enumerate(self.starts[1:]) if row < start)
            if group != self.group or row < self.next_row or self.batches is None:
                self.batches = _batches(self.file, group, self.path, self.where)
                self.group, self.next_row = group, self.starts[group]
            while row >= self.next_row:
                values = _values(next(self.batches))
                self.kept.append((self.next_row, values))
                self.next_row += len(values)
            found = self._kept(row)
        first, values = found  # type: ignore[misc]
        value: bytes | None = values[row - first].as_py()
        return value

    def _kept(self, row: int) -> tuple[int, Any] | None:
        return next(
            ((first, values) for first, values in self.kept if first <= row < first + len(values)), None
        )


class _Cursors(threading.local):
    """The cursors of one thread, newest last."""

    def __init__(self) -> None:
        self.open: OrderedDict[tuple[str, str, str], _Cursor] = OrderedDict()


_cursors = _Cursors()


def read_cell(uri: str, version: Version, row: int, num_rows: int | None, role: str, where: str) -> bytes:
    """The encoded image or label (``role``) of a row. Reading rows in order decodes each row group once.

    ``num_rows`` is the planned row count. Raises ``SceneError`` (shard_count, limit, decode),
    ``ObjectMissing``, ``ObjectChanged`` and other storage errors.
    """
    place = (uri, version.etag, role)
    cursor = _cursors.open.pop(place, None)  # back only after success: a failed cursor is not used again
    try:
        if cursor is None:
            cursor = _new_cursor(uri, version, role)
        if num_rows is not None and cursor.starts[-1] != num_rows:
            what = f"the shard has {counted(cursor.starts[-1], 'row')}, not {num_rows} as planned"
            raise SceneError("shard_count", what, uri, CHANGED_FIX)
        if not 0 <= row < cursor.starts[-1]:
            raise SceneError("shard_count", f"the shard has no row {row}", uri, CHANGED_FIX)
        value = cursor.read(row)
    except (InputError, pa.ArrowException, StopIteration) as error:
        raise _unreadable(error, where) from None
    except SegpipeError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(error, where) from None
    _cursors.open[place] = cursor
    while len(_cursors.open) > _OPEN_FILES:
        _cursors.open.popitem(last=False)
    if value is None:
        raise SceneError("decode", f"the row has no {role}", where, "Write the shard again, or leave it out.")
    return value


def _unreadable(error: BaseException, where: str) -> SceneError:
    what = f"the shard cannot be read: {first_line(error)}"
    return SceneError("decode", what, where, "Copy the shard again, or leave it out.")


def _new_cursor(uri: str, version: Version, role: str) -> _Cursor:
    file = _open(uri, version)
    starts = [0]
    for group in range(file.metadata.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    return _Cursor(file, _bytes_path(file.schema_arrow, role, uri), uri, starts)
