"""Sums over the blocks of each scene, from mask rows without masks, as whole-column operations.

Everything summed is a whole number, so no total depends on how the rows came in batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from segpipe.errors import CheckError
from segpipe.masks.schema import EMPTY, FAILED, MASK_SCHEMA, OK

Array = np.ndarray[Any, Any]

FIRST_FIELDS: Final = {
    "scene_id": pa.string(),
    "uri": pa.string(),
    "scene_height": pa.int32(),
    "scene_width": pa.int32(),
    "downsample": pa.int32(),
    "pixel_m": pa.float64(),
    "coarser_than_model": pa.bool_(),
}
"""What a scene's first row says for all of its rows; the last three are columns of the plan."""

COUNTS: Final = (
    "blocks",
    "ok",
    "empty",
    "failed",
    "block_px",
    "failed_px",
    "valid_px",
    "label_px",
    "compared_px",
    "label_blocks",  # blocks whose label pixels are counted
    "compared_blocks",  # blocks with a confusion matrix
    "uncounted_label_blocks",  # blocks with a label that nobody could count
)
COUNT_INDEX: Final = {name: index for index, name in enumerate(COUNTS)}

KNOWN_STATUSES: Final = (OK, EMPTY, FAILED)


@dataclass(slots=True)
class SceneSums:
    """Sums of S scenes in plan order."""

    first: Any
    """Arrow table of FIRST_FIELDS, one row per scene."""
    counts: Array
    """(S, len(COUNTS)) int64."""
    class_px: Array
    """(S, C) int64: pixels of each class in the masks."""
    confusion: Array
    """(S, C, C) int64: rows label, columns prediction."""
    kinds: list[str | None]
    """Error kind of the scene's first failed block."""

    def __len__(self) -> int:
        return len(self.kinds)

    def count(self, name: str) -> Array:
        """Return one of COUNTS, (S,) int64."""
        return self.counts[:, COUNT_INDEX[name]]

    def scene_ids(self) -> list[str]:
        return self.first["scene_id"].to_pylist()

    def part(self, start: int, stop: int) -> SceneSums:
        """Return copies of some scenes, so that the others can be freed."""
        rows = slice(start, stop)
        return SceneSums(
            first=self.first.take(pa.array(range(start, stop), pa.int64())),
            counts=self.counts[rows].copy(),
            class_px=self.class_px[rows].copy(),
            confusion=self.confusion[rows].copy(),
            kinds=self.kinds[rows],
        )


def sum_scenes(rows: Any, num_classes: int) -> SceneSums:
    """Sum an Arrow table of mask rows, a scene's rows together; unknown statuses are passed over."""
    rows = rows.filter(pc.is_in(rows["status"], pa.array(KNOWN_STATUSES)))
    ids = _column(rows, "scene_id", pa.string())
    changed = pc.not_equal(ids.slice(1), ids.slice(0, max(0, len(ids) - 1))).to_numpy(zero_copy_only=False)
    starts = np.concatenate(([0], np.flatnonzero(changed) + 1)) if len(ids) else np.zeros(0, np.int64)
    scene_of_row = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(ids))))
    first = pa.table(
        {name: _column(rows, name, kind).take(pa.array(starts)) for name, kind in FIRST_FIELDS.items()}
    )
    return SceneSums(
        first=first,
        counts=_sum_counts(rows, starts),
        class_px=_sum_classes(rows, scene_of_row, len(starts), num_classes),
        confusion=_sum_confusion(rows, scene_of_row, len(starts), num_classes),
        kinds=_first_kinds(rows, scene_of_row, len(starts)),
    )


def joined(before: SceneSums, after: SceneSums) -> SceneSums:
    """Join neighbouring sums; the last scene of ``before`` may go on as the first of ``after``."""
    if len(before) == 0 or len(after) == 0:
        return before if len(after) == 0 else after
    skip = 1 if before.scene_ids()[-1] == after.first["scene_id"][0].as_py() else 0
    out = SceneSums(
        first=pa.concat_tables([before.first, after.first.slice(skip)]),
        counts=np.concatenate((before.counts, after.counts[skip:])),
        class_px=np.concatenate((before.class_px, after.class_px[skip:])),
        confusion=np.concatenate((before.confusion, after.confusion[skip:])),
        kinds=before.kinds + after.kinds[skip:],
    )
    if skip:
        seam = len(before) - 1
        out.counts[seam] += after.counts[0]
        out.class_px[seam] += after.class_px[0]
        out.confusion[seam] += after.confusion[0]
        out.kinds[seam] = before.kinds[seam] or after.kinds[0]
    return out


