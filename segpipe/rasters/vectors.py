"""Areas of vector files in any coordinate reference system, burnt into a pixel grid by the pixel-centre rule.

GeoJSON is read here. GeoPackage, FlatGeobuf and Shapefile are read by pyogrio, an extra, from a private copy
whose content was checked: no other driver gets to see it, and it refers to nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import math
import posixpath
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform_geom

from segpipe.errors import InputError, SceneError
from segpipe.geometry import georef
from segpipe.geometry.georef import Bbox, Transform
from segpipe.geometry.grid import Window
from segpipe.rasters.driver import GDAL_ERRORS, faults_as, gdal_environment, read_object
from segpipe.rasters.georeference import on_some_map
from segpipe.rasters.scene import Version
from segpipe.rasters.scene_ids import has_suffix
from segpipe.storage import open_object
from segpipe.wording import counted, few

Array = np.ndarray[Any, Any]

GEOJSON_SUFFIXES: Final = (".geojson", ".json")
DRIVERS: Final = {".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".shp": "ESRI Shapefile"}
"""GDAL's driver of each other suffix; no further one is used."""

_SQLITE: Final = b"SQLite format 3\0"
_GEOPACKAGE_IDS: Final = (b"GPKG", b"GP10", b"GP11")
_SHAPEFILE_PARTS: Final = (".shx", ".dbf", ".prj", ".cpg")
_WKB_NAMES: Final = ("Point", "LineString", "Polygon", "MultiPoint", "MultiLineString", "MultiPolygon")
_AREAS: Final = ("Polygon", "MultiPolygon")
_LONLAT: Final = "OGC:CRS84"
_CACHED_FILES: Final = 8


@dataclass(frozen=True, slots=True)
class Area:
    """One polygon or multipolygon in the target's coordinates."""

    geometry: dict[str, Any]
    bbox: Bbox
    properties: dict[str, Any]


def is_vector(uri: str | None) -> bool:
    """The label is a file of areas, by its suffix."""
    return uri is not None and has_suffix(uri, (*GEOJSON_SUFFIXES, *DRIVERS))


def check_vector_support(uri: str | None) -> None:
    """Raise `InputError` for a file that only pyogrio reads where that is not installed."""
    if uri is not None and has_suffix(uri, tuple(DRIVERS)) and importlib.util.find_spec("pyogrio") is None:
        what = "GeoPackage, FlatGeobuf and Shapefile are read by pyogrio, which is not installed"
        raise InputError(what, uri, 'Install it: pip install "segpipe[vectors]", or convert to GeoJSON.')


@lru_cache(maxsize=_CACHED_FILES)
def read_areas(uri: str, version: Version, crs: str) -> tuple[Area, ...]:
    """The areas of a vector file in the system ``crs``, in the file's order.

    GeoJSON's own system is its ``crs`` member (GeoJSON 2008), else longitude and latitude (RFC 7946); the
    others say theirs, and hold one layer.
    Raises `SceneError` ``label_read`` for another geometry than polygons and for what cannot be read,
    ``scene_changed``; storage faults as themselves.
    """
    with faults_as("label_read"):
        data = read_object(uri, version)
    if has_suffix(uri, GEOJSON_SUFFIXES):
        tree = _parse(data, uri)
        features, named = tree["features"], _named_crs(tree)
    else:
        features, named = _read_features(data, uri)
    source, target = _system(named, uri), _system(crs, uri)
    kept = [item for item in features if item.get("geometry")]
    for item in kept:
        if item["geometry"].get("type") not in _AREAS:
            raise _unreadable(f"it holds a {item['geometry'].get('type')}; only polygons are areas", uri)
    geometries = [item["geometry"] for item in kept]
    if source != target and geometries:
        try:
            if not on_some_map(value for geometry in geometries for value in _bbox(geometry)):
                raise ValueError("a coordinate is above 1e12")
            with gdal_environment():
                geometries = transform_geom(source, target, geometries)
        except (*GDAL_ERRORS, ValueError, TypeError, IndexError) as error:
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


def _parse(data: bytes, uri: str) -> dict[str, Any]:
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


def _read_features(data: bytes, uri: str) -> tuple[list[dict[str, Any]], str]:
    """The only layer of a file of `DRIVERS` as GeoJSON features, and its system."""
    check_vector_support(uri)
    suffix = next(suffix for suffix in DRIVERS if has_suffix(uri, (suffix,)))
    if not _has_content_of(suffix, data):
        raise _unreadable(f"its content is no {DRIVERS[suffix]}", uri)
    with TemporaryDirectory(prefix="segpipe-") as folder:
        path = Path(folder) / f"areas{suffix}"
        path.write_bytes(data)
        if suffix == ".shp":
            _copy_parts(uri, path)
        if suffix == ".gpkg":
            _check_tables(path, uri)
        return _read_layer(path, DRIVERS[suffix], uri)


