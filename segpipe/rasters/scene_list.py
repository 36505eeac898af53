"""All scenes of an archive in plan order, kept in a temporary database on disk so that memory stays flat."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from types import TracebackType
from typing import Any, Final, NamedTuple

import pyarrow as pa

from segpipe.errors import InputError, StorageFull
from segpipe.rasters.scene import SceneSource, Version
from segpipe.rasters.scene_ids import fold_id
from segpipe.wording import Named

_COLUMNS: Final = (
    "id, uri, uri_size, uri_etag, label, label_size, label_etag, valid, valid_size, valid_etag, "
    "member, start, length, members, label_start, label_length, datetime, extra"
)
_VERSION_TEXT: Final = (
    "rtrim(uri_size || ':' || uri_etag || ';' || coalesce(label_size || ':' || label_etag, '') || ';' "
    "|| coalesce(valid_size || ':' || valid_etag, ''), ';')"
)
"""SceneSource.version_text in SQL."""

_PAGE: Final = 5_000


class KnownScene(NamedTuple):
    """A scene of an existing plan."""

    scene_id: str
    version: str
    """`SceneSource.version_text`, or what no scene has where it is to be planned anew."""
    part: int
    uri: str


class SceneList:
    """The scenes that are still to be planned, in plan order. A context manager: closing frees the disk.

    Plan order: with a catalogue among the inputs, inputs as given and catalogue rows as they stand; otherwise
    sorted by scene id. Members of a shard stay in the shard's order, so that it is read from front to back.
    """

    def __init__(self, database: sqlite3.Connection, extra_schema: pa.Schema, notes: tuple[str, ...]) -> None:
        self._database = database
        database.execute(
            "CREATE TABLE known(id TEXT PRIMARY KEY, fold TEXT, version TEXT, part INTEGER, uri TEXT)"
        )
        self.extra_schema = extra_schema
        """Names and types of the catalogue columns in ``SceneSource.extra``, over all catalogues."""
        self.notes = notes
        """Lines for the user: what was left out, and why."""
        self.num_known = 0
        """Scenes dropped by ``forget_known``: an existing plan has them in this version."""
        self.num_same_file = 0
        """Scenes to be planned again though their file is the planned one: label or validity mask differ."""
        self.other_path = Named()
        """Scenes that replace planned ones of another path, which had the same id."""

    def __enter__(self) -> SceneList:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the temporary database. Calling it again does nothing."""
        self._database.close()

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM scene").fetchone()[0])

    def forget_known(self, known: Iterable[KnownScene]) -> None:
        """Drop what an existing plan has, in part order.

        A scene whose newest part has the same version is dropped; one with another version stays and gets
        that part as ``replaces_part``. Raises ``InputError`` for a scene whose id differs from a planned one
        by case alone.
        """
        with scratch_explained():
            run = self._database.execute
            rows = ((scene[0], fold_id(scene[0]), *scene[1:]) for scene in known)
            while page := list(itertools.islice(rows, _PAGE)):
                self._database.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?, ?)", page)
            twin = run(
                "SELECT scene.uri, scene.id, known.id FROM known JOIN scene ON scene.fold = known.fold "
                "WHERE scene.id <> known.id LIMIT 1"
            ).fetchone()
            if twin is not None:
                raise InputError(
                    f"the scene id {twin[1]!r} differs from the planned {twin[2]!r} by case alone",
                    twin[0],
                    "Rename one, or give another output.",
                )
            dropped = run(
                "DELETE FROM scene WHERE EXISTS "
                f"(SELECT 1 FROM known WHERE known.id = scene.id AND known.version = {_VERSION_TEXT})"
            )
            self.num_known += dropped.rowcount
            self.num_same_file = run(
                "SELECT count(*) FROM scene JOIN known ON known.id = scene.id AND "
                "substr(known.version, 1, instr(known.version || ';', ';') - 1) = uri_size || ':' || uri_etag"
            ).fetchone()[0]
            self.other_path = Named()
            for (scene_id,) in run(
                "SELECT scene.id FROM scene JOIN known ON known.id = scene.id AND known.uri <> scene.uri "
                "ORDER BY scene.id"
            ):
                self.other_path.add(scene_id)

    def known_in(self, version: str, scene_ids: Iterable[str]) -> set[str]:
        """Return those of the scenes whose newest plan has this version."""
        query = "SELECT 1 FROM known WHERE id = ? AND version = ?"
        return {one for one in scene_ids if self._database.execute(query, (one, version)).fetchone()}

    def pages(self, size: int = 10_000) -> Iterator[list[tuple[SceneSource, int | None]]]:
        """Lists of at most ``size`` (scene, replaces_part) in plan order; may be gone through again."""
        with scratch_explained():
            cursor = self._database.execute(
                f"SELECT {_COLUMNS}, (SELECT part FROM known WHERE known.id = scene.id) FROM scene "
                "ORDER BY rank, row, sort, n"
            )
            while page := cursor.fetchmany(size):
                yield [(source_of_row(row[:-1]), row[-1]) for row in page]


