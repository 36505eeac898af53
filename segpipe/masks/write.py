"""Mask rows and the objects that hold them: the same rows always give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.geometry.grid import Window
from segpipe.masks.schema import EMPTY, FAILED, OK

Row = dict[str, Any]

# Statistics only where a reader can skip row groups by them: a third of a small object is its footer.
_STATISTICS = [
    "scene_id",
    "row_off",
    "col_off",
    "status",
    *(f"bbox.{side}" for side in ("xmin", "ymin", "xmax", "ymax")),
]


@dataclass(frozen=True, slots=True)
class Counts:
    """Pixel counts of one block against its label."""

    label_px: int
    compared_px: int
    confusion: list[dict[str, int]]


def mask_row(
    base: Row, window: Window, png: bytes | None, class_px: Sequence[int], counts: Counts | None
) -> Row:
    """Return the row of a block that was segmented; ``empty`` when no pixel is valid."""
    valid_px = int(np.sum(class_px))
    return {
        **base,
        **window_columns(window),
        "mask": png,
        "valid_px": valid_px,
        "class_px": [int(px) for px in class_px],
        "label_px": counts.label_px if counts else None,
        "compared_px": counts.compared_px if counts else None,
        "confusion": counts.confusion if counts else None,
        "status": OK if valid_px else EMPTY,
    }


def failed_row(base: Row, window: Window | None, kind: str, error: str, label_px: int | None) -> Row:
    """Return the row of a block that could not be done; window 0,0,0,0 where the header is unreadable."""
    return {
        **base,
        **window_columns(window or Window(0, 0, 0, 0)),
        "valid_px": 0,
        "label_px": label_px,
        "status": FAILED,
        "error_kind": kind,
        "error": error,
    }


def window_columns(window: Window) -> Row:
    return {
        "row_off": window.row_off,
        "col_off": window.col_off,
        "height": window.height,
        "width": window.width,
    }


def encode_unit(rows: Sequence[Row], schema: Any) -> bytes:
    """Return the Parquet bytes of one unit, a row group a scene.

    Nothing of time, host or attempt enters, so every attempt at a unit gives the same bytes.
    """
    sink = pa.BufferOutputStream()
    codecs = {name: "NONE" if name == "mask" else "ZSTD" for name in _leaf_names(schema)}
    writer = pq.ParquetWriter(
        sink,
        schema,
        version="2.6",
        compression=codecs,
        use_dictionary=False,
        write_statistics=_STATISTICS,
        write_page_checksum=True,
        store_schema=False,
    )
    with writer:
        writer.add_key_value_metadata(schema.metadata)
        for _, scene_rows in groupby(rows, key=lambda row: row["scene_id"]):
            table = pa.Table.from_pylist(list(scene_rows), schema=schema)
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _leaf_names(schema: Any) -> list[str]:
    """Return the Parquet column paths of a schema whose lists and structs may nest."""
    names: list[str] = []
    for field in schema:
        names += _leaves(field.name, field.type)
    return names


def _leaves(path: str, kind: Any) -> list[str]:
    if pa.types.is_struct(kind):
        children = [kind.field(i) for i in range(kind.num_fields)]
        return [leaf for child in children for leaf in _leaves(f"{path}.{child.name}", child.type)]
    if pa.types.is_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    return [path]
