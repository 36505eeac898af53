"""Where pixels lie on the ground: affine transforms, outlines, footprints as WKB. Pure arithmetic.

A transform is the six numbers a, b, c, d, e, f: x = a col + b row + c, y = d col + e row + f.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

from segpipe.geometry.grid import Window

Transform = tuple[float, float, float, float, float, float]
Point = tuple[float, float]
Bbox = tuple[float, float, float, float]
Located = tuple[str | None, Transform | None]
"""CRS, as ``EPSG:n`` or WKT2, and transform; None for what is not known."""

WGS84_A_M: Final = 6378137.0
WGS84_E2: Final = 6.69437999014e-3
"""Semi-major axis and first eccentricity squared of the WGS84 ellipsoid."""

_DIGITS: Final = 9  # of a degree: 0.1 mm, far above the noise of a projection


def apply(transform: Transform, col: float, row: float) -> Point:
    """Ground coordinates of a place in the image; (0, 0) is the outer corner of the first pixel."""
    a, b, c, d, e, f = transform
    return a * col + b * row + c, d * col + e * row + f


def shift(transform: Transform, window: Window) -> Transform:
    """The transform of ``window``'s own pixel grid."""
    a, b, _, d, e, _ = transform
    x, y = apply(transform, window.col_off, window.row_off)
    return a, b, x, d, e, y


def coarser(transform: Transform, factor: int) -> Transform:
    """The transform of pixels ``factor`` times as large, from the same corner."""
    a, b, c, d, e, f = transform
    return a * factor, b * factor, c, d * factor, e * factor, f


def stray_corner(
    own: Transform, other: Transform, height: int, width: int, most_px: float
) -> tuple[str, float] | None:
    """The first corner of ``height`` x ``width`` pixels that two transforms of one system put apart.

    Apart: by more than ``most_px`` of ``own``'s pixels along its rows or columns. Returns the corner's name
    and the distance in those pixels; None where all four are together. ``own`` must have an area.
    """
    a, b, _, d, e, _ = own
    det = a * e - b * d
    for name, col, row in (
        ("upper left", 0, 0),
        ("upper right", width, 0),
        ("lower left", 0, height),
        ("lower right", width, height),
    ):
        (x, y), (there_x, there_y) = apply(own, col, row), apply(other, col, row)
        dx, dy = there_x - x, there_y - y
        cols, rows = (e * dx - b * dy) / det, (a * dy - d * dx) / det
        if not (abs(cols) <= most_px and abs(rows) <= most_px):  # not: NaN is apart
            return name, math.hypot(cols, rows)
    return None


def outline(transform: Transform, window: Window, edge_points: int) -> list[Point]:
    """The window's outline as an open ring from its first pixel's outer corner.

    Each of the four edges gives its first corner and ``edge_points`` points between the corners.
    """
    top, left, bottom, right = window.row_off, window.col_off, window.row_stop, window.col_stop
    corners = [(left, top), (left, bottom), (right, bottom), (right, top)]
    steps = edge_points + 1
    ring = []
    for (col0, row0), (col1, row1) in zip(corners, corners[1:] + corners[:1], strict=True):
        for step in range(steps):
            part = step / steps
            ring.append(apply(transform, col0 + (col1 - col0) * part, row0 + (row1 - row0) * part))
    return ring


def pixel_size_m(west: Point, east: Point, north: Point, south: Point) -> float | None:
    """Square root of a pixel's ground area in metres, on the WGS84 ellipsoid.

    The points are lon, lat in degrees: the middles of the pixel's four sides (in image order: left, right,
    top, bottom). Radii of curvature in the meridian and the prime vertical: Snyder, Map Projections (1987),
    4-18 and 4-20.
    None where a point is not finite or the pixel has no area.
    """
    if not all(map(math.isfinite, (*west, *east, *north, *south))):
        return None
    lat = math.radians((west[1] + east[1]) / 2)
    root = 1.0 - WGS84_E2 * math.sin(lat) ** 2
    meridian_m = math.radians(WGS84_A_M * (1.0 - WGS84_E2) / root**1.5)
    parallel_m = math.radians(WGS84_A_M / math.sqrt(root) * math.cos(lat))
    col_x, col_y = _turn(east[0] - west[0]) * parallel_m, (east[1] - west[1]) * meridian_m
    row_x, row_y = _turn(south[0] - north[0]) * parallel_m, (south[1] - north[1]) * meridian_m
    area = abs(col_x * row_y - col_y * row_x)
    return math.sqrt(area) if area > 0 else None


