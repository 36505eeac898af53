"""Coordinate reference system, transform, ground pixel size and footprints of a raster."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final
from xml.etree import ElementTree

from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import from_gcps
from rasterio.warp import transform as project

from segpipe.errors import InputError, ObjectMissing, StorageRefused
from segpipe.geometry import georef
from segpipe.geometry.georef import Bbox, Located, Point, Transform
from segpipe.geometry.grid import Window
from segpipe.rasters.driver import GDAL_ERRORS, gdal_environment
from segpipe.storage import open_object

AUX_BYTES: Final = 1 << 20
"""A larger ``NAME.aux.xml`` is not read."""

GCP_RESIDUAL_PX: Final = 1.0
"""Ground control points become a transform only where it misses none of them by this much."""

_IDENTITY: Final = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_EPSG_CONFIDENCE: Final = 90  # of 100: the same system, if perhaps under another name
_EDGE_POINTS: Final = 3
_FARTHEST: Final = 1e12


def of_dataset(dataset: Any) -> Located:
    """CRS and transform that the raster itself carries; rotated and south-up transforms stay as they are.

    Ground control points count where one affine transform fits them (`GCP_RESIDUAL_PX`); RPCs do not.
    """
    crs_text, transform = of_affine(dataset)
    if transform is not None:
        return crs_text, transform
    points, crs = dataset.gcps
    fitted = _from_gcps(points) if points else None
    return (None, None) if fitted is None else (_text(lambda: crs), fitted)


def of_affine(dataset: Any) -> Located:
    """As `of_dataset`, but without ground control points."""
    transform = _checked(tuple(dataset.transform)[:6])
    return (None, None) if transform is None else (_crs_text(dataset), transform)


def systems_differ(one: str, other: str) -> bool:
    """Whether two systems, as `Located` writes them, are known to differ: both have an EPSG code."""
    if one == other or not (one.startswith("EPSG:") and other.startswith("EPSG:")):
        return False
    first, second = _crs_of(one), _crs_of(other)
    return first is None or second is None or first != second


def in_lonlat(located: Located, height: int, width: int) -> Transform | None:
    """The affine transform to lon, lat degrees that agrees in three corners of ``height`` x ``width`` pixels.

    None without georeference, and where the system has no way to lon, lat there.
    """
    crs, transform = located
    if crs is None or transform is None:
        return None
    corners = [georef.apply(transform, *corner) for corner in ((0, 0), (width, 0), (0, height))]
    points = _to_lonlat(crs, corners)
    if points is None:
        return None
    (c, f), (right_x, right_y), (down_x, down_y) = points
    a, d = (right_x - c) / width, (right_y - f) / width
    b, e = (down_x - c) / height, (down_y - f) / height
    return _checked((a, b, c, d, e, f))


def of_sidecar(uri: str) -> Located:
    """CRS and transform of ``URI.aux.xml`` (GDAL's), which is parsed here and by nobody else.

    (None, None) where there is none, or it is too large, no plain XML, or says nothing usable.
    """
    storage, key = open_object(uri)
    key += ".aux.xml"
    try:
        info = storage.stat(key)
        if info is None or info.size_bytes > AUX_BYTES:
            return None, None
        return parse_aux(storage.read_range(key, 0, AUX_BYTES))
    except (ObjectMissing, StorageRefused, InputError):
        # S3 says 403 for what is not there to those who may not list; a long name has no room for a suffix.
        return None, None


def parse_aux(data: bytes) -> Located:
    """CRS and transform of a PAM document; no document type, so no entities, and only UTF-8."""
    try:
        text = data.decode("utf-8-sig")
        if "<!" in text.replace("<!--", ""):
            return None, None
        root = ElementTree.fromstring(text)
    except (UnicodeDecodeError, ElementTree.ParseError, ValueError):
        return None, None
    try:
        c, a, b, f, d, e = (float(part) for part in (root.findtext("GeoTransform") or "").split(","))
    except ValueError:
        return None, None
    transform = _checked((a, b, c, d, e, f))
    wkt = (root.findtext("SRS") or "").strip()
    if transform is None:
        return None, None
    return (_text(lambda: CRS.from_wkt(wkt)) if wkt else None), transform


def pixel_size_m(crs: str | None, transform: Transform | None, height: int, width: int) -> float | None:
    """Ground size of the pixel at the scene's centre in metres: the square root of its area.

    Distances are those on the ground (WGS84), so web-mercator and geographic grids come out right. A local
    system that cannot be placed on the globe counts by its own linear unit. None without a CRS.
    """
    if crs is None or transform is None:
        return None
    row, col = height / 2, width / 2
    sides = [(col - 0.5, row), (col + 0.5, row), (col, row - 0.5), (col, row + 0.5)]
    points = _to_lonlat(crs, [georef.apply(transform, *side) for side in sides])
    if points is not None and (size := georef.pixel_size_m(*points)) is not None:
        return size
    a, b, _, d, e, _ = transform
    unit_m = _linear_unit_m(crs)
    return None if unit_m is None else math.sqrt(abs(a * e - b * d)) * unit_m


def footprint(crs: str | None, transform: Transform | None, window: Window) -> tuple[bytes, Bbox] | None:
    """The window's outline in OGC:CRS84 (lon, lat): little-endian WKB and (xmin, ymin, xmax, ymax).

    ``transform`` is the scene's. A counter-clockwise polygon, its edges with points between the corners where
    the system is not geographic; a multipolygon with xmin > xmax where it crosses the antimeridian. None
    without georeference, where a point has no place on the globe, and around a pole.
    """
    if crs is None or transform is None:
        return None
    plain = _is_lonlat(crs)
    points = _to_lonlat(crs, georef.outline(transform, window, 0 if plain else _EDGE_POINTS))
    return None if points is None else georef.footprint_of_ring(points, wraps=not plain)


def _checked(values: tuple[float, ...]) -> Transform | None:
    """None for the identity (no georeference), for numbers that are not finite and for a flat grid."""
    a, b, c, d, e, f = (float(value) for value in values)
    if (a, b, c, d, e, f) == _IDENTITY or not all(map(math.isfinite, (a, b, c, d, e, f))):
        return None
    return (a, b, c, d, e, f) if a * e - b * d != 0 else None


def _from_gcps(points: list[Any]) -> Transform | None:
    try:
        transform = _checked(tuple(from_gcps(points))[:6])
    except (*GDAL_ERRORS, ValueError):
        return None
    if transform is None:
        return None
    a, b, _, d, e, _ = transform
    det = a * e - b * d
    for point in points:
        x, y = georef.apply(transform, point.col, point.row)
        dx, dy = point.x - x, point.y - y
        if math.hypot((e * dx - b * dy) / det, (a * dy - d * dx) / det) >= GCP_RESIDUAL_PX:
            return None
    return transform


def _crs_text(dataset: Any) -> str | None:
    return _text(lambda: dataset.crs)


def _text(get: Callable[[], CRS | None]) -> str | None:
    """``EPSG:n`` where the system is that one, else WKT2; None for no system or one that cannot be read."""
    try:
        crs = get()
        return _crs_as_text(crs.to_wkt()) if crs else None
    except CRSError:
        return None


@lru_cache(maxsize=256)
def _crs_as_text(wkt: str) -> str:
    crs = CRS.from_wkt(wkt)
    epsg = crs.to_epsg(confidence_threshold=_EPSG_CONFIDENCE)
    return f"EPSG:{epsg}" if epsg else str(crs.to_wkt(version="WKT2_2019"))


@lru_cache(maxsize=256)
def _crs_of(text: str) -> CRS | None:
    try:
        return CRS.from_string(text)
    except CRSError:
        return None


@lru_cache(maxsize=1)
def _lonlat() -> CRS:
    return CRS.from_string("OGC:CRS84")


def on_some_map(coordinates: Iterable[float]) -> bool:
    """Whether all are finite and below 1e12 in any unit: PROJ never comes back from some that are not."""
    return all(abs(value) <= _FARTHEST for value in coordinates)


@lru_cache(maxsize=256)
def _is_lonlat(text: str) -> bool:
    return text in ("EPSG:4326", "OGC:CRS84")


def _linear_unit_m(text: str) -> float | None:
    crs = _crs_of(text)
    if crs is None or crs.is_geographic:
        return None
    try:
        factor = float(crs.units_factor[1])
    except (*GDAL_ERRORS, CRSError, ValueError):
        return None
    return factor if math.isfinite(factor) and factor > 0 else None


def _to_lonlat(text: str, points: list[Point]) -> list[Point] | None:
    """The points in lon, lat degrees; None where the system cannot be transformed or they lie too far off."""
    if _is_lonlat(text):
        return points
    if not on_some_map(value for point in points for value in point):
        return None
    crs = _crs_of(text)
    if crs is None:
        return None
    try:
        with gdal_environment():
            xs, ys = project(crs, _lonlat(), [x for x, _ in points], [y for _, y in points])[:2]
    except (*GDAL_ERRORS, CRSError):
        return None
    return list(zip(xs, ys, strict=True))
