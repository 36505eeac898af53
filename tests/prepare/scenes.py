"""Writes scenes with labels for the archive layout: 1 m pixels in UTM zone 33 north."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from layouts import Array, config_of
from rasterio.transform import Affine

from segpipe.datasets.layout import SampleRef
from segpipe.datasets.layouts import make_layout

CLASSES = ({"name": "ground", "color": (0, 0, 0)}, {"name": "house", "color": (255, 0, 0)})
RASTERS = "{parent}/../labels/{stem}.tif"
AREAS = "{parent}/../labels/{stem}.geojson"
SMALL: dict[str, Any] = {"labels": RASTERS, "classes": CLASSES, "archive": {"chip_px": 32}}


def write_scene(
    root: Path,
    name: str,
    image: Array,
    label: Array | None,
    *,
    left: float = 0.0,
    pixel_m: float | None = 1.0,
    nodata: float | None = None,
) -> None:
    """A scene with its upper left corner at (500000 + left, 5000000); ``pixel_m`` None: no georeference."""
    grid: dict[str, Any] = {"nodata": nodata}
    if pixel_m is not None:
        grid["crs"] = "EPSG:32633"
        grid["transform"] = Affine(pixel_m, 0, 500_000 + left, 0, -pixel_m, 5_000_000)
    arrays = {"scenes": image} if label is None else {"scenes": image, "labels": label[None]}
    for folder, array in arrays.items():
        path = root / folder / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        count, height, width = array.shape
        shape = {"height": height, "width": width, "count": count, "photometric": "minisblack"}
        options = grid if folder == "scenes" else {**grid, "nodata": None}
        with rasterio.open(path, "w", driver="GTiff", dtype=array.dtype, **shape, **options) as file:
            file.write(array)


def blank(root: Path, name: str, side: int, **place: float) -> None:
    write_scene(root, name, np.zeros((3, side, side), np.uint8), np.zeros((side, side), np.uint8), **place)


def write_areas(path: Path, geometries: list[dict[str, Any]], crs: str | None, **properties: Any) -> None:
    features = [{"type": "Feature", "geometry": item, "properties": properties} for item in geometries]
    tree: dict[str, Any] = {"type": "FeatureCollection", "features": features}
    if crs is not None:
        tree["crs"] = {"type": "name", "properties": {"name": crs}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def box(left: float, bottom: float, right: float, top: float) -> dict[str, Any]:
    """A rectangle in metres from the corner of `write_scene`."""
    xs, ys = (500_000 + left, 500_000 + right), (5_000_000 + bottom, 5_000_000 + top)
    ring = [[xs[0], ys[0]], [xs[1], ys[0]], [xs[1], ys[1]], [xs[0], ys[1]], [xs[0], ys[0]]]
    return {"type": "Polygon", "coordinates": [ring]}


def chips(root: Path, **options: Any) -> list[SampleRef]:
    """The samples that a layout plans, without those that it leaves out."""
    layout = make_layout(config_of("archive", root / "scenes", root / "out", **SMALL | options))
    return [ref for scene in layout.listing() for ref in layout.expand(scene) if ref.split]
