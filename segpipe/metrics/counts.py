"""Confusion matrices as int64 counts: rows are labels, columns predictions, and merging is plain ``+``.

A pixel is compared where neither label nor prediction is 255. numba is imported at the first count, so
that importing this module stays cheap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

IGNORE: Final = 255
"""Byte of a pixel that is not compared; classes are 0 to 254."""

_CHUNK_PX: Final = 1 << 30  # a uint32 cell of a table cannot overflow


def confusion(label: Array, predicted: Array, num_classes: int) -> Array:
    """Return the (C, C) int64 counts of the pixels where neither is 255; rows label, columns predicted.

    Both are uint8 of one shape. Raises ValueError for a value that is neither a class nor 255.
    """
    _check_classes(num_classes)
    if label.shape != predicted.shape:
        raise ValueError(f"label is {label.shape}, prediction {predicted.shape}: shapes must agree")
    from segpipe.metrics import kernels

    total = np.zeros(256 * 256, np.int64)
    tables = np.zeros((kernels.NUM_TABLES, 256 * 256), np.uint32)
    for a, b in zip(_chunks(label), _chunks(predicted), strict=True):
        kernels.add_pairs(a, b, _words(a), _words(b), tables)
        kernels.move_counts(tables, total)
    square = total.reshape(256, 256)
    _check_values("label", square.sum(axis=1), num_classes)
    _check_values("prediction", square.sum(axis=0), num_classes)
    return square[:num_classes, :num_classes].copy()


def class_counts(mask: Array, num_classes: int) -> tuple[Array, int]:
    """Return the pixels of each class, (C,) int64, and of all classes together; 255 is not counted.

    Raises ValueError for a value that is neither a class nor 255.
    """
    _check_classes(num_classes)
    from segpipe.metrics import kernels

    total = np.zeros(256, np.int64)
    tables = np.zeros((kernels.NUM_TABLES, 256), np.uint32)
    for values in _chunks(mask):
        kernels.add_values(values, _words(values), tables)
        kernels.move_counts(tables, total)
    _check_values("mask", total, num_classes)
    counts = total[:num_classes].copy()
    return counts, int(counts.sum())


def to_pairs(counts: Array) -> list[dict[str, int]]:
    """Return the stored form of a confusion matrix: its cells that are not 0, row by row."""
    labels, predictions = np.nonzero(counts)
    return [
        {"label": label, "predicted": predicted, "px": px}
        for label, predicted, px in zip(
            labels.tolist(), predictions.tolist(), counts[labels, predictions].tolist(), strict=True
        )
    ]


def from_pairs(pairs: Iterable[Mapping[str, int]], num_classes: int) -> Array:
    """Return the (C, C) int64 matrix of stored cells; ValueError for a class that does not exist."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    for pair in pairs:
        label, predicted = pair["label"], pair["predicted"]
        if not (0 <= label < num_classes and 0 <= predicted < num_classes):
            raise ValueError(f"confusion cell ({label}, {predicted}) is outside {num_classes} classes")
        counts[label, predicted] += pair["px"]
    return counts


def _check_classes(num_classes: int) -> None:
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(f"num_classes is {num_classes}: must lie between 1 and {IGNORE}")


def _chunks(values: Array) -> Iterator[Array]:
    """Yield the bytes of a uint8 array, row by row, in aligned one-dimensional pieces."""
    if values.dtype != np.uint8:
        raise ValueError(f"class bytes must be uint8, not {values.dtype}")
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.ctypes.data % 8:
        flat = flat.copy()  # compiled code reads eight bytes at once
    for start in range(0, flat.size, _CHUNK_PX):
        yield flat[start : start + _CHUNK_PX]


def _words(values: Array) -> Array:
    return values[: values.size // 8 * 8].view(np.uint64)


def _check_values(name: str, values_px: Array, num_classes: int) -> None:
    bad = np.flatnonzero(values_px[num_classes:IGNORE]) + num_classes
    if bad.size:
        listed = ", ".join(str(value) for value in bad[:5].tolist())
        raise ValueError(
            f"{name} holds {listed} ({int(values_px[bad].sum())} pixels): only 0 to {num_classes - 1} "
            f"and {IGNORE} are allowed. Map or mask the other values"
        )
