"""CRS, transform, ground pixel size and footprints."""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rasterio.control import GroundControlPoint
from rasters import AUTO, UTM33, noise, source_of, write_tiff

from segpipe.geometry import georef
from segpipe.geometry.grid import Window
from segpipe.rasters.georeference import footprint, pixel_size_m
from segpipe.rasters.header import inspect_scene
from segpipe.rasters.scene import SceneHeader

LAEA = "+proj=laea +lat_0=10 +lon_0=20 +ellps=WGS84 +units=m"
WINDOW = Window(0, 0, 400, 600)
TRANSFORM = tuple(UTM33["transform"])[:6]


def header_of(path: Path, **profile: object) -> SceneHeader:
    return inspect_scene(source_of(write_tiff(path, noise(1, 40, 60), **profile)), 1, AUTO)


def rings_of(wkb: bytes) -> list[list[tuple[float, float]]]:
    """The closed rings of a WKB polygon or multipolygon."""
    order, kind, count = struct.unpack_from("<BII", wkb)
    assert order == 1
    if kind == 3:
        assert count == 1
        (points,) = struct.unpack_from("<I", wkb, 9)
        numbers = struct.unpack_from(f"<{2 * points}d", wkb, 13)
        return [list(zip(numbers[::2], numbers[1::2], strict=True))]
    assert kind == 6
    rings, rest = [], wkb[9:]
    for _ in range(count):
        ring = rings_of(rest)[0]
        rings.append(ring)
        rest = rest[13 + 16 * len(ring) :]
    assert rest == b""
    return rings


def area_of(ring: list[tuple[float, float]]) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) / 2


# --- headers


def test_an_epsg_system_is_written_by_its_code(tmp_path: Path) -> None:
    header = header_of(tmp_path / "x.tif", **UTM33)
    assert header.crs == "EPSG:32633"
    assert header.transform == (0.3, 0.0, 500000.0, 0.0, -0.3, 5000000.0)
    assert header.pixel_m == pytest.approx(0.3 / 0.9996, rel=1e-6)  # the scale on the central meridian


def test_a_system_without_code_is_written_as_wkt2(tmp_path: Path) -> None:
    header = header_of(tmp_path / "x.tif", crs=LAEA, transform=UTM33["transform"])
    assert header.crs is not None
    assert header.crs.startswith("PROJCRS[")
    assert rasterio.CRS.from_wkt(header.crs) == rasterio.CRS.from_proj4(LAEA)
    assert footprint(header.crs, header.transform, WINDOW) is not None


def test_a_missing_transform_is_no_georeference(tmp_path: Path) -> None:
    header = header_of(tmp_path / "x.tif")
    assert (header.crs, header.transform, header.pixel_m) == (None, None, None)
    assert footprint(header.crs, header.transform, WINDOW) is None


@pytest.mark.parametrize(
    "transform",
    [
        (0.3, 0.1, 500000.0, 0.1, -0.3, 5000000.0),
        (0.3, 0.0, 500000.0, 0.0, 0.3, 5000000.0),
        (0.0, 1.0, 5.0, 1.0, 0.0, 7.0),
    ],
    ids=["rotated", "south_up", "transposed"],
)
def test_rotated_and_south_up_transforms_are_kept_and_pixels_not_flipped(
    tmp_path: Path, transform: tuple[float, ...]
) -> None:
    header = header_of(tmp_path / "x.tif", crs="EPSG:32633", transform=rasterio.Affine(*transform))
    assert header.transform == transform


def test_ground_control_points_that_an_affine_fits_give_a_transform(tmp_path: Path) -> None:
    true = rasterio.Affine(0.3, 0.02, 500000.0, 0.02, -0.3, 5000000.0)
    places = [(0, 0), (0, 60), (40, 0), (40, 60), (20, 30)]
    points = [GroundControlPoint(row, col, *(true @ (col, row))) for row, col in places]
    header = header_of(tmp_path / "x.tif", gcps=points, crs="EPSG:32633")
    assert header.crs == "EPSG:32633"
    assert header.transform == pytest.approx(tuple(true)[:6])
    bent = [*points[:4], GroundControlPoint(20, 30, points[4].x + 3.0, points[4].y)]  # ten pixels
    header = header_of(tmp_path / "y.tif", gcps=bent, crs="EPSG:32633")
    assert (header.crs, header.transform) == (None, None)