def _column(rows: Any, name: str, kind: Any) -> Any:
    """Return a column as one array; nulls where an older object has no such column."""
    if name not in rows.schema.names:
        return pa.nulls(rows.num_rows, kind)
    column = rows[name]
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column if column.type == kind else column.cast(kind)


def _integers(rows: Any, name: str) -> tuple[Array, Array]:
    """Return a column as int64 with 0 for null, and where it is not null."""
    column = _column(rows, name, pa.int64())
    known = column.is_valid().to_numpy(zero_copy_only=False)
    return pc.fill_null(column, 0).to_numpy(zero_copy_only=False), known


def _sum_counts(rows: Any, starts: Array) -> Array:
    status = _column(rows, "status", pa.string())
    failed = pc.equal(status, FAILED).to_numpy(zero_copy_only=False)
    block_px = _integers(rows, "height")[0] * _integers(rows, "width")[0]
    label_px, label_known = _integers(rows, "label_px")
    compared_px, _ = _integers(rows, "compared_px")
    has_label = _column(rows, "label_uri", pa.string()).is_valid().to_numpy(zero_copy_only=False)
    compared = _column(rows, "confusion", MASK_SCHEMA.field("confusion").type).is_valid()
    values = {
        "blocks": np.ones(rows.num_rows, np.int64),
        "ok": pc.equal(status, OK).to_numpy(zero_copy_only=False),
        "empty": pc.equal(status, EMPTY).to_numpy(zero_copy_only=False),
        "failed": failed,
        "block_px": block_px,
        "failed_px": np.where(failed, block_px, 0),
        "valid_px": _integers(rows, "valid_px")[0],
        "label_px": label_px,
        "compared_px": compared_px,
        "label_blocks": label_known,
        "compared_blocks": compared.to_numpy(zero_copy_only=False),
        "uncounted_label_blocks": has_label & ~label_known,
    }
    table = np.stack([values[name].astype(np.int64) for name in COUNTS], axis=1)
    return np.add.reduceat(table, starts, axis=0) if len(starts) else np.zeros((0, len(COUNTS)), np.int64)


def _sum_classes(rows: Any, scene_of_row: Array, num_scenes: int, num_classes: int) -> Array:
    out = np.zeros((num_scenes, num_classes), np.int64)
    column = _column(rows, "class_px", pa.list_(pa.int64()))
    lengths = pc.list_value_length(column).drop_null().to_numpy(zero_copy_only=False)
    if (lengths != num_classes).any():
        raise CheckError(
            f"class_px has {sorted(set(lengths.tolist()))} values a row, the run has {num_classes} classes"
        )
    values = pc.list_flatten(column).to_numpy(zero_copy_only=False).reshape(-1, num_classes)
    known = column.is_valid().to_numpy(zero_copy_only=False)
    np.add.at(out, scene_of_row[known], values)
    return out


def _sum_confusion(rows: Any, scene_of_row: Array, num_scenes: int, num_classes: int) -> Array:
    out = np.zeros((num_scenes, num_classes, num_classes), np.int64)
    column = _column(rows, "confusion", MASK_SCHEMA.field("confusion").type)
    row = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    cells = pc.list_flatten(column)
    label, predicted, px = (
        pc.struct_field(cells, name).to_numpy(zero_copy_only=False) for name in ("label", "predicted", "px")
    )
    if len(label) and (
        min(label.min(), predicted.min()) < 0 or max(label.max(), predicted.max()) >= num_classes
    ):
        raise CheckError(f"a confusion cell lies outside the run's {num_classes} classes")
    np.add.at(out, (scene_of_row[row], label, predicted), px)
    return out


def _first_kinds(rows: Any, scene_of_row: Array, num_scenes: int) -> list[str | None]:
    kinds: list[str | None] = [None] * num_scenes
    failed = np.flatnonzero(
        pc.equal(_column(rows, "status", pa.string()), FAILED).to_numpy(zero_copy_only=False)
    )
    names = _column(rows, "error_kind", pa.string()).take(pa.array(failed)).to_pylist()
    for scene, kind in zip(scene_of_row[failed].tolist(), names, strict=True):
        kinds[scene] = kinds[scene] or kind
    return kinds
