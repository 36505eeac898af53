"""GeoJSON areas in any coordinate reference system, burnt into a pixel grid by the pixel-centre rule."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform_geom

from segpipe.errors import ObjectChanged, ObjectMissing, SceneError
from segpipe.geometry import georef
from segpipe.geometry.georef import Bbox, Transform
from segpipe.geometry.grid import Window
from segpipe.rasters.driver import GDAL_ERRORS, gdal_environment
from segpipe.rasters.scene import Version
from segpipe.storage import open_object

Array = np.ndarray[Any, Any]

VECTOR_SUFFIXES: Final = (".geojson", ".json")
_AREAS: Final = ("Polygon", "MultiPolygon")
_LONLAT: Final = "OGC:CRS84"
_CACHED_FILES: Final = 8


@dataclass(frozen=True, slots=True)
class Area:
    """One polygon or multipolygon in the target's coordinates."""

    geometry: dict[str, Any]
    bbox: Bbox
    properties: dict[str, Any]


@lru_cache(maxsize=_CACHED_FILES)
def read_areas(uri: str, version: Version, crs: str) -> tuple[Area, ...]:
    """The areas of a GeoJSON file in the system ``crs``, in the file's order.

    The file's own system is its ``crs`` member (GeoJSON 2008), else longitude and latitude (RFC 7946).
    Raises `SceneError` ``label_read`` for another geometry than polygons and for what cannot be read,
    ``scene_changed``; storage faults as themselves.
    """
    tree = _parse(uri, version)
    source = _system(_named_crs(tree), uri)
    target = _system(crs, uri)
    kept = [item for item in tree["features"] if item.get("geometry")]
    for item in kept:
        if item["geometry"].get("type") not in _AREAS:
            raise _unreadable(f"it holds a {item['geometry'].get('type')}; only polygons are areas", uri)
    geometries = [item["geometry"] for item in kept]
    if source != target and geometries:
        try:
            with gdal_environment():
                geometries = transform_geom(source, target, geometries)
        except (*GDAL_ERRORS, ValueError, TypeError) as error:
            raise _unreadable(f"its areas cannot be projected ({error})", uri) from None
    try:
        return tuple(
            Area(geometry, _bbox(geometry), dict(item.get("properties") or {}))
            for geometry, item in zip(geometries, kept, strict=True)
        )
    except (TypeError, ValueError, IndexError) as error:
        raise _unreadable(f"its coordinates cannot be read ({error})", uri) from None


def burn(
    areas: Sequence[Area],
    values: Sequence[int],
    transform: Transform,
    window: Window,
    *,
    all_touched: bool = False,
) -> Array:
    """uint8 (height, width) of ``window``: 0, or the value of the last area that holds the pixel's centre.

    ``transform`` is the whole scene's. ``all_touched``: every pixel that an area touches.
    """
    own = georef.shift(transform, window)
    seen = window_bbox(transform, window)
    shapes = [
        (area.geometry, value) for area, value in zip(areas, values, strict=True) if overlaps(area.bbox, seen)
    ]
    shape = (window.height, window.width)
    if not shapes:
        return np.zeros(shape, np.uint8)
    with gdal_environment():
        return np.asarray(
            rasterize(shapes, shape, fill=0, transform=Affine(*own), all_touched=all_touched, dtype="uint8")
        )


def window_bbox(transform: Transform, window: Window) -> Bbox:
    """The box round a window in the scene's coordinates."""
    xs, ys = zip(*georef.outline(transform, window, 0), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def overlaps(one: Bbox, other: Bbox) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _parse(uri: str, version: Version) -> dict[str, Any]:
    storage, key = open_object(uri)
    try:
        data = storage.read_range(key, 0, version.size_bytes, version.etag)
    except ObjectChanged:
        raise SceneError("scene_changed", "it changed since it was listed", uri) from None
    except ObjectMissing:
        raise _unreadable("it is gone", uri) from None
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise _unreadable(f"it is no JSON ({error})", uri) from None
    if isinstance(tree, dict) and tree.get("type") == "Feature":
        tree = {**tree, "type": "FeatureCollection", "features": [tree]}
    features = tree.get("features") if isinstance(tree, dict) else None
    if not isinstance(features, list) or not all(isinstance(item, dict) for item in features):
        raise _unreadable("it is no GeoJSON FeatureCollection", uri)
    return tree


def _named_crs(tree: dict[str, Any]) -> str:
    member = tree.get("crs")
    if not isinstance(member, dict):
        return _LONLAT
    name = str((member.get("properties") or {}).get("name", ""))
    return _LONLAT if name.endswith("CRS84") or not name else name


def _system(name: str, uri: str) -> CRS:
    try:
        return CRS.from_user_input(name)
    except CRSError:
        raise _unreadable(f"the coordinate reference system {name!r} is unknown", uri) from None


def _bbox(geometry: dict[str, Any]) -> Bbox:
    points = list(_points(geometry["coordinates"]))
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if not points or not all(map(math.isfinite, (*xs, *ys))):
        raise ValueError("an area without finite points")
    return min(xs), min(ys), max(xs), max(ys)


def _points(coordinates: Any) -> Iterator[tuple[float, float]]:
    if isinstance(coordinates[0], int | float):
        yield float(coordinates[0]), float(coordinates[1])
        return
    for item in coordinates:
        yield from _points(item)


def _unreadable(what: str, uri: str) -> SceneError:
    return SceneError("label_read", what, uri, "Repair the file.")
