"""COCO's encodings of a region: polygons, run lengths, compressed run lengths.

Runs go down the columns, first of zeros. A polygon is drawn as the COCO API draws it: its outline on a grid
five times as fine, of which the crossings of pixel columns are kept (cocoapi, ``rleFrPoly``); so masks equal
those of pycocotools bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

_SCALE: Final = 5.0


def region_mask(segmentation: Any, height: int, width: int) -> Array:
    """bool (height, width) of a polygon list or a run-length object. Raises `ValueError` for others."""
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), np.bool_)
        for polygon in segmentation:
            mask |= polygon_mask(polygon, height, width)
        return mask
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError("a segmentation is neither polygons nor run lengths")
    if list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(f"run lengths of the size {segmentation.get('size')}, not [{height}, {width}]")
    counts = segmentation["counts"]
    return runs_mask(unpack_counts(counts) if isinstance(counts, str) else counts, height, width)


def runs_mask(counts: Sequence[int], height: int, width: int) -> Array:
    """bool (height, width) of run lengths. Raises `ValueError` where they do not fill it."""
    runs = np.asarray(counts, np.int64)
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(f"run lengths that do not fill {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def unpack_counts(text: str) -> list[int]:
    """Run lengths out of COCO's text: 5 bits a character; from the fourth on, changes to two back."""
    counts: list[int] = []
    value, bits = 0, 0
    for char in text:
        code = ord(char) - 48
        if not 0 <= code < 64:
            raise ValueError(f"the character {char!r} in run lengths")
        value |= (code & 0x1F) << bits
        bits += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << bits
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, bits = 0, 0
    if bits:
        raise ValueError("run lengths that end within a number")
    return counts


def polygon_mask(polygon: Sequence[float], height: int, width: int) -> Array:
    """bool (height, width) of one polygon: x, y, x, y, ... in pixels."""
    points = np.asarray(polygon, np.float64)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
        raise ValueError("a polygon of fewer than three finite points")
    fine = np.trunc(_SCALE * points.reshape(-1, 2) + 0.5).astype(np.int64)
    u, v = _outline(fine)
    crossed = np.flatnonzero(u[1:] != u[:-1])
    u0, u1, v0, v1 = u[crossed], u[crossed + 1], v[crossed], v[crossed + 1]
    cols = (np.where(u1 < u0, u1, u1 - 1) + 0.5) / _SCALE - 0.5
    kept = (np.floor(cols) == cols) & (cols >= 0) & (cols <= width - 1)
    rows = np.ceil(np.clip((np.minimum(v0, v1) + 0.5) / _SCALE - 0.5, 0, height))
    places = cols[kept].astype(np.int64) * height + rows[kept].astype(np.int64)
    toggles = np.bincount(places, minlength=height * width + 1)[: height * width]
    return (np.cumsum(toggles) % 2 == 1).reshape(width, height).T


def _outline(fine: Array) -> tuple[Array, Array]:
    """All points of the closed outline, an edge after the other, each with both its ends."""
    us, vs = [], []
    for (x0, y0), (x1, y1) in zip(fine, np.roll(fine, -1, axis=0), strict=True):
        dx, dy = abs(int(x1) - int(x0)), abs(int(y1) - int(y0))
        flat = dx >= dy
        turned = x0 > x1 if flat else y0 > y1
        start, stop = ((x1, y1), (x0, y0)) if turned else ((x0, y0), (x1, y1))
        steps = np.arange(max(dx, dy) + 1)
        along, across = (0, 1) if flat else (1, 0)
        slope = (int(stop[across]) - int(start[across])) / max(1, max(dx, dy))
        first = steps + start[along]
        second = np.trunc(start[across] + slope * steps + 0.5).astype(np.int64)
        pair = (first, second) if flat else (second, first)
        us.append(pair[0][::-1] if turned else pair[0])
        vs.append(pair[1][::-1] if turned else pair[1])
    return np.concatenate(us), np.concatenate(vs)
