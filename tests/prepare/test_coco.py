"""COCO: regions equal pycocotools' and panoptic segments their categories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import config_of, pixels_of, prepared, rows_of, save

from segpipe.datasets.coco_masks import polygon_mask, region_mask, runs_mask, unpack_counts
from segpipe.datasets.layouts import make_layout
from segpipe.errors import InputError
from segpipe.masks.codec import decode_mask


def oracle() -> Any:
    return pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")


def test_random_polygons_equal_pycocotools() -> None:
    mask = oracle()
    random = np.random.default_rng(11)
    for number in range(300):
        height, width = (int(side) for side in random.integers(3, 60, 2))
        points = random.uniform(-8, 68, 2 * int(random.integers(3, 9)))
        if number % 3 == 0:
            points = np.round(points)
        ours = polygon_mask(points.tolist(), height, width)
        theirs = mask.decode(mask.frPyObjects([points.tolist()], height, width))[..., 0]
        assert np.array_equal(ours, theirs.astype(bool)), (number, height, width, points.tolist())


def test_compressed_runs_equal_pycocotools() -> None:
    mask = oracle()
    random = np.random.default_rng(3)
    for _ in range(50):
        truth = random.random((int(random.integers(1, 40)), int(random.integers(1, 40)))) < random.random()
        packed = mask.encode(np.asfortranarray(truth.astype(np.uint8)))
        counts = unpack_counts(packed["counts"].decode())
        assert np.array_equal(runs_mask(counts, *truth.shape), truth)
        run = {"size": list(truth.shape), "counts": counts}
        assert np.array_equal(region_mask(run, *truth.shape), truth)


@pytest.mark.parametrize("name", ["instances-polygons", "instances-rle"])
def test_every_fixture_region_equals_pycocotools(shared_data: Path, name: str) -> None:
    mask = oracle()
    tree = json.loads((shared_data / "fixtures/coco" / name / "annotations.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in tree["images"]}
    for item in tree["annotations"]:
        height, width = sizes[item["image_id"]]
        packed = item["segmentation"]
        if isinstance(packed, list):
            packed = mask.merge(mask.frPyObjects(packed, height, width))
        theirs = mask.decode(packed).astype(bool)
        assert np.array_equal(region_mask(item["segmentation"], height, width), theirs)


@pytest.mark.parametrize("text", ["0", "~~", "o"])
def test_broken_run_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"run lengths|do not fill"):
        region_mask({"size": [4, 4], "counts": text}, 4, 4)


def test_polygon_fixture_shows_voc_classes(shared_data: Path, tmp_path: Path) -> None:
    tree = prepared("coco", shared_data / "fixtures/coco/instances-polygons", tmp_path / "out").dataset
    assert [info["name"] for info in tree["classes"]][:2] == ["_background_", "aeroplane"]
    row = rows_of(tmp_path / "out")["JPEGImages/2011_000003"]
    voc = shared_data / "fixtures/voc/VOC2011/SegmentationClass/2011_000003.png"
    truth, label = pixels_of(voc.read_bytes()), decode_mask(row["label"])
    inside = truth != 255
    assert (label[inside] == truth[inside]).mean() > 0.97


def test_panoptic_pixels_have_the_category_of_their_segment(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "fixtures/coco-panoptic/sample_data"
    named = {"annotations": {"val": "panoptic_examples.json"}}
    tree = prepared("coco", source, tmp_path / "out", coco=named).dataset
    content = json.loads((source / "panoptic_examples.json").read_text())
    order = sorted(item["id"] for item in content["categories"])
    images = {item["id"]: item["file_name"].removesuffix(".jpg") for item in content["images"]}
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 2
    for annotation in content["annotations"]:
        label = decode_mask(rows[images[annotation["image_id"]]]["label"])
        areas: dict[int, int] = {}
        for segment in annotation["segments_info"]:
            index = order.index(segment["category_id"])
            areas[index] = areas.get(index, 0) + segment["area"]
        assert areas == {index: int((label == index).sum()) for index in areas}
        assert int((label == 255).sum()) == label.size - sum(areas.values())
    assert tree["classes"][0]["name"] == "person"


def write_coco(root: Path, regions: list[dict[str, Any]], *, grey: bool = False) -> None:
    save(root / "val2017/a.png", np.full((6, 8) if grey else (6, 8, 3), 50, np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 6, "width": 8}],
        "annotations": [{"image_id": 1, **item} for item in regions],
        "categories": [{"id": 7, "name": "car"}, {"id": 3, "name": "tree"}],
    }
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))


def box(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def test_small_regions_lie_above_large_ones_and_crowds_below(tmp_path: Path) -> None:
    everywhere = {"size": [6, 8], "counts": [0, 48]}
    write_coco(
        tmp_path / "in",
        [
            {"id": 1, "category_id": 7, "area": 4, "iscrowd": 0, "segmentation": box(1, 1, 3, 3)},
            {"id": 2, "category_id": 3, "area": 24, "iscrowd": 0, "segmentation": box(0, 0, 4, 6)},
            {"id": 3, "category_id": 7, "area": 1, "iscrowd": 1, "segmentation": everywhere},
        ],
        grey=True,
    )
    tree = prepared("coco", tmp_path / "in", tmp_path / "out").dataset
    assert [info["name"] for info in tree["classes"]] == ["background", "tree", "car"]
    (row,) = rows_of(tmp_path / "out").values()
    label = decode_mask(row["label"])
    expected = np.full((6, 8), 255)
    expected[:, :4] = 1
    expected[1:3, 1:3] = 2
    assert np.array_equal(label, expected)
    assert row["split"] == "val"
    assert pixels_of(row["image"]).shape == (6, 8, 3)
    again = prepared("coco", tmp_path / "in", tmp_path / "crowd", coco={"crowd": "class"}).dataset
    assert again["ignore_px"] == 0
    assert again["class_px"] == [0, 20, 28]


REGION = {"id": 1, "category_id": 7, "area": 4, "iscrowd": 0, "segmentation": box(1, 1, 3, 3)}


def test_pixels_without_region_are_no_background_in_files_of_stuff(tmp_path: Path) -> None:
    write_coco(tmp_path / "in", [REGION])
    (tmp_path / "in/annotations/instances_val2017.json").rename(tmp_path / "in/annotations/stuff_val.json")
    named = {"annotations": {"val": "annotations/stuff_val.json"}}
    tree = prepared("coco", tmp_path / "in", tmp_path / "out", coco=named).dataset
    assert [info["name"] for info in tree["classes"]] == ["tree", "car"]
    assert (tree["class_px"], tree["ignore_px"]) == ([0, 4], 44)


def test_an_image_that_lies_in_several_folders_is_refused_with_them(tmp_path: Path) -> None:
    write_coco(tmp_path / "in", [REGION])
    save(tmp_path / "in/other/a.png", np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"a\.png lies in several folders: other/a\.png, val2017/a\.png"):
        prepared("coco", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("change", [{"name": "boat"}, {"id": 8}])
def test_files_whose_categories_differ_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_coco(tmp_path / "in", [])
    content = json.loads((tmp_path / "in/annotations/instances_val2017.json").read_text())
    content["images"][0]["file_name"] = "b.png"
    content["categories"][0] |= change
    save(tmp_path / "in/train2017/b.png", np.zeros((6, 8, 3), np.uint8))
    (tmp_path / "in/annotations/instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"instances_val2017\.json.* categories differ"):
        prepared("coco", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 99}, "category 99 is not listed"),
        ({"segmentation": [[1, 2]]}, "fewer than three"),
        ({"segmentation": {"size": [1, 1], "counts": [1]}}, r"the size \[1, 1\]"),
    ],
)
def test_wrong_annotations_name_the_sample(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_coco(tmp_path / "in", [REGION | change])
    with pytest.raises(InputError, match=rf"1 sample cannot be used: a \(.*{message}"):
        prepared("coco", tmp_path / "in", tmp_path / "out")


def test_workers_get_no_annotation_files(tmp_path: Path) -> None:
    import pickle

    write_coco(tmp_path / "in", [])
    layout = make_layout(config_of("coco", tmp_path / "in", tmp_path / "out"))
    (ref,) = layout.listing()
    sample = pickle.loads(pickle.dumps(layout)).read(ref)  # noqa: S301 - our own bytes
    assert (sample.label == 0).all()
