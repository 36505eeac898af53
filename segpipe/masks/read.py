"""Reading of mask objects: counts as Arrow tables, masks by scene and window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np

from segpipe.config.card import IGNORE
from segpipe.errors import CheckError, ObjectMissing, SceneError
from segpipe.geometry.grid import Window
from segpipe.masks.codec import decode_mask
from segpipe.masks.damage import damaged, explain_damage, open_parquet
from segpipe.masks.run import unit_key
from segpipe.masks.schema import COUNT_COLUMNS, FAILED
from segpipe.storage import Storage

_CACHED_ROWS: Final = 32  # units whose rows are kept: some 100 kB each at most
_CACHED_SCENES: Final = 2  # the scene being read, and the one before it


def read_columns(storage: Storage, key: str, columns: Sequence[str], size_bytes: int | None = None) -> Any:
    """Return an Arrow table of the columns that the object has; CheckError when it is damaged."""
    file = open_parquet(storage, key, size_bytes)
    present = [name for name in columns if name in file.schema_arrow.names]
    with explain_damage(storage.uri(key)):
        return file.read(columns=present, use_threads=False)


def read_counts(storage: Storage, part: int, unit: int, size_bytes: int | None = None) -> Any:
    """Return the rows of one unit without their masks, as an Arrow table."""
    return read_columns(storage, unit_key(part, unit), COUNT_COLUMNS, size_bytes)


@dataclass(frozen=True, slots=True)
class SceneUnits:
    """Where the rows of one scene lie: the units ``first_unit .. first_unit + units`` of ``part``."""

    scene_id: str
    part: int
    first_unit: int
    units: int


@dataclass(frozen=True, slots=True)
class _StoredRow:
    """One block of a unit: its window, the scene's height and width, and its row."""

    window: Window
    scene_size: tuple[int, int]
    status: str
    index: int


@dataclass(frozen=True, slots=True)
class _Extent:
    """What one unit has of a scene: the rectangle round its finished blocks, and the sizes they name."""

    around: Window | None
    scene_sizes: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, rows: Sequence[_StoredRow]) -> _Extent:
        finished = [row for row in rows if row.status != FAILED]
        if not finished:
            return cls(None, frozenset())
        windows = [row.window for row in finished]
        row_off = min(window.row_off for window in windows)
        col_off = min(window.col_off for window in windows)
        height = max(window.row_stop for window in windows) - row_off
        width = max(window.col_stop for window in windows) - col_off
        return cls(Window(row_off, col_off, height, width), frozenset(row.scene_size for row in finished))

    def matters(self, window: Window, scene_size: tuple[int, int] | None) -> bool:
        """Whether the unit has pixels of the window, or a row of another size, which is an error."""
        if scene_size is not None and self.scene_sizes - {scene_size}:
            return True
        return self.around is not None and _intersection(self.around, window) is not None


def _no_extents(scene: SceneUnits) -> dict[int, _Extent]:
    return {}


def _load_unit(storage: Storage, part: int, unit: int) -> dict[str, list[_StoredRow]]:
    columns = (
        "scene_id",
        "row_off",
        "col_off",
        "height",
        "width",
        "scene_height",
        "scene_width",
        "status",
    )
    table = read_columns(storage, unit_key(part, unit), columns)
    found: dict[str, list[_StoredRow]] = {}
    for index, row in enumerate(table.to_pylist()):
        window = Window(row["row_off"], row["col_off"], row["height"], row["width"])
        size = row["scene_height"], row["scene_width"]
        found.setdefault(row["scene_id"], []).append(_StoredRow(window, size, row["status"], index))
    return found


def _load_pngs(storage: Storage, part: int, unit: int) -> Any:
    """Return the encoded masks of a unit: a few hundredths of a byte a pixel."""
    return read_columns(storage, unit_key(part, unit), ("mask",))["mask"]


def _decode(storage: Storage, pngs: Callable[[int, int], Any], part: int, unit: int, index: int) -> Any:
    png = pngs(part, unit)[index].as_py()
    try:
        if png is None:
            raise CheckError(f"row {index} has no mask")
        return decode_mask(png)
    except CheckError as error:
        raise damaged(error, storage.uri(unit_key(part, unit))) from error


class MaskReader:
    """Reads masks of a run by scene and window, however the run's blocks were cut.

    The first window of a scene reads the rows of all its units; later ones read only units that they meet.
    Rows, masks as stored and decoded masks of the last few units are kept, so that windows read in order
    fetch each object a few times at most, however many units the scene has. One thread at a time.
    """

    def __init__(self, storage: Storage, cached_units: int = 4, *, whole: bool = False) -> None:
        """``whole``: the run is finished, so that a unit without an object is a fault of the storage."""
        self._whole = whole
        # No methods of self: a reader that is let go is freed at once, with the masks that it keeps.
        self._extents = lru_cache(maxsize=_CACHED_SCENES)(_no_extents)
        self._rows = lru_cache(maxsize=max(cached_units, _CACHED_ROWS))(partial(_load_unit, storage))
        pngs = lru_cache(maxsize=cached_units)(partial(_load_pngs, storage))
        self._mask = lru_cache(maxsize=cached_units)(partial(_decode, storage, pngs))

    def read(
        self, scene: SceneUnits, window: Window, scene_size: tuple[int, int] | None = None
    ) -> tuple[Any, int]:
        """Return (mask uint8 (height, width), pixels of ``window`` that no finished block covers).

        Pixels of failed or missing blocks are 255 in the mask and counted in the second value.
        ``scene_size``: height and width of the scene that the masks are wanted for; SceneError
        ``mask_missing`` where they were made of another size, for then the windows do not fit either.
        """
        mask = np.full((window.height, window.width), IGNORE, np.uint8)
        missing_px = window.num_px
        extents = self._extents(scene)
        for unit in range(scene.first_unit, scene.first_unit + scene.units):
            if (extent := extents.get(unit)) is not None and not extent.matters(window, scene_size):
                continue
            try:
                rows = self._rows(scene.part, unit).get(scene.scene_id, [])
            except ObjectMissing:
                if self._whole:
                    raise
                continue  # and not remembered: a later start may write it
            if extent is None:
                extents[unit] = _Extent.of(rows)
            for row in rows:
                if row.status == FAILED:
                    continue
                if scene_size not in (None, row.scene_size):
                    raise _other_size(scene.scene_id, row.scene_size, scene_size)
                common = _intersection(row.window, window)
                if common is None:
                    continue
                missing_px -= common.num_px
                block_mask = self._mask(scene.part, unit, row.index)
                mask[common.slices_in(window)] = block_mask[common.slices_in(row.window)]
        return mask, missing_px


def _other_size(scene_id: str, found: tuple[int, int], wanted: tuple[int, int] | None) -> SceneError:
    height, width = wanted or (0, 0)
    what = f"the run's masks are of {found[0]} x {found[1]} pixels, the scene has {height} x {width}"
    return SceneError("mask_missing", what, scene_id, "Predict the scene as it is now, then score it.")


def _intersection(a: Window, b: Window) -> Window | None:
    row_off, col_off = max(a.row_off, b.row_off), max(a.col_off, b.col_off)
    height = min(a.row_stop, b.row_stop) - row_off
    width = min(a.col_stop, b.col_stop) - col_off
    return Window(row_off, col_off, height, width) if height > 0 and width > 0 else None
