"""Score tables of a run, streamed: a scene's row is written when its blocks have passed; flat memory."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from segpipe.config.card import ClassInfo
from segpipe.config.recipe import FORMAT
from segpipe.masks.schema import FAILED
from segpipe.metrics import ScoreArrays, Scores, score_arrays
from segpipe.metrics.scores import OVERALL_SCORES
from segpipe.reports.sums import FIRST_FIELDS, SceneSums, joined, sum_scenes
from segpipe.reports.totals import Planned, ReportTotals

Array = np.ndarray[Any, Any]

REPORT_COLUMNS: Final = (
    *FIRST_FIELDS,
    *("part", "unit", "row_off", "col_off", "height", "width", "valid_px", "class_px"),
    *("label_uri", "label_px", "compared_px", "confusion", "status", "error_kind", "error"),
)
"""Columns of a mask row (and, where they are joined on, of the plan) that reports are made of."""

FAILURE_SCHEMA: Final = pa.schema(
    [
        *((name, pa.string()) for name in ("scene_id", "uri")),
        *((name, pa.int32()) for name in ("part", "unit", "row_off", "col_off", "height", "width")),
        *((name, pa.string()) for name in ("error_kind", "error")),
        ("label_px", pa.int64()),
    ]
)
CONFUSION_SCHEMA: Final = pa.schema(
    [("label", pa.string()), ("predicted", pa.string()), ("pixels", pa.int64())]
)

_PENDING_ROWS: Final = 4096
_MATRIX_CELLS: Final = 1 << 21  # confusion cells held at once: 16 MiB
_GROUP_CELLS: Final = 1 << 20
_GROUP_ROWS: Final = 4096


@dataclass(frozen=True, slots=True)
class Reports:
    """The summary and the small tables of a run; the rows of scenes and failures are in their files."""

    classes: Any
    """Arrow table, one row per class: id, name, scores, compared pixels (label, prediction), mask pixels."""
    confusion: Any
    """Arrow table of CONFUSION_SCHEMA: all pairs of classes, zeros too."""
    matrix: Array
    """The same as (C, C) int64, rows label, columns prediction."""
    summary: dict[str, Any]
    """The content of summary.json."""
    worst_scenes: list[dict[str, Any]]
    """The NUM_WORST compared scenes of lowest miou, worst first."""
    failures: list[dict[str, Any]]
    """The first NUM_FAILURES_SHOWN failed blocks."""


class ReportBuilder:
    """Makes the score tables from mask rows without masks, that come in plan order (a scene's rows together).

    ``scenes.parquet`` and ``failures.parquet`` are written to the two binary files while rows pass; the
    files stay open. A scene's status: ``failed`` = every block of it failed; ``partial`` = some failed, or
    some have no row yet; ``empty`` = no block has a valid pixel; else ``ok``. Rows that a newer part has
    superseded must have been left out. CheckError for rows that contradict the classes.
    """

    def __init__(
        self, classes: Sequence[ClassInfo], scenes_file: IO[bytes], failures_file: IO[bytes]
    ) -> None:
        self._classes = tuple(classes)
        self._schema = scene_schema(classes)
        self._scenes = BufferedWriter(scenes_file, self._schema)
        self._failures = BufferedWriter(failures_file, FAILURE_SCHEMA)
        self._totals = ReportTotals(len(self._classes))
        self._pending: list[Any] = []
        self._pending_rows = 0
        self._open: SceneSums | None = None

    def add(self, rows: Any) -> None:
        """Take an Arrow record batch or table of mask rows; of REPORT_COLUMNS, absent ones are null."""
        columns = [name for name in REPORT_COLUMNS if name in rows.schema.names]
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        self._pending.append(table.select(columns))
        self._pending_rows += table.num_rows
        if self._pending_rows >= _PENDING_ROWS:
            self._flush()

    def close(self, about: Mapping[str, Any] | None = None, planned: Planned | None = None) -> Reports:
        """Write the last scenes and return the totals; ``about`` (recipe key, model) leads the summary."""
        self._flush()
        if self._open is not None:
            self._emit(self._open)
            self._open = None
        self._scenes.close()
        self._failures.close()
        totals = self._totals
        counts = totals.counts
        labelled = counts["label_blocks"] + counts["uncounted_label_blocks"] + counts["compared_blocks"] > 0
        scores = Scores.from_confusion(totals.confusion, counts["label_px"])
        classes = _class_table(self._classes, scores, totals.class_px, labelled)
        summary = {
            "format": FORMAT,
            **(about or {}),
            **totals.ledger(planned),
            "label_px": counts["label_px"] if labelled else None,
            "compared_px": counts["compared_px"] if labelled else None,
            "uncounted_label_blocks": counts["uncounted_label_blocks"],
            "scores": scores.overall() if labelled else None,
            "classes": classes.to_pylist(),
        }
        confusion = _confusion_table(self._classes, totals.confusion)
        return Reports(classes, confusion, totals.confusion, summary, totals.worst, totals.failures)

    def _flush(self) -> None:
        if not self._pending:
            return
        rows = pa.concat_tables(self._pending, promote_options="permissive")
        self._pending, self._pending_rows = [], 0
        self._add_failures(rows)
        num_classes = len(self._classes)
        step = min(_PENDING_ROWS, max(1, _MATRIX_CELLS // num_classes**2))
        for start in range(0, rows.num_rows, step):
            sums = sum_scenes(rows.slice(start, step), num_classes)
            if self._open is not None:
                sums = joined(self._open, sums)
            if len(sums):  # the last scene may go on in the next rows
                self._emit(sums.part(0, len(sums) - 1))
                self._open = sums.part(len(sums) - 1, len(sums))

    def _emit(self, sums: SceneSums) -> None:
        if len(sums):
            table = _scene_table(sums, self._schema)
            self._totals.add(sums, table)
            self._scenes.write(table)

    def _add_failures(self, rows: Any) -> None:
        failed = rows.filter(pc.equal(rows["status"], FAILED))
        if failed.num_rows == 0:
            return
        columns = {
            field.name: failed[field.name].cast(field.type)
            if field.name in failed.schema.names
            else pa.nulls(failed.num_rows, field.type)
            for field in FAILURE_SCHEMA
        }
        table = pa.table(columns, schema=FAILURE_SCHEMA)
        self._failures.write(table)
        self._totals.add_failures(table)


def parquet_bytes(table: Any) -> bytes:
    """Return a small table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def summary_json(summary: Mapping[str, Any]) -> bytes:
    """Return the bytes of summary.json."""
    return (json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def column_names(names: Sequence[str]) -> list[str]:
    """Return a snake_case column suffix for each class, unique; ``class_<index>`` where nothing is left."""
    columns: list[str] = []
    for index, name in enumerate(names):
        ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", ascii_name)
        column = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_") or f"class_{index}"
        while column in columns:
            column = f"{column}_{index}"
        columns.append(column)
    return columns


def scene_schema(classes: Sequence[ClassInfo]) -> Any:
    """Return the schema of ``scenes.parquet``: one row per scene, with iou_<class> and px_<class>."""
    suffixes = column_names([info.name for info in classes])
    return pa.schema(
        [
            pa.field("scene_id", pa.string(), nullable=False),
            ("uri", pa.string()),
            pa.field("status", pa.string(), nullable=False),
            ("error_kind", pa.string()),
            *((name, pa.int64()) for name in ("blocks", "failed_blocks")),
            *((name, pa.int32()) for name in ("height", "width")),
            *((name, pa.int64()) for name in ("missing_px", "valid_px", "label_px", "compared_px")),
            *((name, pa.float64()) for name in OVERALL_SCORES),
            ("downsample", pa.int32()),
            ("pixel_m", pa.float64()),
            ("coarser_than_model", pa.bool_()),
            *((f"iou_{suffix}", pa.float64()) for suffix in suffixes),
            *((f"px_{suffix}", pa.int64()) for suffix in suffixes),
        ]
    )


class BufferedWriter:
    """Writes tables of any size as Parquet row groups of about one size; ``close`` leaves the file open."""

    def __init__(self, file: IO[bytes], schema: Any) -> None:
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._schema = schema
        self._group_rows = min(_GROUP_ROWS, max(1, _GROUP_CELLS // len(schema.names)))
        self._tables: list[Any] = []
        self._rows = 0

    def write(self, table: Any) -> None:
        self._tables.append(table)
        self._rows += table.num_rows
        if self._rows >= self._group_rows:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=self._group_rows)
        self._tables, self._rows = [], 0


def _scene_table(sums: SceneSums, schema: Any) -> Any:
    first = sums.first
    scores = score_arrays(sums.confusion)
    scene_px = (
        pc.fill_null(first["scene_height"], 0).to_numpy().astype(np.int64)
        * pc.fill_null(first["scene_width"], 0).to_numpy()
    )
    missing_px = np.maximum(scene_px - sums.count("block_px"), 0)
    has_label = sums.count("label_blocks") > 0
    columns = [
        first["scene_id"],
        first["uri"],
        pa.array(_statuses(sums, missing_px)),
        pa.array(sums.kinds, pa.string()),
        pa.array(sums.count("blocks")),
        pa.array(sums.count("failed")),
        first["scene_height"],
        first["scene_width"],
        pa.array(missing_px),
        pa.array(sums.count("valid_px")),
        pa.array(sums.count("label_px"), mask=~has_label),
        pa.array(sums.count("compared_px"), mask=~has_label),
        *(_floats(getattr(scores, name)) for name in OVERALL_SCORES),
        first["downsample"],
        first["pixel_m"],
        first["coarser_than_model"],
        *_class_columns(scores, sums.class_px),
    ]
    return pa.table(columns, schema=schema)


def _statuses(sums: SceneSums, missing_px: Array) -> Any:
    blocks, failed = sums.count("blocks"), sums.count("failed")
    conditions = [
        (failed == blocks) & (missing_px == 0),
        (failed > 0) | (missing_px > 0),
        sums.count("empty") == blocks,
    ]
    return np.select(conditions, ["failed", "partial", "empty"], "ok").astype(object)


def _class_columns(scores: ScoreArrays, class_px: Array) -> list[Any]:
    num_classes = class_px.shape[1]
    iou = [_floats(scores.iou[:, index]) for index in range(num_classes)]
    return iou + [pa.array(class_px[:, index]) for index in range(num_classes)]


def _floats(values: Array) -> Any:
    return pa.array(values, mask=np.isnan(values))


def _class_table(classes: Sequence[ClassInfo], scores: Scores, class_px: Array, labelled: bool) -> Any:
    nothing = [None] * len(classes)
    return pa.table(
        {
            "class_id": pa.array(range(len(classes)), pa.int16()),
            "class": pa.array([info.name for info in classes]),
            "iou": pa.array(scores.iou, pa.float64()),
            "dice": pa.array(scores.dice, pa.float64()),
            "precision": pa.array(scores.precision, pa.float64()),
            "recall": pa.array(scores.recall, pa.float64()),
            "support_px": pa.array(scores.support_px if labelled else nothing, pa.int64()),
            "predicted_px": pa.array(scores.predicted_px if labelled else nothing, pa.int64()),
            "px": pa.array(class_px),
        }
    )


def _confusion_table(classes: Sequence[ClassInfo], matrix: Array) -> Any:
    names = [info.name for info in classes]
    return pa.table(
        {
            "label": pa.array(np.repeat(np.array(names, object), len(names))),
            "predicted": pa.array(names * len(names)),
            "pixels": pa.array(matrix.ravel()),
        },
        schema=CONFUSION_SCHEMA,
    )
