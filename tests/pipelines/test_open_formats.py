"""A finished run opens with common readers as it is."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from archive import CLASSES, make_model, ok, predict, run, write_scene
from PIL import Image


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The masks of one scene with a place on earth and one without."""
    folder = tmp_path_factory.mktemp("run")
    model = make_model(folder / "model.safetensors", "pixel")
    write_scene(folder / "in/placed.tif", 110, 150)
    write_scene(folder / "in/nowhere.tif", 60, 70, pixel_m=None)
    ok(predict(folder / "in", model, folder / "run", block_px=64, unit_px=8000))
    return folder / "run/masks"


@pytest.fixture(params=["masks", "index"])
def footprints(request: pytest.FixtureRequest, masks: Path) -> Path:
    """Either folder of the run that has footprints."""
    return masks.parent / str(request.param)


def test_pyarrow_reads_the_folder_as_one_dataset(masks: Path) -> None:
    dataset = ds.dataset(masks, format="parquet")
    assert dataset.count_rows() == len(dataset.to_table(["scene_id", "mask"]))
    placed = dataset.to_table(["height", "width"], filter=ds.field("scene_id") == "placed").to_pylist()
    assert sum(row["height"] * row["width"] for row in placed) == 110 * 150
    assert dataset.count_rows(filter=ds.field("status") != "failed") == dataset.count_rows()


def test_pandas_reads_rows_and_masks_open_as_images(masks: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(masks)
    assert set(frame["scene_id"]) == {"placed", "nowhere"}
    for _, row in frame.iterrows():
        image = np.asarray(Image.open(io.BytesIO(row["mask"])))
        assert (image.shape, image.dtype) == ((row["height"], row["width"]), np.uint8)
        counts = np.bincount(image.ravel(), minlength=256)
        assert counts[: len(CLASSES)].tolist() == list(row["class_px"])
        assert counts[:255].sum() == row["valid_px"]


def test_geoparquet_metadata_and_footprints_agree(footprints: Path) -> None:
    metadata = ds.dataset(footprints, format="parquet").schema.metadata
    geo = json.loads(metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    column = geo["columns"][geo["primary_column"]]
    assert column["encoding"] == "WKB"
    assert "Polygon" in column["geometry_types"]
    covering = column["covering"]["bbox"]
    for row in pq.read_table(footprints).to_pylist():
        if row["scene_id"] == "nowhere":
            assert row["geometry"] is None
            assert row["bbox"] is None
            assert row["crs"] is None
            continue
        order, kind, rings, count = struct.unpack_from("<BIII", row[geo["primary_column"]])
        assert (order, kind, rings) == (1, 3, 1)
        points = np.frombuffer(row["geometry"], "<f8", 2 * count, offset=13).reshape(count, 2)
        assert (points[0] == points[-1]).all(), "the ring is closed"
        for name, value in zip(
            ("xmin", "ymin", "xmax", "ymax"), (*points.min(axis=0), *points.max(axis=0)), strict=True
        ):
            outer, inner = covering[name]
            assert row[outer][inner] == pytest.approx(value, abs=1e-12)
        assert 14.9 < points[:, 0].mean() < 15.1, "UTM zone 33 about its central meridian"
        assert 45.0 < points[:, 1].mean() < 45.3


def test_geopandas_opens_the_footprints(footprints: Path) -> None:
    geopandas = pytest.importorskip("geopandas", reason="geopandas is not installed")
    frame = geopandas.read_parquet(footprints)
    assert str(frame.crs) in ("OGC:CRS84", "EPSG:4326")
    assert frame[frame.scene_id == "placed"].geometry.is_valid.all()


def test_the_index_has_the_footprints_of_the_masks(masks: Path) -> None:
    columns = ["scene_id", "row_off", "col_off", "geometry", "bbox"]
    index = pq.read_table(masks.parent / "index", columns=columns).to_pylist()
    assert index == pq.read_table(masks, columns=columns).to_pylist()


def test_hugging_face_features_name_every_column(footprints: Path) -> None:
    dataset = ds.dataset(footprints, format="parquet")
    features = json.loads(dataset.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == dataset.schema.names
    assert features["scene_id"] == {"_type": "Value", "dtype": "string"}


def test_hugging_face_opens_masks_as_images(masks: Path) -> None:
    metadata = ds.dataset(masks, format="parquet").schema.metadata
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert features["mask"] == {"_type": "Image"}
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed")
    loaded = datasets.load_dataset("parquet", data_dir=str(masks), split="train")
    assert loaded[0]["mask"].mode == "L"


def test_every_object_names_its_recipe_and_its_classes_with_colours(masks: Path) -> None:
    asked = json.loads((masks.parent / "run.json").read_text())
    paths = [path for folder in (masks, masks.parent / "index") for path in folder.rglob("*.parquet")]
    assert paths[-1].parent.name == "index"
    for path in paths:
        metadata = pq.read_schema(path).metadata
        assert metadata[b"segpipe.recipe_key"].decode() == asked["recipe_key"]
        classes = json.loads(metadata[b"segpipe.classes"])
        assert [(entry["name"], tuple(entry["color"])) for entry in classes] == [
            (info.name, info.color) for info in CLASSES
        ]


def test_the_index_is_made_again_to_the_same_bytes(masks: Path) -> None:
    index = masks.parent / "index/part-00000.parquet"
    before = index.read_bytes()
    index.unlink()
    ok(run("report", masks.parent))
    assert index.read_bytes() == before


def test_objects_hold_nothing_of_this_machine_or_moment(masks: Path) -> None:
    import getpass
    import platform

    for path in masks.rglob("*.parquet"):
        data = path.read_bytes()
        assert str(masks).encode() not in data, "no output path"
        assert platform.node().encode() not in data
        assert getpass.getuser().encode() not in data or getpass.getuser() == "root"
