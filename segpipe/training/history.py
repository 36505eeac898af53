"""The history of a training as Parquet tables, written piece by piece beside the checkpoints.

A piece is one create-only object named by its first and last step, so that a training that was killed and
goes on writes the same names again. Where pieces overlap (it went on with another distance of checkpoints),
a row comes from the piece with the later last step.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.errors import CheckError
from segpipe.metrics.scores import OVERALL_SCORES
from segpipe.reports.tables import column_names, parquet_bytes
from segpipe.storage import Storage

STEPS_PREFIX: Final = "history/steps-"
SCORES_PREFIX: Final = "history/epochs-"
ORDER_PREFIX: Final = "order/steps-"

ORDER_SCHEMA: Final = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("lane", pa.int32(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
    ]
)
"""Which sample each lane of the global batch held at each step."""

_PIECE: Final = re.compile(r"-(\d{8,})-(\d{8,})(?:-[0-9a-z-]+)?\.parquet$")
_READERS: Final = 8  # pieces are small: reading them is waiting


@dataclass(frozen=True, slots=True)
class StepRow:
    """One optimiser step."""

    step: int
    """Optimiser steps done after it, from 1."""
    epoch: int
    loss: float
    """Weighted sum of the parts."""
    parts: dict[str, float]
    """Each loss by name, not weighted; the same names at every step."""
    lr: float
    grad_norm: float | None
    """Norm of all gradients before clipping; None where it was not taken."""
    samples: int
    """Samples of the step over all workers, without fillers."""
    samples_per_s: float
    valid_px: int
    """Pixels with a label that the loss is a mean over."""


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One validation."""

    step: int
    """Optimiser steps done before it."""
    epoch: float
    """Passes over the data so far."""
    metric: float | None
    """The score that chooses the best weights; None where it is undefined."""
    is_best: bool
    """It beat all validations before it."""
    scores: dict[str, float | None]
    """Of OVERALL_SCORES."""
    class_iou: dict[str, float | None]
    """IoU by class name."""
    compared_px: int
    train_loss: float | None
    """Mean loss of the steps since the last validation."""


def iou_columns(class_names: Sequence[str]) -> list[str]:
    """Return the unique column ``iou_<snake_case name>`` of each class, as in the reports."""
    return [f"iou_{suffix}" for suffix in column_names(class_names)]


def steps_schema(parts: Iterable[str] = ()) -> Any:
    """Return the Arrow schema of ``history/steps-*.parquet``: one row per step, with loss_<part>."""
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            ("epoch", pa.int32()),
            ("loss", pa.float64()),
            *((f"loss_{part}", pa.float64()) for part in parts),
            *((name, pa.float64()) for name in ("lr", "grad_norm")),
            ("samples", pa.int64()),
            ("samples_per_s", pa.float64()),
            ("valid_px", pa.int64()),
        ]
    )


def scores_schema(class_names: Sequence[str] = ()) -> Any:
    """Return the Arrow schema of ``history/epochs-*.parquet``: one row per validation, with iou_<class>."""
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            *((name, pa.float64()) for name in ("epoch", "metric")),
            ("is_best", pa.bool_()),
            *((name, pa.float64()) for name in OVERALL_SCORES),
            *((name, pa.float64()) for name in iou_columns(class_names)),
            ("compared_px", pa.int64()),
            ("train_loss", pa.float64()),
        ]
    )


class History:
    """Collects the rows of a training and writes them at its checkpoints."""

    def __init__(self, storage: Storage, class_names: Sequence[str]) -> None:
        self._storage = storage
        self._class_names = tuple(class_names)
        self._steps: list[StepRow] = []
        self._scores: list[ScoreRow] = []

    def add_step(self, row: StepRow) -> None:
        self._steps.append(row)

    def add_score(self, row: ScoreRow) -> None:
        self._scores.append(row)

    def flush(self, step: int) -> None:
        """Write what was added since the last flush, up to ``step``; nothing where nothing was added.

        To be called before the checkpoint of ``step`` is made: a training that goes on from it then lacks no
        row. A piece that is there already stays as it is. Raises `ValueError` for a row after ``step`` and
        what ``put_if_absent`` raises; the rows are kept then, for the next flush.
        """
        if self._steps:
            table = steps_table(self._steps)
            self._storage.put_if_absent(_piece_key(STEPS_PREFIX, table, step), parquet_bytes(table))
            self._steps = []
        if self._scores:
            table = scores_table(self._scores, self._class_names)
            self._storage.put_if_absent(_piece_key(SCORES_PREFIX, table, step), parquet_bytes(table))
            self._scores = []


