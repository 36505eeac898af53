"""Mask rows without masks, as the report builder takes them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.config.card import ClassInfo
from segpipe.masks.schema import COUNT_COLUMNS, MASK_FIELDS
from segpipe.reports.tables import (
    ReportBuilder,
    Reports,
)

TWO = (ClassInfo(name="background", color=(0, 0, 0)), ClassInfo(name="building", color=(220, 20, 60)))


PLAN_COLUMNS = [("downsample", pa.int32()), ("pixel_m", pa.float64()), ("coarser_than_model", pa.bool_())]


ROW_SCHEMA = pa.schema([*(field for field in MASK_FIELDS if field.name in COUNT_COLUMNS), *PLAN_COLUMNS])


def pairs(*cells: tuple[int, int, int]) -> list[dict[str, int]]:
    return [{"label": a, "predicted": b, "px": px} for a, b, px in cells]


def block(scene_id: str, row_off: int = 0, **changes: Any) -> dict[str, Any]:
    """An ``ok`` block of 10 x 10 pixels without label, in a scene of just that block."""
    return {
        "scene_id": scene_id,
        "uri": f"/archive/{scene_id}.tif",
        "part": 0,
        "unit": 0,
        "row_off": row_off,
        "col_off": 0,
        "height": 10,
        "width": 10,
        "scene_height": 10,
        "scene_width": 10,
        "valid_px": 100,
        "class_px": [60, 40],
        "status": "ok",
    } | changes


def compared(scene_id: str, confusion: list[dict[str, int]], **changes: Any) -> dict[str, Any]:
    compared_px = sum(cell["px"] for cell in confusion)
    labels = {"label_uri": "/labels/x.tif", "label_px": compared_px, "compared_px": compared_px}
    return block(scene_id, **(labels | {"confusion": confusion} | changes))


def failed(scene_id: str, kind: str = "decode", **changes: Any) -> dict[str, Any]:
    gone = {
        "valid_px": 0,
        "class_px": None,
        "status": "failed",
        "error_kind": kind,
        "error": f"{kind} went wrong",
    }
    return block(scene_id, **(gone | changes))


def build(
    rows: Iterable[dict[str, Any]],
    classes: tuple[ClassInfo, ...] = TWO,
    batch_rows: int = 3,
    **close: Any,
) -> tuple[Reports, list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the reports, and the rows of scenes.parquet and failures.parquet."""
    rows, scenes, failures = list(rows), io.BytesIO(), io.BytesIO()
    builder = ReportBuilder(classes, scenes, failures)
    for start in range(0, len(rows), batch_rows):
        builder.add(pa.RecordBatch.from_pylist(rows[start : start + batch_rows], schema=ROW_SCHEMA))
    reports = builder.close(**close)
    tables = [pq.read_table(io.BytesIO(file.getvalue())).to_pylist() for file in (scenes, failures)]
    return reports, tables[0], tables[1]
