"""COCO-Stuff's PNG maps: what their values mean, and which photograph each belongs to."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import config_of, pixels_of, prepared, rows_of, save

from segpipe.datasets.coco_maps import map_categories
from segpipe.datasets.layouts import make_layout
from segpipe.errors import InputError
from segpipe.masks.codec import decode_mask

JET = [value for index in range(256) for value in (index, 255 - index, index // 2)]


def write_maps(
    root: Path, folder: str, photographs: str, values: list[int], name: str = "000000000139"
) -> None:
    label = np.resize(np.array(values, np.uint8), (6, 8))
    save(root / folder / f"{name}.png", label, JET if "pixelmaps" in folder else None)
    save(root / photographs / f"{name}.jpg", np.full((6, 8, 3), 60, np.uint8))


def test_values_of_both_kinds_have_the_published_names() -> None:
    both = map_categories("stuff_thing")
    assert len(both) == 171
    assert both[0] == (1, "person")
    assert both[89] == (90, "toothbrush")
    assert both[91] == (92, "banner")
    assert both[181] == (182, "wood")
    assert both[12] == (13, "stop sign")
    stuff = map_categories("stuff")
    assert list(stuff) == list(range(92, 184))
    assert stuff[92] == (92, "banner")
    assert stuff[157] == (157, "sky-other")
    assert stuff[183] == (183, "other")
    assert {number for number, _ in both.values()} >= set(range(92, 183))


def test_thing_names_are_those_of_the_instance_annotations(shared_data: Path) -> None:
    tree = json.loads((shared_data / "fixtures/coco-panoptic/sample_data/panoptic_examples.json").read_text())
    things = {item["id"]: item["name"] for item in tree["categories"] if item["isthing"]}
    ours = {number: name for number, name in map_categories("stuff_thing").values() if number <= 91}
    assert len(ours) == len(things) == 80
    assert ours == things


def test_stuff_thing_maps_hold_the_category_id_less_one(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_maps(root, "stuffthingmaps_trainval2017/train2017", "train2017", [0, 181, 255, 91])
    write_maps(root, "stuffthingmaps_trainval2017/val2017", "val2017", [12], name="7")
    tree = prepared("coco", root, tmp_path / "out").dataset
    names = [info["name"] for info in tree["classes"]]
    rows = rows_of(tmp_path / "out")
    label = decode_mask(rows["000000000139"]["label"])
    shown = [names[value] if value != 255 else None for value in label[0, :4].tolist()]
    assert shown == ["person", "wood", None, "banner"]
    assert names[int(decode_mask(rows["7"]["label"])[0, 0])] == "stop sign"
    assert {name: row["split"] for name, row in rows.items()} == {"000000000139": "train", "7": "val"}
    assert tree["class_px"][names.index("wood")] == 12
    assert tree["ignore_px"] == 12


def test_pixel_maps_hold_the_category_id_under_a_palette(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_maps(root, "annotations/stuff_val2017_pixelmaps", "images/val2017", [92, 183, 0, 157])
    tree = prepared("coco", root, tmp_path / "out").dataset
    names = [info["name"] for info in tree["classes"]]
    assert len(names) == 92
    (row,) = rows_of(tmp_path / "out").values()
    label = decode_mask(row["label"])
    shown = [names[value] if value != 255 else None for value in label[0, :4].tolist()]
    assert shown == ["banner", "other", None, "sky-other"]
    assert row["split"] == "val"
    assert row["image"] == (root / "images/val2017/000000000139.jpg").read_bytes()


def test_maps_can_be_named_beside_annotations_and_their_values_said(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_maps(root, "masks/a", "photos", [91, 255])
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    (root / "annotations").mkdir()
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    named = {"maps": {"train": "masks/a/"}}
    with pytest.raises(InputError, match=r"coco\.map_values"):
        prepared("coco", root, tmp_path / "out", coco=named)
    tree = prepared("coco", root, tmp_path / "out", coco={**named, "map_values": "stuff_thing"}).dataset
    assert tree["class_px"][[info["name"] for info in tree["classes"]].index("banner")] == 24


def test_grey_photographs_become_colour(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_maps(root, "stuff_val2017_pixelmaps", "val2017", [92])
    save(root / "val2017/000000000139.jpg", np.full((6, 8), 60, np.uint8))
    prepared("coco", root, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out").values()
    assert pixels_of(row["image"]).shape == (6, 8, 3)


def test_maps_and_photographs_without_partner_are_named(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for name in ("a", "b"):
        write_maps(root, "stuff_val2017_pixelmaps", "val2017", [92], name=name)
    (root / "val2017/a.jpg").rename(root / "val2017/c.jpg")
    with pytest.raises(InputError, match=r"no image for 1 listed sample: stuff_val2017_pixelmaps/a\.png"):
        prepared("coco", root, tmp_path / "out")
    (root / "stuff_val2017_pixelmaps/a.png").unlink()
    with pytest.raises(InputError, match=r"no map for 1 listed sample: val2017/c\.jpg"):
        prepared("coco", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_photographs_of_one_name_are_told_apart_by_the_split(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_maps(root, "stuff_val2017_pixelmaps", "val2017", [92])
    save(root / "other/000000000139.jpg", np.zeros((6, 8, 3), np.uint8))
    prepared("coco", root, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out").values()
    assert row["image"] == (root / "val2017/000000000139.jpg").read_bytes()
    (root / "val2017").rename(root / "photos")
    with pytest.raises(InputError, match="have one name"):
        prepared("coco", root, tmp_path / "again")


@pytest.mark.parametrize(
    ("folder", "value"), [("stuff_val2017_pixelmaps", 3), ("stuffthingmaps/val2017", 11)]
)
def test_values_of_no_category_name_the_sample(tmp_path: Path, folder: str, value: int) -> None:
    write_maps(tmp_path / "in", folder, "photos", [value, 100])
    with pytest.raises(InputError, match=rf"000000000139 \(label_value\).*: {value}\b"):
        prepared("coco", tmp_path / "in", tmp_path / "out")


def test_workers_get_no_listing(tmp_path: Path) -> None:
    write_maps(tmp_path / "in", "stuff_val2017_pixelmaps", "val2017", [92])
    layout = make_layout(config_of("coco", tmp_path / "in", tmp_path / "out"))
    (ref,) = layout.listing()
    sample = pickle.loads(pickle.dumps(layout)).read(ref)  # noqa: S301 - our own bytes
    assert (sample.label == 0).all()