def test_aux_xml_counts_only_for_a_raster_without_its_own_georeference(tmp_path: Path) -> None:
    text = "<PAMDataset><SRS>{}</SRS><GeoTransform>100, 2, 0, 200, 0, -2</GeoTransform></PAMDataset>"
    wkt = rasterio.CRS.from_epsg(32633).to_wkt()
    Image.fromarray(noise(1, 40, 60)[0]).save(tmp_path / "x.png")
    for name in ("x.png", "y.tif"):
        (tmp_path / f"{name}.aux.xml").write_text(text.format(wkt.replace('"', "&quot;")))
    header = inspect_scene(source_of(tmp_path / "x.png"), 1, AUTO)
    assert (header.crs, header.transform) == ("EPSG:32633", (2.0, 0.0, 100.0, 0.0, -2.0, 200.0))
    assert header_of(tmp_path / "y.tif", **UTM33).transform == TRANSFORM


# --- ground pixel size


def test_a_name_with_no_room_for_aux_xml_is_that_of_a_raster_without_georeference(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 248}.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)
    header = inspect_scene(source_of(path), 3, AUTO)
    assert (header.crs, header.transform) == (None, None)


def test_web_mercator_pixels_are_measured_on_the_ground() -> None:
    # 60 degrees north: the projection doubles lengths (a little less on the ellipsoid)
    y = 8399737.889818357
    size = pixel_size_m("EPSG:3857", (1.0, 0.0, 0.0, 0.0, -1.0, y), 2, 2)
    assert size == pytest.approx(0.5, rel=0.003)


def test_geographic_pixels_are_measured_on_the_ground() -> None:
    # one degree at the equator: 111319.49 m east, 110574.28 m north (WGS84)
    size = pixel_size_m("EPSG:4326", (1e-5, 0.0, 0.0, 0.0, -1e-5, 1e-5), 2, 2)
    assert size == pytest.approx(math.sqrt(1.1131949 * 1.1057428), rel=1e-6)


def test_a_local_system_counts_by_its_own_unit() -> None:
    feet = 'LOCAL_CS["site",UNIT["US survey foot",0.304800609601219]]'
    assert pixel_size_m(feet, (2.0, 0.0, 0.0, 0.0, -2.0, 0.0), 10, 10) == pytest.approx(0.6096012)
    assert footprint(feet, (2.0, 0.0, 0.0, 0.0, -2.0, 0.0), WINDOW) is None