class OrderLog:
    """Collects which samples this worker's lanes held, and writes them at checkpoints."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._rows: list[tuple[int, int, str]] = []

    def add(self, step: int, lanes: Sequence[int], sample_ids: Sequence[str]) -> None:
        """Take one step: lane ``lanes[i]`` of the global batch held ``sample_ids[i]``."""
        self._rows += [(step, lane, name) for lane, name in zip(lanes, sample_ids, strict=True)]

    def flush(self, rank: int) -> None:
        """Write what was added since the last flush as one create-only object; nothing for nothing.

        Its name holds the steps, the rank and a digest of the rows: the same rank has other lanes where a
        training goes on with another number of workers, and such rows must not meet a taken name.
        """
        if not self._rows:
            return
        columns = list(zip(*self._rows, strict=True))
        table = pa.table(
            [pa.array(column, field.type) for column, field in zip(columns, ORDER_SCHEMA, strict=True)],
            schema=ORDER_SCHEMA,
        )
        digest = hashlib.sha256(repr(self._rows).encode("utf-8", "surrogatepass")).hexdigest()[:8]
        first, last = min(columns[0]), max(columns[0])
        key = f"{ORDER_PREFIX}{first:08d}-{last:08d}-rank-{rank:05d}-{digest}.parquet"
        self._storage.put_if_absent(key, parquet_bytes(table))
        self._rows = []


def steps_table(rows: Sequence[StepRow]) -> Any:
    """Return steps as an Arrow table of `steps_schema`; a part that a row lacks is null."""
    parts = list(dict.fromkeys(name for row in rows for name in row.parts))
    records = [
        {
            "step": row.step,
            "epoch": row.epoch,
            "loss": row.loss,
            **{f"loss_{name}": row.parts.get(name) for name in parts},
            "lr": row.lr,
            "grad_norm": row.grad_norm,
            "samples": row.samples,
            "samples_per_s": row.samples_per_s,
            "valid_px": row.valid_px,
        }
        for row in rows
    ]
    return pa.Table.from_pylist(records, schema=steps_schema(parts))


def scores_table(rows: Sequence[ScoreRow], class_names: Sequence[str]) -> Any:
    """Return validations as an Arrow table of `scores_schema`; null where a score is undefined."""
    columns = dict(zip(class_names, iou_columns(class_names), strict=True))
    records = [
        {
            "step": row.step,
            "epoch": row.epoch,
            "metric": _defined(row.metric),
            "is_best": row.is_best,
            **{name: _defined(row.scores.get(name)) for name in OVERALL_SCORES},
            **{column: _defined(row.class_iou.get(name)) for name, column in columns.items()},
            "compared_px": row.compared_px,
            "train_loss": _defined(row.train_loss),
        }
        for row in rows
    ]
    return pa.Table.from_pylist(records, schema=scores_schema(class_names))


def read_steps(storage: Storage) -> Any:
    """Return the steps of a training as one Arrow table, one row per step, in order; see `steps_schema`.

    Raises `CheckError` for a piece that is no Parquet file.
    """
    return _read(storage, STEPS_PREFIX, steps_schema(), ("step",))


def read_scores(storage: Storage) -> Any:
    """Return the validations of a training as one Arrow table, in order; see `scores_schema`."""
    return _read(storage, SCORES_PREFIX, scores_schema(), ("step",))


def read_order(storage: Storage) -> Any:
    """Return which samples a training saw, as one Arrow table of ORDER_SCHEMA by step and lane."""
    return _read(storage, ORDER_PREFIX, ORDER_SCHEMA, ("step", "lane"))


def _read(storage: Storage, prefix: str, empty_schema: Any, keys: tuple[str, ...]) -> Any:
    """All pieces of a kind as one table, one row for each value of ``keys`` (the newest), in their order."""
    found = [
        (int(match[2]), int(match[1]), info.key)
        for page in storage.list(prefix)
        for info in page
        if (match := _PIECE.search(info.key))
    ]
    if not found:
        return empty_schema.empty_table()
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda item: _read_piece(storage, item[2]), sorted(found)))
    rows = pa.concat_tables(tables, promote_options="permissive")
    place = np.arange(rows.num_rows)
    columns = [rows[name].to_numpy() for name in keys]
    order = np.lexsort((place, *reversed(columns)))
    last = np.ones(rows.num_rows, bool)  # the last of its equals: the one of the newest piece
    last[:-1] = np.logical_or.reduce([np.diff(column[order]) != 0 for column in columns])
    return rows.take(order[last]).combine_chunks()


def _read_piece(storage: Storage, key: str) -> Any:
    try:
        return pq.read_table(pa.BufferReader(storage.read(key)))
    except pa.ArrowException as error:
        raise CheckError(
            f"the table cannot be read ({error})", storage.uri(key), "Delete it; its rows are then missing."
        ) from error


def _piece_key(prefix: str, table: Any, step: int) -> str:
    steps = table["step"].to_pylist()
    if max(steps) > step:
        raise ValueError(f"a row of step {max(steps)} is after step {step}")
    return f"{prefix}{min(steps):08d}-{step:08d}.parquet"


def _defined(value: float | None) -> float | None:
    return None if value is None or value != value else value