def source_of_row(row: tuple[Any, ...]) -> SceneSource:
    """A scene from its _COLUMNS."""
    return SceneSource(
        scene_id=row[0],
        uri=row[1],
        version=Version(row[2], row[3]),
        label_uri=row[4],
        label_version=None if row[4] is None else Version(row[5], row[6]),
        valid_uri=row[7],
        valid_version=None if row[7] is None else Version(row[8], row[9]),
        member=row[10],
        offset=row[11],
        length=row[12],
        shard_members=row[13],
        label_offset=row[14],
        label_length=row[15],
        datetime=row[16],
        extra=load_extra(row[17]),
    )


@contextmanager
def scratch_explained() -> Iterator[None]:
    """Turn a full scratch disk into ``StorageFull`` naming it."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" not in str(error) and "disk" not in str(error):
            raise
        folder = os.environ.get("SQLITE_TMPDIR") or os.environ.get("TMPDIR") or "/var/tmp"
        fix = "Free space there, or name another folder with TMPDIR."
        raise StorageFull(f"no space for the list of scenes ({error})", folder, fix) from error


_MARK: Final = "$type"


def dump_extra(extra: dict[str, Any]) -> str:
    """Further columns as JSON text; "" for none. ``load_extra`` gives equal values of the same types."""
    return json.dumps(_pack(extra), ensure_ascii=True, separators=(",", ":")) if extra else ""


def load_extra(text: str) -> dict[str, Any]:
    """What ``dump_extra`` was given."""
    return {name: _unpack(value) for name, value in json.loads(text).items()} if text else {}


def _pack(value: Any) -> Any:
    """JSON values as they are, others marked with their type. Raises ``InputError`` for an unknown type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        packed = {str(name): _pack(item) for name, item in value.items()}
        return {_MARK: "dict", "value": packed} if _MARK in packed else packed
    if isinstance(value, list):
        return [_pack(item) for item in value]
    if isinstance(value, tuple):  # an entry of a map, which Arrow takes as nothing else
        return {_MARK: "tuple", "value": [_pack(item) for item in value]}
    if isinstance(value, bytes):
        return {_MARK: "bytes", "value": value.hex()}
    if isinstance(value, dt.timedelta):
        microseconds = value // dt.timedelta(microseconds=1)
        return {_MARK: "timedelta", "value": microseconds}
    if isinstance(value, dt.datetime | dt.date | dt.time | Decimal):
        text = str(value) if isinstance(value, Decimal) else value.isoformat()
        name = "datetime" if isinstance(value, dt.datetime) else type(value).__name__  # or pandas' own
        return {_MARK: name, "value": text}
    raise InputError(
        f"a catalogue column holds values of type {type(value).__name__}", "", "Drop the column."
    )


_UNPACK: Final[dict[str, Any]] = {
    "bytes": bytes.fromhex,
    "timedelta": lambda microseconds: dt.timedelta(microseconds=microseconds),
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "time": dt.time.fromisoformat,
    "Decimal": Decimal,
    "tuple": lambda items: tuple(map(_unpack, items)),
    "dict": lambda items: {name: _unpack(item) for name, item in items.items()},
}


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if isinstance(value, dict):
        if _MARK in value:
            return _UNPACK[value[_MARK]](value["value"])
        return {name: _unpack(item) for name, item in value.items()}
    return value