def _has_content_of(suffix: str, data: bytes) -> bool:
    if b"<OGRVRT" in data[: 1 << 16]:  # GDAL looks for a VRT anywhere in a file's head
        return False
    if suffix == ".gpkg":
        return data.startswith(_SQLITE) and data[68:72] in _GEOPACKAGE_IDS
    return data.startswith(b"fgb\x03fgb" if suffix == ".fgb" else b"\0\0\x27\x0a")


def _copy_parts(uri: str, path: Path) -> None:
    """Put the further files of a Shapefile beside its copy."""
    storage, key = open_object(uri)
    stem, own = posixpath.splitext(key)
    for part in _SHAPEFILE_PARTS:
        name = stem + (part.upper() if own.isupper() else part)
        if storage.stat(name) is not None:
            path.with_suffix(part).write_bytes(storage.read(name))
    for part in (".shp", ".shx", ".dbf"):  # GDAL reads what is left of a file that was cut short
        file = path.with_suffix(part)
        if file.exists() and file.stat().st_size < _stated_bytes(part, file.read_bytes()[:100]):
            raise _unreadable(f"its {part} is cut short", uri)


def _stated_bytes(part: str, head: bytes) -> int:
    """The size that the head of a Shapefile's part claims (ESRI Shapefile description, 1998; dBASE III)."""
    if part == ".dbf":
        records, header_bytes, record_bytes = struct.unpack_from("<IHH", head.ljust(12, b"\0"), 4)
        return max(32, int(header_bytes + records * record_bytes))
    (words,) = struct.unpack_from(">i", head.ljust(28, b"\0"), 24)
    return max(100, 2 * int(words))


def _check_tables(path: Path, uri: str) -> None:
    """Refuse a GeoPackage whose layers are more than tables: SQL of its own could call for other files."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        try:
            rows = database.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
            layers = {str(name) for (name,) in database.execute("SELECT table_name FROM gpkg_contents")}
        except sqlite3.Error as error:
            raise _unreadable(f"its tables cannot be read ({error})", uri) from None
    for kind, name, sql in rows:
        words = str(sql or "").lower().split()
        virtual = words[:3] == ["create", "virtual", "table"]
        if virtual and not any(word.startswith("rtree") for word in words[4:6]):
            raise _unreadable(f"it holds the virtual table {name}", uri)
        if kind == "view" and name in layers:
            raise _unreadable(f"its layer {name} is a view, not a table", uri)


def _read_layer(path: Path, driver: str, uri: str) -> tuple[list[dict[str, Any]], str]:
    import pyogrio

    try:
        layers = [str(name) for name, kind in pyogrio.list_layers(path) if kind is not None]
        if len(layers) != 1:
            raise _unreadable(f"it must have one layer with geometry, it has {few(layers) or 'none'}", uri)
        info = pyogrio.read_info(path, layer=layers[0])
        if info["driver"] != driver:
            raise _unreadable(f"GDAL takes it for {info['driver']}, not {driver}", uri)
        meta, _, shapes, columns = pyogrio.raw.read(path, layer=layers[0], force_2d=True)
        if len(shapes) < info["features"]:
            raise _unreadable(f"only {len(shapes)} of {counted(info['features'], 'area')} can be read", uri)
        if not meta["crs"]:
            raise _unreadable("it names no coordinate reference system", uri)
        names = [str(name) for name in meta["fields"]]
        features = []
        for number, shape in enumerate(shapes):
            properties = {name: _plain(column[number]) for name, column in zip(names, columns, strict=True)}
            features.append({"geometry": _from_wkb(shape), "properties": properties})
    except (pyogrio.errors.DataSourceError, ValueError, RuntimeError, struct.error) as error:
        reason = str(error).replace(str(path.parent), "")
        raise _unreadable(f"it cannot be read ({reason})", uri) from None
    return features, str(meta["crs"])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _from_wkb(data: bytes | None) -> dict[str, Any] | None:
    """GeoJSON geometry of two-dimensional well-known binary (OGC 06-103r4, 8.2); None for none or empty."""
    if data is None:
        return None
    geometry, _ = _wkb_geometry(bytes(data), 0)
    return geometry if geometry["coordinates"] or geometry["type"] not in _AREAS else None


def _wkb_geometry(data: bytes, at: int) -> tuple[dict[str, Any], int]:
    """The geometry at an offset, without its coordinates where it is no area; and the offset behind it."""
    order = "<" if data[at] == 1 else ">"
    code, count = struct.unpack_from(f"{order}II", data, at + 1)
    at += 9
    coordinates: list[Any] = []
    kind = _WKB_NAMES[code - 1] if 1 <= code <= len(_WKB_NAMES) else f"geometry of the type {code}"
    if kind == "MultiPolygon":
        for _ in range(count):
            part, at = _wkb_geometry(data, at)
            coordinates.append(part["coordinates"])
    elif kind == "Polygon":
        for _ in range(count):
            (points,) = struct.unpack_from(f"{order}I", data, at)
            ring = np.frombuffer(data, f"{order}f8", 2 * points, at + 4)
            coordinates.append(ring.reshape(-1, 2).tolist())
            at += 4 + 16 * points
    return {"type": kind, "coordinates": coordinates}, at


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
