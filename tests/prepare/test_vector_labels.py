"""Labels as GeoPackage, FlatGeobuf and Shapefile equal those as GeoJSON; what is none of them is refused."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import Array, prepared, rows_of
from rasterio.warp import transform_geom
from scenes import AREAS, CLASSES, SMALL, blank, box, chips, write_areas, write_scene

from segpipe.errors import InputError, SceneError
from segpipe.masks.codec import decode_mask
from segpipe.rasters.scene import Version
from segpipe.rasters.vectors import DRIVERS, read_areas
from segpipe.storage import open_object

SUFFIXES = tuple(DRIVERS)
HOLED = {
    "type": "MultiPolygon",
    "coordinates": [
        box(3.2, -30, 30, -3.4)["coordinates"] + box(8, -20, 14, -10)["coordinates"],
        box(31, -36, 38, -31)["coordinates"],
    ],
}


def wkb(geometry: dict[str, Any]) -> bytes:
    """Little-endian well-known binary of a polygon or multipolygon."""
    if geometry["type"] == "MultiPolygon":
        parts = [wkb({"type": "Polygon", "coordinates": rings}) for rings in geometry["coordinates"]]
        return struct.pack("<BII", 1, 6, len(parts)) + b"".join(parts)
    rings = [
        struct.pack(f"<I{2 * len(ring)}d", len(ring), *np.ravel(ring)) for ring in geometry["coordinates"]
    ]
    return struct.pack("<BII", 1, 3, len(rings)) + b"".join(rings)


def write_vectors(
    path: Path, geometries: list[bytes], crs: str | None, *, kind: str = "MultiPolygon", **options: Any
) -> None:
    pyogrio = pytest.importorskip("pyogrio", reason="the extra segpipe[vectors] is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = options.pop("columns", {})
    pyogrio.raw.write(
        path,
        np.array(geometries, object),
        [np.asarray(values) for values in columns.values()],
        list(columns),
        driver=DRIVERS[path.suffix],
        geometry_type=kind,
        crs=crs,
        **options,
    )


def label_of(root: Path, template: str, **options: Any) -> Array:
    output = root / f"out-{len(list(root.iterdir()))}"
    settings = {"labels": template, "classes": CLASSES, **options}
    prepared("archive", root / "scenes", output, **settings)
    (row,) = rows_of(output).values()
    return decode_mask(row["label"])


def areas_of(path: Path) -> Any:
    storage, key = open_object(str(path))
    info = storage.stat(key)
    assert info is not None
    return read_areas(str(path), Version(info.size_bytes, info.etag), "EPSG:32633")


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3857"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_areas_of_every_driver_are_burnt_as_geojson_is(tmp_path: Path, suffix: str, crs: str) -> None:
    write_scene(tmp_path, "a", np.zeros((3, 40, 40), np.uint8), None)
    write_areas(tmp_path / "labels/a.geojson", [HOLED], "EPSG:32633")
    expected = label_of(tmp_path, AREAS)
    assert 0 < expected.sum() < 40 * 40
    geometry = HOLED if crs == "EPSG:32633" else transform_geom("EPSG:32633", crs, HOLED)
    write_vectors(tmp_path / f"labels/a{suffix}", [wkb(geometry)], crs)
    assert np.array_equal(label_of(tmp_path, f"{{parent}}/../labels/{{stem}}{suffix}"), expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fields_become_classes_and_later_areas_lie_above(tmp_path: Path, suffix: str) -> None:
    write_scene(tmp_path, "a", np.zeros((3, 40, 40), np.uint8), None)
    geometries = [wkb(box(0, -20, 20, 0)), wkb(box(10, -20, 20, 0))]
    columns = {"kind": np.array(["house", "7"], object), "n": np.array([1, 7], np.int32)}
    path = tmp_path / f"labels/a{suffix}"
    write_vectors(path, geometries, "EPSG:32633", kind="Polygon", columns=columns, **_in_order(suffix))
    template = f"{{parent}}/../labels/{{stem}}{suffix}"
    for name, label_map in (("kind", {"house": 1, "7": 255}), ("n", {"1": 1, "7": 255})):
        archive = {"class_property": name}
        label = label_of(tmp_path, template, archive=archive, label_map=label_map)
        assert (label[:20, :10] == 1).all()
        assert (label[:20, 10:20] == 255).all()
        assert (label[20:] == 0).all()


def _in_order(suffix: str) -> dict[str, Any]:
    """FlatGeobuf with a spatial index sorts its features."""
    return {"SPATIAL_INDEX": "NO"} if suffix == ".fgb" else {}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_excluded_areas_may_be_of_any_driver(tmp_path: Path, suffix: str) -> None:
    blank(tmp_path, "a", 96)
    path = tmp_path / f"exclude{suffix}"
    write_vectors(path, [wkb(box(40, -50, 41, -31.5))], "EPSG:32633", kind="Polygon")
    refs = chips(tmp_path, archive={"chip_px": 32, "exclude_area": str(path)})
    assert len(refs) == 7


def test_without_pyogrio_the_extra_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank(tmp_path, "a", 40)
    (tmp_path / "labels/a.gpkg").write_bytes(b"")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyogrio" else real(name, *rest)
    )
    options = SMALL | {"labels": "{parent}/../labels/{stem}.gpkg"}
    with pytest.raises(InputError, match=r"segpipe\[vectors\]"):
        prepared("archive", tmp_path / "scenes", tmp_path / "out", **options)
    write_areas(tmp_path / "labels/a.geojson", [box(0, -9, 9, 0)], "EPSG:32633")
    with pytest.raises(InputError, match=r"segpipe\[vectors\]"):
        chips(tmp_path, archive={"chip_px": 32, "exclude_area": str(tmp_path / "labels/a.gpkg")})
    assert not (tmp_path / "out").exists()
    assert label_of(tmp_path, AREAS).sum() == 81


VRT = (
    b"<OGRVRTDataSource><OGRVRTLayer name='a'><SrcDataSource>%s</SrcDataSource></OGRVRTLayer>"
    b"</OGRVRTDataSource>"
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content",
    [
        VRT % b"/vsicurl/http://127.0.0.1:1/a.gpkg",
        b"SQLite format 3\0" + bytes(52) + b"GPKG" + bytes(400) + VRT,
        b"fgb\x03fgb\x00" + VRT,
        b"\0\0\x27\x0a" + bytes(96) + VRT,
        b"SQLite format 3\0" + bytes(400),
        b"<GMLFeatureCollection/>",
        b"",
    ],
)
def test_content_of_another_driver_is_never_opened(
    tmp_path: Path, suffix: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyogrio = pytest.importorskip("pyogrio", reason="the extra segpipe[vectors] is not installed")
    monkeypatch.setattr(pyogrio, "list_layers", lambda path: pytest.fail("GDAL has seen it"))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(SceneError, match=f"its content is no {DRIVERS[suffix]}"):
        areas_of(path)


@pytest.mark.parametrize("size_bytes", [5000, -100])
@pytest.mark.parametrize("suffix", [*SUFFIXES, ".shx", ".dbf"])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, suffix: str, size_bytes: int) -> None:
    path = tmp_path / f"a{suffix if suffix in SUFFIXES else '.shp'}"
    many = [wkb(box(n, -9, n + 1, 0)) for n in range(2000)]
    write_vectors(path, many, "EPSG:32633", kind="Polygon", columns={"n": np.arange(2000)})
    assert len(areas_of(path)) == 2000
    part = path.with_suffix(suffix)
    part.write_bytes(part.read_bytes()[:size_bytes])
    read_areas.cache_clear()
    with pytest.raises(SceneError, match=r"read|is cut short") as caught:
        areas_of(path)
    assert str(tmp_path.parent) in caught.value.where
    assert "segpipe-" not in str(caught.value)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("CREATE VIRTUAL TABLE t USING fts5(x)", "the virtual table t"),
        (
            "CREATE VIEW v AS SELECT * FROM a; UPDATE gpkg_contents SET table_name = 'v'",
            "its layer v is a view",
        ),
    ],
)
def test_a_geopackage_with_sql_of_its_own_is_refused(tmp_path: Path, sql: str, message: str) -> None:
    path = tmp_path / "a.gpkg"
    write_vectors(path, [wkb(box(0, -9, 9, 0))], "EPSG:32633", kind="Polygon", layer="a")
    assert len(areas_of(path)) == 1
    with sqlite3.connect(path) as database:
        for name in [
            row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type='trigger'")
        ]:
            database.execute(f'DROP TRIGGER "{name}"')
        database.execute("PRAGMA foreign_keys = OFF")
        database.executescript(sql)
    database.close()
    with pytest.raises(SceneError, match=message):
        areas_of(path)


def test_several_layers_and_other_geometries_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gpkg"
    for layer in ("one", "two"):
        write_vectors(
            path, [wkb(box(0, -9, 9, 0))], "EPSG:32633", kind="Polygon", layer=layer, append=layer == "two"
        )
    with pytest.raises(SceneError, match="must have one layer with geometry, it has one, two"):
        areas_of(path)
    point = struct.pack("<BIdd", 1, 1, 500_000.0, 5_000_000.0)
    write_vectors(tmp_path / "b.fgb", [point], "EPSG:32633", kind="Point")
    with pytest.raises(SceneError, match="holds a Point"):
        areas_of(tmp_path / "b.fgb")


def test_a_shapefile_without_projection_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.shp"
    write_vectors(path, [wkb(box(0, -9, 9, 0))], "EPSG:32633", kind="Polygon")
    assert len(areas_of(path)) == 1
    path.with_suffix(".prj").unlink()
    read_areas.cache_clear()
    with pytest.raises(SceneError, match="no coordinate reference system"):
        areas_of(path)


def test_heights_are_left_out_and_empty_areas_passed_over(tmp_path: Path) -> None:
    ring = box(0, -9, 9, 0)["coordinates"][0]
    high = struct.pack("<BIII", 1, 1003, 1, len(ring)) + b"".join(struct.pack("<3d", *p, 5.0) for p in ring)
    path = tmp_path / "a.gpkg"
    write_vectors(path, [high, struct.pack("<BII", 1, 3, 0)], "EPSG:32633", kind="Polygon Z")
    (area,) = areas_of(path)
    assert json.loads(json.dumps(area.geometry)) == box(0, -9, 9, 0)
