"""Compiled counting loops over bytes; they run on one core and release the GIL.

Neighbouring pixels mostly have the same class, so a run of eight equal pixels is counted at once. Other
pixels go in turn to four tables, so that no add waits for the one before it to the same cell.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from segpipe.compiled import compiled

Array = np.ndarray[Any, Any]

NUM_TABLES: Final = 4
_REPEAT: Final = np.uint64(0x0101010101010101)


@compiled
def add_pairs(label: Array, predicted: Array, label8: Array, predicted8: Array, tables: Array) -> None:
    """Count the pairs of two equally long uint8 arrays into ``tables`` (NUM_TABLES, 65536) uint32.

    ``label8`` and ``predicted8`` are the same bytes as uint64, without the last size % 8. The pair (a, b)
    is counted in ``tables[t, a * 256 + b]`` of some t.
    """
    one = np.uint32(1)
    for word in range(label8.size):
        i = word * 8
        if (
            label8[word] == np.uint64(label[i]) * _REPEAT
            and predicted8[word] == np.uint64(predicted[i]) * _REPEAT
        ):
            tables[0, (label[i] << 8) | predicted[i]] += np.uint32(8)
            continue
        for k in (i, i + 4):
            tables[0, (label[k] << 8) | predicted[k]] += one
            tables[1, (label[k + 1] << 8) | predicted[k + 1]] += one
            tables[2, (label[k + 2] << 8) | predicted[k + 2]] += one
            tables[3, (label[k + 3] << 8) | predicted[k + 3]] += one
    for i in range(label8.size * 8, label.size):
        tables[0, (label[i] << 8) | predicted[i]] += one


@compiled
def add_values(values: Array, values8: Array, tables: Array) -> None:
    """Count the values of a uint8 array into ``tables`` (NUM_TABLES, 256) uint32; ``values8`` as above."""
    one = np.uint32(1)
    for word in range(values8.size):
        i = word * 8
        if values8[word] == np.uint64(values[i]) * _REPEAT:
            tables[0, values[i]] += np.uint32(8)
            continue
        for k in (i, i + 4):
            tables[0, values[k]] += one
            tables[1, values[k + 1]] += one
            tables[2, values[k + 2]] += one
            tables[3, values[k + 3]] += one
    for i in range(values8.size * 8, values.size):
        tables[0, values[i]] += one


@compiled
def move_counts(tables: Array, total: Array) -> None:
    """Add the tables to ``total``, int64, and clear them."""
    for cell in range(total.size):
        for table in range(tables.shape[0]):
            total[cell] += tables[table, cell]
            tables[table, cell] = 0
