"""The scratch database while a list of scenes is being made: drafts in, checks and joins in SQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import pyarrow as pa

from segpipe.errors import InputError
from segpipe.rasters.scene import Version
from segpipe.rasters.scene_ids import fold_id, printable
from segpipe.rasters.scene_list import SceneList, dump_extra
from segpipe.storage import ObjectInfo, join_uri, scheme_of
from segpipe.wording import few

Role = Literal["uri", "label", "valid"]
"""The three objects of a scene whose versions are pinned."""

_CACHE_KIB: Final = 32_768
_PAGE: Final = 2_000
_SHOWN: Final = 5
_SCENE_COLUMNS: Final = (
    "n INTEGER PRIMARY KEY, id TEXT, fold TEXT, rank INTEGER, row INTEGER, sort TEXT, listed INTEGER, "
    "shard INTEGER, keep INTEGER, uri TEXT, uri_size INTEGER, uri_etag TEXT, label TEXT, label_size INTEGER, "
    "label_etag TEXT, valid TEXT, valid_size INTEGER, valid_etag TEXT, optional INTEGER, member TEXT, "
    "start INTEGER, length INTEGER, members INTEGER, label_start INTEGER, label_length INTEGER, "
    "datetime TEXT, extra TEXT"
)
_NUM_COLUMNS: Final = _SCENE_COLUMNS.count(",") + 1


@dataclass(frozen=True, slots=True)
class Draft:
    """One scene, or one whole shard, on its way into the list."""

    scene_id: str
    uri: str
    version: Version | None = None
    """None until it is asked for."""
    rank: int = 0
    row: int = 0
    """Place by rank (the input), row (of a catalogue), then ``sort``."""
    sort: str = ""
    """Empty: the scene id."""
    listed: bool = False
    """Found in a folder or by a glob, not named by the user."""
    shard: bool = False
    keep: bool = True
    """Picked by input.include and input.exclude."""
    label_uri: str | None = None
    label_version: Version | None = None
    valid_uri: str | None = None
    valid_optional: bool = False
    """A missing mask is no error."""
    member: str | None = None
    offset: int | None = None
    length: int | None = None
    shard_members: int | None = None
    label_offset: int | None = None
    label_length: int | None = None
    datetime: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    extra_text: str | None = None
    """``extra`` already as text."""


class Spool:
    """Drafts and seen objects in a database without a name, which the system frees when it is closed."""

    def __init__(self) -> None:
        self.database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self.num_added = 0
        self._waiting: list[tuple[Any, ...]] = []
        for statement in (
            "PRAGMA temp_store = FILE",
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            f"PRAGMA cache_size = -{_CACHE_KIB}",
            f"CREATE TABLE scene({_SCENE_COLUMNS})",
            "CREATE TABLE object(uri TEXT PRIMARY KEY, size INTEGER, etag TEXT) WITHOUT ROWID",
            "BEGIN",
        ):
            self.database.execute(statement)
        self.database.create_function("folder_of", 1, lambda uri: uri.rpartition("/")[0], deterministic=True)

    def close(self) -> None:
        self.database.close()

    def add(self, draft: Draft) -> None:
        self._waiting.append(_values(draft))
        self.num_added += 1
        if len(self._waiting) >= _PAGE:
            self.flush()

    def flush(self) -> None:
        marks = ", ".join("?" * _NUM_COLUMNS)
        self.database.executemany(f"INSERT INTO scene VALUES ({marks})", self._waiting)
        self._waiting.clear()

    def add_objects(self, root: str, found: Iterable[ObjectInfo]) -> None:
        """Remember objects that a listing saw, so that labels and masks need not be asked for one by one."""
        rows = ((join_uri(root, info.key), info.size_bytes, info.etag) for info in found)
        self.database.executemany("INSERT OR REPLACE INTO object VALUES (?, ?, ?)", rows)

    def _change(self, statement: str, values: Sequence[Any] = ()) -> int:
        self.flush()
        return self.database.execute(statement, values).rowcount

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        self.flush()
        return self.database.execute(statement, values).fetchall()

    def count(self, condition: str = "1") -> int:
        return int(self._rows(f"SELECT count(*) FROM scene WHERE {condition}")[0][0])

    def index(self) -> None:
        """To be called once all inputs are in, before the drops."""
        self._change("CREATE INDEX scene_fold ON scene(fold)")
        self._change("CREATE INDEX scene_uri ON scene(uri)")

    def drop_below(self, folder: str) -> int:
        """Take out what was listed below a folder; how many."""
        start = folder if folder.endswith("/") else f"{folder}/"
        end = f"{start[:-1]}0"  # "0" follows "/" in ASCII: all that begins with start lies before it
        return self._change("DELETE FROM scene WHERE listed AND uri >= ? AND uri < ?", (start, end))

    def drop_named(self) -> int:
        """Take out listed files that are the label or the mask of a scene; how many."""
        named = "SELECT label FROM scene UNION SELECT valid FROM scene WHERE NOT optional"
        return self._change(f"DELETE FROM scene WHERE listed AND uri IN ({named})")

    def drop_unpicked(self) -> int:
        return self._change("DELETE FROM scene WHERE NOT keep")

    def drop_repeats(self) -> None:
        """One scene that several inputs name stays once; catalogue rows are left to the check of ids."""
        self._change(
            "DELETE FROM scene WHERE row = 0 AND EXISTS (SELECT 1 FROM scene AS other WHERE "
            "other.fold = scene.fold AND other.id = scene.id AND other.uri = scene.uri AND other.row = 0 "
            "AND other.n < scene.n)"
        )

    def check_files(self) -> None:
        """Raises ``InputError`` where inputs that overlap name one file under two ids."""
        found = self._rows(
            "SELECT uri, min(id), max(id) FROM scene WHERE row = 0 GROUP BY uri HAVING count(*) > 1 LIMIT 1"
        )
        if found:
            uri, first, second = found[0]
            what = f"two inputs name one file, as {first!r} and as {second!r}"
            raise InputError(what, printable(uri), "Take out the input that lies within the other.")

    def shards(self) -> Iterator[Draft]:
        """Each whole shard, with its version."""
        last = -1
        while found := self._rows(
            "SELECT n, id, uri, uri_size, uri_etag, rank, row, datetime, extra FROM scene "
            "WHERE shard AND n > ? ORDER BY n LIMIT 100",
            (last,),
        ):
            for n, scene_id, uri, size, etag, rank, row, datetime, extra in found:
                version = Version(size, etag)
                last = n
                yield Draft(scene_id, uri, version, rank, row, datetime=datetime, extra_text=extra)

    def drop_shards(self) -> None:
        self._change("DELETE FROM scene WHERE shard")

    def set_members(self, shard_uri: str, num_members: int, first: int) -> None:
        """Tell the members of a shard, all drafts from row number ``first`` on, how many they are."""
        self._change("UPDATE scene SET members = ? WHERE n >= ? AND uri = ?", (num_members, first, shard_uri))

    def next_row(self) -> int:
        return int(self._rows("SELECT coalesce(max(n), 0) + 1 FROM scene")[0][0])

    def crowded_folders(self, role: Role, least: int) -> list[tuple[str, int]]:
        """(folder, how many) of remote folders in which ``least`` or more objects are not pinned yet."""
        found = self._rows(
            f"SELECT folder_of({role}), count(*) FROM scene WHERE {role} IS NOT NULL AND {role}_etag IS NULL "
            f"AND substr({role}, 1, 1) <> '/' GROUP BY 1 HAVING count(*) >= ? ORDER BY 1",
            (least,),
        )
        return [(folder, count) for folder, count in found if scheme_of(folder) != "file"]

    def unpinned(self, role: Role) -> Iterator[list[tuple[int, str, str, bool, Version | None]]]:
        """Pages of (row number, scene id, uri, optional, version if a listing saw it) without version."""
        last = -1
        while found := self._rows(
            f"SELECT n, id, scene.{role}, optional, size, etag FROM scene "
            f"LEFT JOIN object ON object.uri = scene.{role} "
            f"WHERE scene.{role} IS NOT NULL AND {role}_etag IS NULL AND n > ? ORDER BY n LIMIT {_PAGE}",
            (last,),
        ):
            last = found[-1][0]
            yield [
                (n, scene_id, uri, bool(optional), None if etag is None else Version(size, etag))
                for n, scene_id, uri, optional, size, etag in found
            ]

    def pin(self, role: Role, pinned: Iterable[tuple[int, Version]], absent: Iterable[int]) -> None:
        """Set the versions by row number; what is absent is forgotten."""
        values = [(version.size_bytes, version.etag, n) for n, version in pinned]
        self.database.executemany(f"UPDATE scene SET {role}_size = ?, {role}_etag = ? WHERE n = ?", values)
        self.database.executemany(f"UPDATE scene SET {role} = NULL WHERE n = ?", [(n,) for n in absent])

    def check_ids(self) -> None:
        """Raises ``InputError`` naming both files where two scenes share an id, or differ by case alone."""
        doubled = "SELECT fold FROM scene GROUP BY fold HAVING count(*) > 1"
        found = self._rows(f"{doubled} ORDER BY fold LIMIT {_SHOWN}")
        if not found:
            return
        ((total,),) = self._rows(f"SELECT count(*) FROM ({doubled})")
        lines = []
        for (fold,) in found:
            twins = self._rows("SELECT id, uri, member FROM scene WHERE fold = ? ORDER BY n LIMIT 2", (fold,))
            (first, *_), (second, *_) = twins
            places = " and ".join(printable(f"{uri}!{member}" if member else uri) for _, uri, member in twins)
            by_case = f" ({second!r}: they differ by case alone)" if first != second else ""
            lines.append(f"{first!r}{by_case}: {places}")
        raise InputError(
            f"two scenes with one id: {few(lines, _SHOWN, '; ', total)}",
            "inputs",
            "Name a folder above them or quote the glob, so that ids are the paths below it, or give a "
            "catalogue with a scene_id column.",
        )

    def finish(self, extra_schema: pa.Schema, notes: Sequence[str]) -> SceneList:
        """The list; the database goes over to it."""
        self.flush()
        self.database.execute("DROP TABLE object")
        return SceneList(self.database, extra_schema, tuple(notes))


def _values(draft: Draft) -> tuple[Any, ...]:
    version, label = draft.version, draft.label_version
    extra = dump_extra(draft.extra) if draft.extra_text is None else draft.extra_text
    return (
        None,
        draft.scene_id,
        fold_id(draft.scene_id),
        draft.rank,
        draft.row,
        draft.sort or draft.scene_id,
        draft.listed,
        draft.shard,
        draft.keep,
        draft.uri,
        version.size_bytes if version else None,
        version.etag if version else None,
        draft.label_uri,
        label.size_bytes if label else None,
        label.etag if label else None,
        draft.valid_uri,
        None,
        None,
        draft.valid_optional,
        draft.member,
        draft.offset,
        draft.length,
        draft.shard_members,
        draft.label_offset,
        draft.label_length,
        draft.datetime,
        extra,
    )