def footprint_of_ring(ring: Sequence[Point], *, wraps: bool) -> tuple[bytes, Bbox] | None:
    """WKB and bbox (xmin, ymin, xmax, ymax) of an open ring of lon, lat degrees.

    A counter-clockwise polygon; one that crosses the antimeridian is a multipolygon of two, and its bbox has
    xmin > xmax (RFC 7946, 3.1.9 and 5.2). ``wraps``: longitudes may jump by 360 degrees between points, as
    projections give them. None where a point is not finite or the ring goes round a pole.
    """
    if not all(math.isfinite(lon) and math.isfinite(lat) for lon, lat in ring):
        return None
    unrolled = _unroll(ring) if wraps else list(ring)
    if unrolled is None:
        return None
    unrolled = _brought_back(unrolled)
    if _signed_area(unrolled) < 0:
        unrolled = [unrolled[0], *unrolled[:0:-1]]
    lons, lats = [lon for lon, _ in unrolled], [lat for _, lat in unrolled]
    xmin, xmax, ymin, ymax = min(lons), max(lons), min(lats), max(lats)
    if xmax <= 180.0:
        return _polygon_wkb(_rounded(unrolled)), _rounded_bbox(xmin, ymin, xmax, ymax)
    if xmax - xmin >= 360.0:
        world = [(-180.0, ymin), (180.0, ymin), (180.0, ymax), (-180.0, ymax)]
        return _polygon_wkb(_rounded(world)), _rounded_bbox(-180.0, ymin, 180.0, ymax)
    east = _clip(unrolled, 180.0, keep_below=True)
    west = [(lon - 360.0, lat) for lon, lat in _clip(unrolled, 180.0, keep_below=False)]
    parts = [_polygon_wkb(_rounded(part)) for part in (east, west)]
    return struct.pack("<BII", 1, 6, len(parts)) + b"".join(parts), _rounded_bbox(
        xmin, ymin, xmax - 360.0, ymax
    )


def _turn(degrees: float) -> float:
    """The same direction within -180 to 180."""
    return (degrees + 180.0) % 360.0 - 180.0


def _unroll(ring: Sequence[Point]) -> list[Point] | None:
    """The ring without jumps by 360 degrees; None if it does not close then."""
    lon = ring[0][0]
    points = [ring[0]]
    for before, after in zip(ring, [*ring[1:], ring[0]], strict=True):
        lon += _turn(after[0] - before[0])
        points.append((lon, after[1]))
    points.pop()
    return points if abs(lon - ring[0][0]) < 1.0 else None


def _brought_back(ring: list[Point]) -> list[Point]:
    """The ring turned by whole circles, so that its least longitude lies in -180 .. 180."""
    turns = math.floor((min(lon for lon, _ in ring) + 180.0) / 360.0)
    return [(lon - 360.0 * turns, lat) for lon, lat in ring] if turns else ring


def _clip(ring: Sequence[Point], limit: float, *, keep_below: bool) -> list[Point]:
    """The part of a ring on one side of a meridian (Sutherland and Hodgman, one edge)."""
    kept = []
    for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
        inside0, inside1 = (x0 <= limit, x1 <= limit) if keep_below else (x0 >= limit, x1 >= limit)
        if inside0:
            kept.append((x0, y0))
        if inside0 != inside1:
            kept.append((limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)))
    return kept


def _signed_area(ring: Sequence[Point]) -> float:
    """Twice the area, positive where the ring runs counter-clockwise; measured from its first point."""
    x, y = ring[0]
    return sum(
        (x0 - x) * (y1 - y) - (x1 - x) * (y0 - y)
        for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True)
    )


def _rounded(ring: Sequence[Point]) -> list[Point]:
    return [(round(x, _DIGITS) + 0.0, round(y, _DIGITS) + 0.0) for x, y in ring]  # + 0.0: no minus zero


def _rounded_bbox(xmin: float, ymin: float, xmax: float, ymax: float) -> Bbox:
    (x0, y0), (x1, y1) = _rounded([(xmin, ymin), (xmax, ymax)])
    return x0, y0, x1, y1


def _polygon_wkb(ring: Sequence[Point]) -> bytes:
    """A polygon of one ring, which is closed here: little-endian WKB (OGC 06-103r4, 8.2)."""
    closed = [*ring, ring[0]]
    numbers = [number for point in closed for number in point]
    return struct.pack(f"<BIII{len(numbers)}d", 1, 3, 1, len(closed), *numbers)
