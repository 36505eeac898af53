"""The memory that reports take: bounded in the number of classes and flat in that of scenes."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pytest
from peak_memory import peak_growth_bytes
from report_rows import ROW_SCHEMA, TWO, build, compared, pairs

from segpipe.config.card import ClassInfo
from segpipe.reports.html import render_html
from segpipe.reports.tables import ReportBuilder

MANY = tuple(ClassInfo(name=f"c{i}", color=(i, 0, 0)) for i in range(255))


def rows_of_many_classes() -> list[dict[str, Any]]:
    build([compared("s", pairs((0, 0, 100)))], TWO)  # what a first call loads is not counted
    return [compared(f"s{i}", pairs((i, i, 60), (i, 254, 40)), class_px=[0] * 255) for i in range(150)]


def build_many_classes(rows: list[dict[str, Any]]) -> None:
    reports, scenes, _ = build(rows, MANY)
    assert scenes[7]["iou_c7"] == pytest.approx(0.6)
    assert reports.matrix[7, 254] == 40
    assert "confusion.parquet" in render_html(reports, MANY)


def test_255_classes_fit_without_a_matrix_a_scene_in_memory() -> None:
    # 150 matrices alone would be 78 MB, and their scores as much again
    assert peak_growth_bytes(rows_of_many_classes, build_many_classes) < 120e6


class Discard(io.RawIOBase):
    """A file that keeps nothing but its length."""

    length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.length += len(data)
        return len(data)

    def tell(self) -> int:
        return self.length


def thousand_rows() -> Any:
    """A batch of 1,000 scenes, after others have passed: what the first ones load is not counted."""
    columns = pa.RecordBatch.from_pylist(
        [compared(f"s{i:06d}", pairs((0, 0, 60), (1, 1, 40))) for i in range(1000)], schema=ROW_SCHEMA
    )
    add_scenes(columns, 30)
    return columns


def add_scenes(columns: Any, num_batches: int) -> None:
    builder = ReportBuilder(TWO, Discard(), Discard())  # type: ignore[arg-type]
    at = columns.schema.get_field_index("scene_id")
    for batch in range(num_batches):
        ids = pa.array([f"{batch}-{i}" for i in range(1000)])
        builder.add(columns.set_column(at, columns.schema.field(at), ids))
    summary = builder.close().summary
    assert summary["scenes"]["all"] == 1000 * num_batches
    assert summary["label_px"] == 100_000 * num_batches


def add_many_scenes(columns: Any) -> None:
    add_scenes(columns, 150)


def test_memory_is_flat_in_the_number_of_scenes() -> None:
    # five times as many scenes as before; each kept would be some hundred bytes
    assert peak_growth_bytes(thousand_rows, add_many_scenes) < 12e6
