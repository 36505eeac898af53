"""The stored blocks of one scene, streamed: a mask at a time, however many lie in one object."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from segpipe.errors import CheckError
from segpipe.geometry.grid import Window
from segpipe.masks.codec import decode_mask
from segpipe.masks.damage import explain_damage, open_parquet
from segpipe.masks.plan import PlanPart
from segpipe.masks.run import unit_key
from segpipe.masks.unit_check import expected_rows
from segpipe.storage import Storage

_PLACE_COLUMNS: Final = (
    *("scene_id", "version", "row_off", "col_off", "height", "width"),
    *("status", "error_kind"),
)


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One mask row without its mask."""

    window: Window
    status: str
    error_kind: str | None
    row_group: int


class StoredUnit:
    """One open mask object, checked to hold the planned rows. One thread at a time."""

    def __init__(self, storage: Storage, part: PlanPart, unit: int) -> None:
        """Raises ObjectMissing, and CheckError where the object is damaged or holds other rows."""
        key = unit_key(part.part, unit)
        self._where = storage.uri(key)
        self._file = open_parquet(storage, key, check_pages=True)
        self._blocks: dict[str, list[StoredBlock]] = {}
        with explain_damage(self._where):
            self._read_places(part, unit)

    def close(self) -> None:
        """Let go of the object."""
        self._file.close()

    def _read_places(self, part: PlanPart, unit: int) -> None:
        expected = list(expected_rows(part, unit))
        found = []
        for group in range(self._file.num_row_groups):
            table = self._file.read_row_group(group, columns=list(_PLACE_COLUMNS), use_threads=False)
            found += [(group, row) for row in table.to_pylist()]
        if len(found) != len(expected):
            raise CheckError(f"it holds {len(found)} rows, the plan says {len(expected)}", self._where)
        for (group, row), item in zip(found, expected, strict=True):
            source = item.scene.source
            window = Window(row["row_off"], row["col_off"], row["height"], row["width"])
            planned = (source.scene_id, source.version_text, item.window)
            if (row["scene_id"], row["version"], window) != planned:
                raise CheckError(
                    f"a row is {row['scene_id']!r} {window}, the plan says {planned}", self._where
                )
            block = StoredBlock(window, row["status"], row["error_kind"], group)
            self._blocks.setdefault(source.scene_id, []).append(block)

    def blocks(self, scene_id: str) -> list[StoredBlock]:
        """Return the scene's blocks in this unit, in plan order."""
        return self._blocks.get(scene_id, [])

    def mask_bytes(self, scene_id: str) -> int:
        """Return about how many bytes the scene's mask PNGs take here."""
        groups = {block.row_group for block in self.blocks(scene_id)}
        metadata = self._file.metadata
        leaves = [i for i in range(metadata.num_columns) if self._file.schema.column(i).path == "mask"]
        return sum(
            int(metadata.row_group(group).column(leaf).total_compressed_size)
            for group in groups
            for leaf in leaves
        )

    def masks(self, scene_id: str) -> Iterator[tuple[Window, Any]]:
        """Yield (window, uint8 (height, width) mask) of each block; CheckError where one is damaged."""
        blocks = self.blocks(scene_id)
        for group in sorted({block.row_group for block in blocks}):
            wanted = iter([block for block in blocks if block.row_group == group])
            for found_id, png in self._pngs(group):
                if found_id != scene_id:
                    continue
                yield self._decoded(next(wanted), png)

    def _pngs(self, group: int) -> Iterator[tuple[str, bytes | None]]:
        with explain_damage(self._where):
            batches = self._file.iter_batches(
                batch_size=1, row_groups=[group], columns=["scene_id", "mask"], use_threads=False
            )
            for batch in batches:
                yield batch["scene_id"][0].as_py(), batch["mask"][0].as_py()

    def _decoded(self, block: StoredBlock, png: bytes | None) -> tuple[Window, Any]:
        if png is None:
            raise CheckError(f"the block {block.window} has no mask", self._where)
        try:
            mask = decode_mask(png)
        except CheckError as error:
            raise CheckError(error.what, self._where) from None
        if mask.shape != (block.window.height, block.window.width):
            raise CheckError(f"the block {block.window} has a mask of {mask.shape}", self._where)
        return block.window, mask