@given(st.floats(-79, 79), st.floats(-175, 175), st.floats(0.05, 30), st.floats(0, 360))
def test_utm_pixels_keep_their_size_within_a_percent(
    lat: float, lon: float, size: float, turn: float
) -> None:
    zone = int((lon + 180) // 6) + 1
    central = zone * 6 - 183
    epsg = f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"
    (x,), (y,) = rasterio.warp.transform("EPSG:4326", epsg, [central], [lat])
    cos, sin = size * math.cos(math.radians(turn)), size * math.sin(math.radians(turn))
    assert pixel_size_m(epsg, (cos, sin, x, sin, -cos, y), 2, 2) == pytest.approx(size / 0.9996, rel=1e-3)


# --- footprints


def test_a_footprint_is_the_window_outline_in_lon_lat(tmp_path: Path) -> None:
    result = footprint("EPSG:32633", TRANSFORM, Window(100, 200, 300, 400))
    assert result is not None
    wkb, bbox = result
    (ring,) = rings_of(wkb)
    xs = [500000 + 0.3 * col for col in (200, 200, 600, 600)]
    ys = [5000000 - 0.3 * row for row in (100, 400, 400, 100)]
    expected = list(zip(*rasterio.warp.transform("EPSG:32633", "OGC:CRS84", xs, ys), strict=True))
    corners = ring[::4]
    assert ring[0] == ring[-1]
    np.testing.assert_allclose(corners[:4], expected, atol=2e-9)
    assert area_of(ring) > 0
    lons, lats = zip(*ring, strict=True)
    assert bbox == (min(lons), min(lats), max(lons), max(lats))
    assert all(value == round(value, 9) for point in ring for value in point)


@pytest.mark.parametrize(("dx", "dy"), [(1, -1), (1, 1), (-1, -1), (-1, 1)])
def test_footprints_run_counter_clockwise_for_every_orientation(dx: int, dy: int) -> None:
    result = footprint("EPSG:4326", (dx * 1e-5, 0.0, 10.0, 0.0, dy * 1e-5, 50.0), WINDOW)
    assert result is not None
    (ring,) = rings_of(result[0])
    assert len(ring) == 5
    assert area_of(ring) == pytest.approx(600e-5 * 400e-5)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:4326", (0.01, 0.0, 179.0, 0.0, -0.01, 10.0)),
        ("EPSG:32660", (500.0, 0.0, 600000.0, 0.0, -500.0, 1000000.0)),
    ],
)
def test_a_footprint_across_the_antimeridian_is_two_polygons(crs: str, transform: georef.Transform) -> None:
    result = footprint(crs, transform, WINDOW)
    assert result is not None
    rings = rings_of(result[0])
    assert len(rings) == 2
    for ring in rings:
        assert area_of(ring) > 0
        assert all(-180 <= lon <= 180 for lon, _ in ring)
    xmin, _, xmax, _ = result[1]
    assert 170 < xmin < 180
    assert -180 < xmax < -170


def test_a_whole_world_is_one_polygon() -> None:
    result = footprint("EPSG:4326", (1.0, 0.0, -180.0, 0.0, -1.0, 90.0), Window(0, 0, 180, 360))
    assert result is not None
    assert result[1] == (-180.0, -90.0, 180.0, 90.0)
    assert area_of(rings_of(result[0])[0]) == 360 * 180


def test_longitudes_beyond_180_are_brought_back() -> None:
    result = footprint("EPSG:4326", (0.01, 0.0, 200.0, 0.0, -0.01, 10.0), WINDOW)
    assert result is not None
    assert result[1] == (-160.0, 6.0, -154.0, 10.0)


def test_a_window_around_a_pole_has_no_footprint() -> None:
    assert footprint("EPSG:3031", (1000.0, 0.0, -300000.0, 0.0, -1000.0, 200000.0), WINDOW) is None
    beside = footprint("EPSG:3031", (1000.0, 0.0, 300000.0, 0.0, -1000.0, 200000.0), WINDOW)
    assert beside is not None
    assert area_of(rings_of(beside[0])[0]) > 0


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:32633"])
@pytest.mark.parametrize("far", [1e13, 1e20, 1e300, math.inf, math.nan])
def test_a_place_beyond_any_map_has_no_footprint(crs: str, far: float) -> None:
    assert footprint(crs, (0.5, 0.0, far, 0.0, -0.5, 0.0), Window(0, 0, 10, 10)) is None
    assert footprint(crs, (0.5, 0.0, 0.0, 0.0, -0.5, -far), Window(0, 0, 10, 10)) is None


def test_a_place_without_lon_lat_has_no_footprint() -> None:
    assert footprint("EPSG:32633", (1e9, 0.0, 0.0, 0.0, -1e9, 0.0), WINDOW) is None
    assert footprint("no system", TRANSFORM, WINDOW) is None


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(-5, 5), st.floats(-5, 5), st.floats(0.1, 5))
def test_a_shifted_transform_names_the_same_ground(row: int, col: int, b: float, d: float, a: float) -> None:
    transform = (a, b, 12.5, d, -a, -7.25)
    shifted = georef.shift(transform, Window(row, col, 10, 10))
    expected = georef.apply(transform, col + 3, row + 4)
    assert georef.apply(shifted, 3, 4) == pytest.approx(expected, rel=1e-12, abs=1e-6)
