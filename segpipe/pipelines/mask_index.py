"""Where the masks of scenes lie in a finished run, looked up without holding all of its scenes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final

from segpipe.masks.plan import iter_plan
from segpipe.masks.read import SceneUnits
from segpipe.masks.run import list_parts
from segpipe.rasters.scene import SceneSource
from segpipe.storage import Storage
from segpipe.wording import Named

_LOOKUPS_AT_ONCE: Final = 500


class MaskIndex:
    """Scene id -> units of its newest part, in a temporary database on disk.

    Counts the scenes whose file is not the version that the masks were made from: their scores compare
    masks of one image with labels of another.
    """

    def __init__(self, storage: Storage) -> None:
        self.other_version = Named()
        # An empty name is a private file that SQLite deletes; the driver's thread alone uses it.
        self._database = sqlite3.connect("", check_same_thread=False)
        self._database.execute(
            "CREATE TABLE masks (scene_id TEXT PRIMARY KEY,"
            " part INT, first_unit INT, units INT, version TEXT) WITHOUT ROWID"
        )
        columns = ("scene_id", "first_unit", "units", "version")
        for part in list_parts(storage):
            for batch in iter_plan(storage, part, columns):
                scene_ids, first_units, units, versions = (batch[name].to_pylist() for name in columns)
                rows = zip(scene_ids, [part] * len(units), first_units, units, versions, strict=True)
                self._database.executemany("INSERT OR REPLACE INTO masks VALUES (?, ?, ?, ?, ?)", rows)

    def find(self, sources: Sequence[SceneSource]) -> dict[str, SceneUnits]:
        """Return where the masks of these scenes lie; scenes without masks are left out."""
        found: dict[str, SceneUnits] = {}
        versions = {source.scene_id: str(source.version) for source in sources}
        for scene_id, part, first_unit, units, version in self._rows(list(versions)):
            found[scene_id] = SceneUnits(scene_id, part, first_unit, units)
            if version.split(";")[0] != versions[scene_id]:
                self.other_version.add(scene_id)
        return found

    def places(self, scene_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return (part, first unit) of the masks of these scenes; scenes without masks are left out."""
        return {row[0]: (row[1], row[2]) for row in self._rows(scene_ids)}

    def _rows(self, scene_ids: Sequence[str]) -> Iterator[tuple[str, int, int, int, str]]:
        for start in range(0, len(scene_ids), _LOOKUPS_AT_ONCE):
            asked = scene_ids[start : start + _LOOKUPS_AT_ONCE]
            query = f"SELECT * FROM masks WHERE scene_id IN ({','.join('?' * len(asked))})"
            yield from self._database.execute(query, asked)

    def close(self) -> None:
        self._database.close()
