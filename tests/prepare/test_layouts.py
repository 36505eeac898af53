"""The layouts on real files: what each one's labels become."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import config_of, pixels_of, prepared, rows_of, save
from rasters import write_tiff

from segpipe.config.card import ClassInfo
from segpipe.datasets.cityscapes import NUM_IDS, TRAIN_CLASSES, label_map
from segpipe.datasets.layouts import make_layout
from segpipe.datasets.voc import voc_colour
from segpipe.errors import ConfigError, InputError
from segpipe.masks.codec import decode_mask

TWO = ({"name": "land", "color": (0, 128, 0)}, {"name": "house", "color": (200, 10, 10)})


def test_cityscapes_ids_equal_the_official_table() -> None:
    labels = pytest.importorskip(
        "cityscapesscripts.helpers.labels", reason="cityscapesscripts is not installed"
    )
    ours = label_map()
    assert sum(label.id >= 0 for label in labels.labels) == NUM_IDS
    for label in labels.labels:
        if label.id >= 0:
            assert ours[str(label.id)] == label.trainId, label.name
            if label.trainId != 255:
                assert TRAIN_CLASSES[label.trainId] == (label.id, label.name, label.color)


def test_cityscapes_label_ids_become_the_published_train_ids(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "fixtures/cityscapes"
    prepared("cityscapes", source, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out").values()
    assert row["sample_id"] == "frankfurt/frankfurt_000000_000294"
    assert row["split"] == "val"
    label = decode_mask(row["label"])
    ids = pixels_of(next(source.rglob("*labelIds.png")).read_bytes())
    table = np.array([label_map()[str(label_id)] for label_id in range(NUM_IDS)])
    assert np.array_equal(label, table[ids])
    # the two published files were made smaller one by one, so they differ at edges
    train_ids = pixels_of(next(source.rglob("*labelTrainIds.png")).read_bytes())
    assert (label == train_ids).mean() > 0.995


def test_voc_labels_are_the_palette_indices(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "fixtures/voc"
    tree = prepared("voc", source, tmp_path / "out").dataset
    rows = rows_of(tmp_path / "out")
    assert {name: row["split"] for name, row in rows.items()} == {
        "VOC2011/2011_000003": "train",
        "VOC2011/2011_000006": "train",
        "VOC2011/2007_000129": "val",
        "VOC2011/2011_000025": "val",
    }
    for name, row in rows.items():
        label = source / "VOC2011/SegmentationClass" / f"{name.rpartition('/')[2]}.png"
        assert np.array_equal(decode_mask(row["label"]), pixels_of(label.read_bytes()))
    assert tree["ignore_px"] > 0
    assert tree["class_px"][15] > 0


def test_voc_colours_are_those_of_the_palette(shared_data: Path) -> None:
    from PIL import Image

    label = shared_data / "fixtures/voc/VOC2011/SegmentationClass/2011_000003.png"
    palette = np.array(Image.open(label).getpalette()).reshape(-1, 3)
    assert [voc_colour(index) for index in range(21)] == [tuple(colour) for colour in palette[:21].tolist()]


def test_camvid_lists_pair_images_with_labels_and_void_is_ignored(shared_data: Path, tmp_path: Path) -> None:
    config = config_of("camvid", shared_data / "camvid", tmp_path / "out")
    layout = make_layout(config)
    refs = list(layout.listing())
    assert [sum(ref.split == split for ref in refs) for split in ("train", "val")] == [60, 20]
    sample = layout.read(refs[0])
    assert sample is not None
    raw = pixels_of(next((shared_data / "camvid/trainannot").glob("0001TP_006690.png")).read_bytes())
    assert np.array_equal(sample.label, np.where(raw == 11, 255, raw))
    assert sample.suffix == "webp"


def test_dubai_palette_and_rgb_masks_give_the_true_colours(shared_data: Path, tmp_path: Path) -> None:
    tree = json.loads((shared_data / "dubai-aerial/classes.json").read_text())["classes"][:5]
    classes = tuple(ClassInfo(name=item["name"], color=tuple(item["rgb"])) for item in tree)
    colours = {"#{:02x}{:02x}{:02x}".format(*info.color): index for index, info in enumerate(classes)}
    config = config_of(
        "folder",
        shared_data / "dubai-aerial",
        tmp_path / "out",
        labels="{parent}/../masks/{stem}.png",
        label_map={**colours, "#000000": 255, "#9b9b9b": 255},
        classes=classes,
        split={"globs": {"val": ("tile4/**", "tile8/**")}},
    )
    layout = make_layout(config)
    refs = {ref.sample_id: ref for ref in layout.listing()}
    assert len(refs) == 49
    assert sum(ref.split == "val" for ref in refs.values()) == 13
    assert all((ref.split == "val") == name.startswith(("tile4", "tile8")) for name, ref in refs.items())
    for name in ("tile4/images/image_part_001", "tile8/images/image_part_003"):
        sample = layout.read(refs[name])
        assert sample is not None
        from PIL import Image

        path = shared_data / "dubai-aerial" / f"{name.replace('images', 'masks')}.png"
        shown = np.array(Image.open(path).convert("RGB"))
        palette = np.array([info.color for info in classes], np.uint8)
        known = sample.label != 255
        assert np.array_equal(palette[sample.label[known]], shown[known])
        assert {tuple(colour) for colour in np.unique(shown[~known], axis=0).tolist()} <= {
            (0, 0, 0),
            (155, 155, 155),
        }


def test_folder_colours_and_palettes_are_read_alike(tmp_path: Path) -> None:
    truth = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    colours = np.array([[0, 128, 0], [200, 10, 10]], np.uint8)
    for name in ("a", "b"):
        save(tmp_path / f"in/images/{name}.png", np.zeros((2, 3, 3), np.uint8))
    save(tmp_path / "in/masks/a.png", colours[truth])
    save(tmp_path / "in/masks/b.png", 1 - truth, palette=[200, 10, 10, 0, 128, 0])
    mapped = {"#008000": 0, "#c80a0a": 1}
    prepared(
        "folder",
        tmp_path / "in",
        tmp_path / "out",
        labels="{parent}/../masks/{stem}.png",
        classes=TWO,
        label_map=mapped,
    )
    for row in rows_of(tmp_path / "out").values():
        assert np.array_equal(decode_mask(row["label"]), truth)


def test_images_with_a_palette_of_16_bits_become_their_colours(tmp_path: Path) -> None:
    indices = np.array([[[0, 300, 300], [65535, 0, 7]]], np.uint16)
    colours = {0: (1, 2, 3, 255), 7: (4, 5, 6, 255), 300: (200, 10, 10, 255), 65535: (9, 9, 9, 255)}
    (tmp_path / "in").mkdir()
    write_tiff(tmp_path / "in/a.tif", indices, colormap=colours)
    save(tmp_path / "in/a_label.png", np.ones((2, 3), np.uint8))
    source = tmp_path / "in/*.tif"
    prepared("folder", source, tmp_path / "out", labels="{parent}/{stem}_label.png", classes=TWO)
    (row,) = rows_of(tmp_path / "out").values()
    shown = [[colours[int(index)][:3] for index in line] for line in indices[0]]
    assert pixels_of(row["image"]).tolist() == [[list(colour) for colour in line] for line in shown]


def test_transparent_pixels_are_ignored_and_stay_transparent(tmp_path: Path) -> None:
    image = np.full((4, 5, 4), 90, np.uint8)
    image[..., 3] = 255
    image[1, 2:, 3] = 0
    save(tmp_path / "in/images/a.png", image)
    save(tmp_path / "in/masks/a.png", np.ones((4, 5), np.uint8))
    tree = prepared(
        "folder", tmp_path / "in", tmp_path / "out", labels="{parent}/../masks/{stem}.png", classes=TWO
    ).dataset
    assert (tree["bands"], tree["valid_px"], tree["ignore_px"]) == (3, 17, 3)
    assert tree["mean"] == [90, 90, 90]
    (row,) = rows_of(tmp_path / "out").values()
    assert np.array_equal(pixels_of(row["image"]), image)
    assert (decode_mask(row["label"])[1] == [1, 1, 255, 255, 255]).all()


def test_folder_fractions_move_no_sample_when_data_are_added(tmp_path: Path) -> None:
    def splits(count: int) -> dict[str, str]:
        for number in range(count):
            save(tmp_path / f"in/images/{number}.png", np.zeros((2, 2, 3), np.uint8))
            save(tmp_path / f"in/masks/{number}.png", np.zeros((2, 2), np.uint8))
        config = config_of(
            "folder",
            tmp_path / "in",
            tmp_path / "out",
            labels="{parent}/../masks/{stem}.png",
            classes=TWO,
            split={"fractions": {"val": 0.3, "test": 0.2}},
        )
        return {ref.sample_id: ref.split for ref in make_layout(config).listing()}

    few, many = splits(40), splits(120)
    assert few.items() <= many.items()
    counts = [sum(split == name for split in many.values()) for name in ("train", "val", "test")]
    assert counts[0] > counts[1] > 10
    assert counts[2] > 10


def test_missing_folder_labels_are_named(tmp_path: Path) -> None:
    save(tmp_path / "in/images/a.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(InputError, match=r"masks/a\.png"):
        prepared(
            "folder", tmp_path / "in", tmp_path / "out", labels="{parent}/../masks/{stem}.png", classes=TWO
        )


def test_own_data_need_named_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes: name them"):
        config_of("folder", tmp_path, tmp_path / "out", labels="{stem}.png")


def test_wrong_roots_say_what_is_looked_for(tmp_path: Path) -> None:
    save(tmp_path / "in/a.png", np.zeros((2, 2, 3), np.uint8))
    for layout, message in (("camvid", r"train\.txt"), ("voc", "ImageSets"), ("cityscapes", "leftImg8bit")):
        with pytest.raises((InputError, ConfigError), match=message):
            prepared(layout, tmp_path / "in", tmp_path / "out")
