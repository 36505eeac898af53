"""Compiled loops over pixels: bands to network input, and logits to classes.

Dimensions: N bands, C classes, H, W pixels, V table entries. All kernels run on one core without the GIL, so
that callers split tiles over threads. They are compiled for a pixel type when it is first met.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from segpipe.compiled import compiled

Array = np.ndarray[Any, Any]


@compiled
def fill_from_table(
    out_HWN: Array, pixels_NHW: Array, row: int, col: int, size: tuple[int, int], table_NV: Array
) -> None:
    """Write ``table[band, pixel]`` of the ``size`` (rows, columns) pixels at (row, col) to ``out``."""
    bands = pixels_NHW.shape[0]
    if bands == 3:
        t0, t1, t2 = table_NV[0], table_NV[1], table_NV[2]
        for y in range(size[0]):
            p0 = pixels_NHW[0, row + y]
            p1 = pixels_NHW[1, row + y]
            p2 = pixels_NHW[2, row + y]
            line = out_HWN[y]
            for x in range(size[1]):
                line[x, 0] = t0[p0[col + x]]
                line[x, 1] = t1[p1[col + x]]
                line[x, 2] = t2[p2[col + x]]
        return
    for y in range(size[0]):
        for band in range(bands):
            table = table_NV[band]
            line = pixels_NHW[band, row + y]
            for x in range(size[1]):
                out_HWN[y, x, band] = table[line[col + x]]


@compiled
def fill_normalised(
    out_HWN: Array, pixels_NHW: Array, row: int, col: int, size: tuple[int, int], mean_N: Array, std_N: Array
) -> None:
    """As `fill_from_table` for any pixel type: (float32(pixel) - mean) / std; NaN and infinity become 0."""
    for y in range(size[0]):
        for band in range(pixels_NHW.shape[0]):
            mean, std = mean_N[band], std_N[band]
            line = pixels_NHW[band, row + y]
            for x in range(size[1]):
                value = (np.float32(line[col + x]) - mean) / std
                out_HWN[y, x, band] = value if math.isfinite(value) else np.float32(0.0)


@compiled
def fill_reduced(
    out_HWN: Array,
    pixels_NHW: Array,
    valid_HW: Array,
    row: int,
    col: int,
    size: tuple[int, int],
    factor: int,
    mean_N: Array,
    std_N: Array,
) -> None:
    """Write the normalised mean of the valid pixels of each ``factor`` x ``factor``; 0 where there is none.

    ``row``, ``col`` and ``size`` count reduced pixels. Groups that the array's end cuts average what is
    there. Pixels that are NaN or infinite are left out. An empty ``valid`` means that all pixels are valid.
    Sums run row by row in float32.
    """
    all_valid = valid_HW.size == 0
    for y in range(size[0]):
        top = (row + y) * factor
        bottom = min(top + factor, pixels_NHW.shape[1])
        for band in range(pixels_NHW.shape[0]):
            for x in range(size[1]):
                left = (col + x) * factor
                right = min(left + factor, pixels_NHW.shape[2])
                total = np.float32(0.0)
                count = 0
                for v in range(top, bottom):
                    for u in range(left, right):
                        value = np.float32(pixels_NHW[band, v, u])
                        if (all_valid or valid_HW[v, u] != 0) and math.isfinite(value):
                            total += value
                            count += 1
                if count == 0:
                    out_HWN[y, x, band] = np.float32(0.0)
                else:
                    out_HWN[y, x, band] = (total / np.float32(count) - mean_N[band]) / std_N[band]


@compiled
def blank_invalid(out_HWN: Array, valid_HW: Array, row: int, col: int, size: tuple[int, int]) -> None:
    """Set the pixels of ``out`` that are not valid to 0, the band mean."""
    for y in range(size[0]):
        line = valid_HW[row + y]
        for x in range(size[1]):
            if line[col + x] == 0:
                out_HWN[y, x, :] = np.float32(0.0)


@compiled
def pad_by_reflection(out_HWN: Array, rows: int, cols: int) -> None:
    """Fill ``out`` beyond its first ``rows`` x ``cols`` by reflection, repeated as often as needed.

    The edge pixel is not doubled; a side of one pixel is repeated.
    """
    side_y, side_x = out_HWN.shape[0], out_HWN.shape[1]
    for x in range(cols, side_x):
        source = 0
        if cols > 1:
            source = x % (2 * (cols - 1))
            if source >= cols:
                source = 2 * (cols - 1) - source
        for y in range(rows):
            out_HWN[y, x] = out_HWN[y, source]
    for y in range(rows, side_y):
        source = 0
        if rows > 1:
            source = y % (2 * (rows - 1))
            if source >= rows:
                source = 2 * (rows - 1) - source
        out_HWN[y] = out_HWN[source]


@compiled
def any_valid(valid_HW: Array, top: int, bottom: int, left: int, right: int) -> bool:
    """Return whether a pixel in the given rows and columns (cut to the array) is valid."""
    for y in range(top, min(bottom, valid_HW.shape[0])):
        line = valid_HW[y]
        for x in range(left, min(right, valid_HW.shape[1])):
            if line[x] != 0:
                return True
    return False


@compiled
def _taps(side: int, full: int, start: int, stop: int) -> tuple[Array, Array]:
    """Return the lower neighbour and the weight of the upper one for output places start .. stop.

    The half-pixel formula of ``torch.nn.functional.interpolate(align_corners=False)`` in float32.
    """
    scale = np.float32(side) / np.float32(full)
    lower = np.empty(stop - start, np.int64)
    weight = np.empty(stop - start, np.float32)
    half = np.float32(0.5)
    for k in range(start, stop):
        source = max(scale * (np.float32(k) + half) - half, np.float32(0.0))
        lower[k - start] = int(source)
        weight[k - start] = source - np.float32(int(source))
    return lower, weight


@compiled
def _low_classes(low_HWC: Array) -> Array:
    """Return the arg-max over the last axis, the first of equals."""
    classes = np.empty(low_HWC.shape[:2], np.uint8)
    for i in range(low_HWC.shape[0]):
        for j in range(low_HWC.shape[1]):
            best = 0
            for c in range(1, low_HWC.shape[2]):
                if low_HWC[i, j, c] > low_HWC[i, j, best]:
                    best = c
            classes[i, j] = best
    return classes


@compiled
def classes_from_low(
    low_HWC: Array, full: int, cell: tuple[int, int, int, int], out_HW: Array, out_row: int, out_col: int
) -> None:
    """Upsample logits bilinearly to ``full`` x ``full`` and write the arg-max of one cell.

    ``cell`` is (top, bottom, left, right) within the upsampled tile; its corner lands at (out_row, out_col).
    Between four neighbours of one class every pixel is a convex combination of them, so the class is theirs
    and nothing is interpolated.
    """
    top, bottom, left, right = cell[0], cell[1], cell[2], cell[3]
    rows, cols, num_classes = low_HWC.shape
    best = _low_classes(low_HWC)
    row_of, row_weight = _taps(rows, full, top, bottom)
    col_of, col_weight = _taps(cols, full, left, right)
    mixed_row = np.empty((cols, num_classes), np.float32)
    width = right - left
    for y in range(bottom - top):
        i0 = row_of[y]
        i1 = min(i0 + 1, rows - 1)
        w1 = row_weight[y]
        w0 = np.float32(1.0) - w1
        line = out_HW[out_row + y]
        row_ready = False
        x = 0
        while x < width:
            j0 = col_of[x]
            j1 = min(j0 + 1, cols - 1)
            end = x + 1
            while end < width and col_of[end] == j0:
                end += 1
            one = best[i0, j0]
            if one == best[i0, j1] and one == best[i1, j0] and one == best[i1, j1]:
                for u in range(x, end):
                    line[out_col + u] = one
                x = end
                continue
            if not row_ready:
                for j in range(cols):
                    for c in range(num_classes):
                        mixed_row[j, c] = w0 * low_HWC[i0, j, c] + w1 * low_HWC[i1, j, c]
                row_ready = True
            for u in range(x, end):
                v1 = col_weight[u]
                v0 = np.float32(1.0) - v1
                highest = v0 * mixed_row[j0, 0] + v1 * mixed_row[j1, 0]
                chosen = 0
                for c in range(1, num_classes):
                    value = v0 * mixed_row[j0, c] + v1 * mixed_row[j1, c]
                    if value > highest:
                        highest = value
                        chosen = c
                line[out_col + u] = chosen
            x = end


@compiled
def classes_from_full(
    logits_HWC: Array, cell: tuple[int, int, int, int], out_HW: Array, out_row: int, out_col: int
) -> None:
    """Write the arg-max over the last axis of one cell, as `classes_from_low` does."""
    top, bottom, left, right = cell[0], cell[1], cell[2], cell[3]
    num_classes = logits_HWC.shape[2]
    for y in range(bottom - top):
        line = out_HW[out_row + y]
        tile = logits_HWC[top + y]
        if num_classes == 2:
            for x in range(right - left):
                line[out_col + x] = np.uint8(tile[left + x, 1] > tile[left + x, 0])
        else:
            for x in range(right - left):
                highest = tile[left + x, 0]
                chosen = 0
                for c in range(1, num_classes):
                    value = tile[left + x, c]
                    if value > highest:
                        highest = value
                        chosen = c
                line[out_col + x] = chosen


@compiled
def add_weighted(
    low_HWC: Array,
    full: int,
    cell: tuple[int, int, int, int],
    row_ramp: Array,
    col_ramp: Array,
    canvas_HWC: Array,
    canvas_row: int,
    canvas_col: int,
) -> None:
    """Add the upsampled logits of one cell to the canvas, each times row_ramp[y] * col_ramp[x].

    Ramps are float32, indexed by the place within the cell. Logits of full size pass unchanged.
    """
    top, bottom, left, right = cell[0], cell[1], cell[2], cell[3]
    rows, cols, num_classes = low_HWC.shape
    row_of, row_weight = _taps(rows, full, top, bottom)
    col_of, col_weight = _taps(cols, full, left, right)
    mixed_row = np.empty((cols, num_classes), np.float32)
    for y in range(bottom - top):
        i0 = row_of[y]
        i1 = min(i0 + 1, rows - 1)
        w1 = row_weight[y]
        w0 = np.float32(1.0) - w1
        for j in range(cols):
            for c in range(num_classes):
                mixed_row[j, c] = w0 * low_HWC[i0, j, c] + w1 * low_HWC[i1, j, c]
        line = canvas_HWC[canvas_row + y]
        for x in range(right - left):
            j0 = col_of[x]
            j1 = min(j0 + 1, cols - 1)
            v1 = col_weight[x]
            v0 = np.float32(1.0) - v1
            ramp = row_ramp[y] * col_ramp[x]
            for c in range(num_classes):
                line[canvas_col + x, c] += ramp * (v0 * mixed_row[j0, c] + v1 * mixed_row[j1, c])


@compiled
def spread_classes(reduced_HW: Array, factor: int, mask_HW: Array) -> None:
    """Repeat each reduced pixel ``factor`` x ``factor``; the mask's end cuts the last groups."""
    height, width = mask_HW.shape
    for y in range(height):
        source = reduced_HW[y // factor]
        line = mask_HW[y]
        for i in range(reduced_HW.shape[1]):
            value = source[i]
            for x in range(i * factor, min((i + 1) * factor, width)):
                line[x] = value


@compiled
def mark_invalid(mask_HW: Array, valid_HW: Array, row: int, col: int, value: int) -> None:
    """Set the mask's pixels that are not valid to ``value``; the mask lies at (row, col) of ``valid``."""
    for y in range(mask_HW.shape[0]):
        line = mask_HW[y]
        checks = valid_HW[row + y]
        for x in range(mask_HW.shape[1]):
            if checks[col + x] == 0:
                line[x] = value
