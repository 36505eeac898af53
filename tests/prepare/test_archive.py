"""Scenes with label rasters and GeoJSON: chips, the pixel-centre rule, splits by place."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from layouts import Heard, config_of, pixels_of, prepared, rows_of
from rasterio.warp import transform, transform_geom
from rasters import write_tiff
from scenes import AREAS, CLASSES, RASTERS, SMALL, blank, box, chips, write_areas, write_scene

from segpipe.cli.main import main
from segpipe.datasets.layouts import make_layout
from segpipe.datasets.splits import ground_cells
from segpipe.errors import InputError
from segpipe.masks.codec import decode_mask
from segpipe.pipelines.prepare import run_prepare


def test_rasterised_outlines_equal_the_masks_exactly(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "hot-fair-buildings"
    layout = make_layout(config_of("archive", root / "scenes", tmp_path, labels=AREAS, classes=CLASSES))
    scenes = list(layout.listing())
    assert len(scenes) == 13
    ignored = 0
    for scene in scenes:
        with rasterio.open(root / "masks" / f"{scene.sample_id}.tif") as file:
            truth = file.read(1)
        for ref in layout.expand(scene):
            sample = layout.read(ref)
            assert sample is not None
            window = sample.window
            part = truth[window.row_off : window.row_stop, window.col_off : window.col_stop]
            known = sample.label != 255
            assert np.array_equal(sample.label[known], part[known])
            assert sample.pixels.shape == (3, 512, 512)
            ignored += int((~known).sum())
    assert ignored > 0  # holes in the alpha band


def test_chips_cover_every_pixel_and_keep_their_place(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (3, 70, 64), dtype=np.uint8)
    label = random.integers(0, 2, (70, 64), dtype=np.uint8)
    write_scene(tmp_path, "a", image, label)
    prepared("archive", tmp_path / "scenes", tmp_path / "out", **SMALL)
    seen = np.zeros((70, 64), bool)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 6
    for name, row in rows.items():
        top, left, height, width = (row["window"][key] for key in ("row_off", "col_off", "height", "width"))
        part = slice(top, top + height), slice(left, left + width)
        assert name == f"a/r{top:05d}_c{left:05d}"
        assert np.array_equal(pixels_of(row["image"]), image[:, part[0], part[1]].transpose(1, 2, 0))
        assert np.array_equal(decode_mask(row["label"]), label[part])
        assert row["crs"] == "EPSG:32633"
        assert row["transform"] == [1, 0, 500_000 + left, 0, -1, 5_000_000 - top]
        seen[part] = True
    assert seen.all()


def test_pixels_of_more_bands_and_bits_are_kept_without_loss(tmp_path: Path) -> None:
    image = np.random.default_rng(2).integers(0, 60_000, (4, 40, 40), dtype=np.uint16)
    write_scene(tmp_path, "a", image, np.ones((40, 40), np.uint8))
    options = {"labels": RASTERS, "classes": CLASSES}
    tree = prepared("archive", tmp_path / "scenes", tmp_path / "out", **options).dataset
    assert (tree["bands"], tree["dtype"]) == (4, "uint16")
    assert np.allclose(tree["mean"], image.reshape(4, -1).mean(axis=1), rtol=1e-12)
    assert np.allclose(tree["std"], image.reshape(4, -1).astype(float).std(axis=1), rtol=1e-12)
    (row,) = rows_of(tmp_path / "out").values()
    with rasterio.io.MemoryFile(row["image"]) as memory, memory.open() as file:
        assert np.array_equal(file.read(), image)


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:3857", None])
def test_areas_of_any_crs_are_burnt_by_the_pixel_centre(tmp_path: Path, crs: str | None) -> None:
    write_scene(tmp_path, "a", np.zeros((3, 40, 40), np.uint8), None)
    area = box(10.4, -20.4, 20.6, -5.6)  # holds the centres 10.5 .. 20.5 and -19.5 .. -6.5
    if crs != "EPSG:32633":
        area = transform_geom("EPSG:32633", crs or "OGC:CRS84", area)
    write_areas(tmp_path / "labels/a.geojson", [area], crs and f"urn:ogc:def:crs:EPSG::{crs[5:]}")
    prepared("archive", tmp_path / "scenes", tmp_path / "out", labels=AREAS, classes=CLASSES)
    (row,) = rows_of(tmp_path / "out").values()
    expected = np.zeros((40, 40), np.uint8)
    expected[6:20, 10:21] = 1
    assert np.array_equal(decode_mask(row["label"]), expected)


def test_areas_without_a_class_for_the_ground_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", np.zeros((3, 40, 40), np.uint8), None)
    write_areas(tmp_path / "labels/a.geojson", [box(0, -9, 9, 0)], "EPSG:32633")
    with pytest.raises(InputError, match="areas are class 1, ground is class 0, and classes names 1"):
        prepared("archive", tmp_path / "scenes", tmp_path / "out", labels=AREAS, classes=CLASSES[:1])
    assert not (tmp_path / "out").exists()


def test_labels_that_lie_elsewhere_are_refused_and_named(tmp_path: Path) -> None:
    for name, moved in (("a", 0.0), ("b", 50.0)):
        blank(tmp_path, name, 40)
        label = tmp_path / f"labels/{name}.tif"
        with rasterio.open(label, "r+") as file:
            file.transform = rasterio.Affine.translation(moved, 0) @ file.transform
    source, output = tmp_path / "scenes", tmp_path / "out"
    with pytest.raises(InputError, match="4 samples cannot be used") as caught:
        prepared("archive", source, output, **SMALL)
    text = str(caught.value)
    assert "b/r00000_c00000 (label_size): the label lies elsewhere: its upper left corner is 50.0 pix" in text
    assert str(label) in text
    assert not (output / "dataset.json").exists()


def test_properties_become_classes_and_unknown_ones_are_named(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", np.zeros((3, 40, 40), np.uint8), None)
    write_areas(tmp_path / "labels/a.geojson", [box(0, -9, 9, 0)], "EPSG:32633", kind="shed")
    options = {**SMALL, "labels": AREAS, "archive": {"chip_px": 64, "class_property": "kind"}}
    source, output = tmp_path / "scenes", tmp_path / "out"
    with pytest.raises(InputError, match=r"the property kind is 'shed'"):
        prepared("archive", source, output, label_map={"house": 1}, **options)
    tree = prepared("archive", source, output, label_map={"shed": 255, "house": 1}, **options).dataset
    assert tree["class_px"] == [40 * 40 - 81, 0]
    assert tree["ignore_px"] == 81


def test_a_property_that_no_area_has_is_named_with_those_there_are(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", np.zeros((3, 40, 40), np.uint8), None)
    write_areas(tmp_path / "labels/a.geojson", [box(0, -9, 9, 0)], "EPSG:32633", kind="shed")
    options = {**SMALL, "labels": AREAS, "archive": {"chip_px": 64, "class_property": "knd"}}
    with pytest.raises(InputError, match=r"no property 'knd'; its properties: 'kind' \(.*Correct archive"):
        prepared("archive", tmp_path / "scenes", tmp_path / "out", label_map={"shed": 1}, **options)


def test_cells_smaller_than_chips_are_named_where_they_leave_nothing(tmp_path: Path) -> None:
    blank(tmp_path, "a", 96)
    split = {"fractions": {"val": 0.5}, "grid_m": 5}
    with pytest.raises(InputError, match=r"no sample is left of 9.*split\.grid_m"):
        prepared("archive", tmp_path / "scenes", tmp_path / "out", split=split, **SMALL)


def test_no_ground_lies_on_both_sides_of_a_split(tmp_path: Path) -> None:
    for number in range(4):  # neighbours overlap by half
        blank(tmp_path, f"s{number}", 96, left=48 * number)
    refs = chips(tmp_path, split={"fractions": {"val": 0.4}, "grid_m": 70})
    ground: dict[tuple[int, int], set[str]] = defaultdict(set)
    for ref in refs:
        assert ref.window is not None
        left = 48 * int(ref.scene.scene_id[1:]) + ref.window.col_off
        for row in range(ref.window.row_off, ref.window.row_stop):
            for col in range(left, left + 32):
                ground[row, col].add(ref.split)
    assert {ref.split for ref in refs} == {"train", "val"}
    assert max(map(len, ground.values())) == 1


def test_added_scenes_move_no_chip(tmp_path: Path) -> None:
    found = []
    for count in (3, 8):
        for number in range(count):
            blank(tmp_path, f"s{number}", 64, left=200 * number)
        split = {"fractions": {"val": 0.3, "test": 0.3}, "grid_m": 100}
        found.append({ref.sample_id: ref.split for ref in chips(tmp_path, split=split)})
    assert len(found[0]) > 3
    assert found[0].items() <= found[1].items()
    assert len(set(found[1].values())) > 1


def test_cells_of_a_box_are_those_of_its_parts() -> None:
    whole = set(ground_cells((14.0, 45.0, 14.05, 45.03), 500))
    west = set(ground_cells((14.0, 45.0, 14.02, 45.03), 500))
    east = set(ground_cells((14.02, 45.0, 14.05, 45.03), 500))
    assert west | east == whole
    assert 7 * 7 <= len(whole) <= 9 * 9  # 3.94 km x 3.34 km


@pytest.mark.parametrize("south", [0.0, -17.0, 52.3, 66.0])
def test_cells_of_a_box_over_the_antimeridian_are_those_of_its_parts(south: float) -> None:
    across = set(ground_cells((179.99, south, 180.01, south + 0.001), 500))
    west = set(ground_cells((179.99, south, 180, south + 0.001), 500))
    east = set(ground_cells((-180, south, -179.99, south + 0.001), 500))
    assert west | east == across
    assert not west & east


def test_chips_over_the_antimeridian_have_a_split(tmp_path: Path) -> None:
    (east,), (north,) = transform("EPSG:4326", "EPSG:32760", [180.0], [-17.0])
    place = {"crs": "EPSG:32760", "transform": rasterio.Affine(1, 0, east - 32, 0, -1, north + 32)}
    for folder, bands in (("scenes", 3), ("labels", 1)):
        (tmp_path / folder).mkdir()
        write_tiff(tmp_path / folder / "a.tif", np.zeros((bands, 64, 64), np.uint8), **place)
    refs = chips(tmp_path, archive={"chip_px": 64}, split={"fractions": {"val": 1.0}})
    assert [ref.split for ref in refs] == ["val"]


@pytest.mark.parametrize(
    ("area", "touched"),
    [
        (box(40, -50, 41, -31.5), {"a/r00000_c00032", "a/r00032_c00032"}),
        (box(40.1, -20.4, 40.4, -20.1), {"a/r00000_c00032"}),  # within a pixel, beside its centre
    ],
)
def test_excluded_areas_leave_out_the_chips_they_touch(
    tmp_path: Path, area: dict[str, Any], touched: set[str]
) -> None:
    blank(tmp_path, "a", 96)
    exclude = tmp_path / "exclude.geojson"
    write_areas(exclude, [area], "EPSG:32633")
    refs = chips(tmp_path, archive={"chip_px": 32, "exclude_area": str(exclude)})
    assert len(refs) == 9 - len(touched)
    assert not {ref.sample_id for ref in refs} & touched


def test_the_command_takes_an_excluded_area(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blank(tmp_path, "a", 96)
    write_areas(tmp_path / "exclude.geojson", [box(40, -50, 41, -31.5)], "EPSG:32633")
    sets = [f"classes={json.dumps(CLASSES)}", "archive.chip_px=32", "cluster.executor=local"]
    words = ["prepare", "archive", str(tmp_path / "scenes"), "-o", str(tmp_path / "out"), "--labels", RASTERS]
    words += ["--dry-run", "--json", *(word for item in sets for word in ("--set", item))]
    samples = []
    for more in ([], ["--exclude-area", str(tmp_path / "exclude.geojson")]):
        with pytest.raises(SystemExit, match="0"):
            main([*words, *more])
        samples.append(json.loads(capsys.readouterr().out)["samples"])
    assert samples == [9, 7]


def test_left_out_chips_and_empty_splits_are_said(tmp_path: Path) -> None:
    blank(tmp_path, "a", 96)
    write_areas(tmp_path / "exclude.geojson", [box(40, -50, 41, -40)], "EPSG:32633")
    archive = {"chip_px": 32, "exclude_area": str(tmp_path / "exclude.geojson")}
    options = SMALL | {"archive": archive, "split": {"globs": {"test": ("other*",)}}}
    heard = Heard()
    tree = run_prepare(config_of("archive", tmp_path / "scenes", tmp_path / "out", **options), heard).dataset
    assert (tree["samples"], tree["left_out"]) == (8, 1)
    assert "1 sample left out: excluded, or in two splits at once" in heard.lines
    assert "splits without a sample: test" in heard.warnings


@pytest.mark.parametrize(
    ("split", "hint"),
    [
        ("val=zzz*", "warning: splits without a sample: val"),
        ("val=0.000001", "warning: splits without a sample: val; a smaller split.grid_m gives the ground"),
    ],
)
def test_a_dry_run_says_that_a_split_is_empty_and_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, hint: str
) -> None:
    blank(tmp_path, "a", 96)
    write_areas(tmp_path / "exclude.geojson", [box(40, -50, 41, -40)], "EPSG:32633")
    words = ["prepare", "archive", str(tmp_path / "scenes"), "--labels", RASTERS, "--split", split]
    words += ["--exclude-area", str(tmp_path / "exclude.geojson"), "--dry-run"]
    words += ["--set", f"classes={json.dumps(CLASSES)}", "--set", "archive.chip_px=32"]
    for as_json in (False, True):
        with pytest.raises(SystemExit, match="0"):
            main([*words, *(["--json"] if as_json else [])])
        out, err = capsys.readouterr()
        assert err.startswith(hint)
        if as_json:
            tree = json.loads(out)
            assert (tree["splits"], tree["left_out"]) == ({"train": 8, "val": 0}, 1)
        else:
            assert "train 8, val 0" in out
            assert re.search(r"^left_out +1$", out, re.MULTILINE)


def test_an_empty_split_is_said_before_any_shard_is_made(tmp_path: Path) -> None:
    blank(tmp_path, "a", 96)
    options = SMALL | {"split": {"globs": {"val": ("zzz*",)}}}

    class Impatient(Heard):
        def warning(self, text: str) -> None:
            super().warning(f"{len(list((tmp_path / 'out').rglob('*.parquet')))} shards: {text}")

    heard = Impatient()
    run_prepare(config_of("archive", tmp_path / "scenes", tmp_path / "out", **options), heard)
    assert heard.warnings[0] == "0 shards: splits without a sample: val"


def test_chips_without_label_are_left_out_and_counted(tmp_path: Path) -> None:
    label = np.full((64, 64), 255, np.uint8)
    label[:10, :10] = 1
    write_scene(tmp_path, "a", np.zeros((3, 64, 64), np.uint8), label)
    tree = prepared("archive", tmp_path / "scenes", tmp_path / "out", **SMALL).dataset
    assert (tree["samples"], tree["dropped"]) == (1, 3)
    label[:] = 255
    write_scene(tmp_path, "a", np.zeros((3, 64, 64), np.uint8), label)
    with pytest.raises(InputError, match="no sample has enough labelled pixels"):
        prepared("archive", tmp_path / "scenes", tmp_path / "none", **SMALL)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (None, "no GeoJSON FeatureCollection"),
        ({"type": "Point", "coordinates": [1, 2]}, "holds a Point"),
        ({"type": "Polygon", "coordinates": [[]]}, "cannot be"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [1e20, 0], [0, 1], [0, 0]]]}, "above 1e12"),
    ],
)
def test_broken_geojson_is_named(tmp_path: Path, geometry: dict[str, Any] | None, message: str) -> None:
    write_scene(tmp_path, "a", np.zeros((3, 40, 40), np.uint8), None)
    write_areas(tmp_path / "labels/a.geojson", [geometry] if geometry else [], None)
    if geometry is None:
        (tmp_path / "labels/a.geojson").write_text('{"type": "Polygon"}')
    with pytest.raises(InputError, match=message):
        prepared("archive", tmp_path / "scenes", tmp_path / "out", labels=AREAS, classes=CLASSES)


def test_chips_of_one_scene_open_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from segpipe.datasets import archive

    for name in ("a", "b"):
        blank(tmp_path, name, 96)
    opened, real = [], archive.open_scene
    monkeypatch.setattr(
        archive, "open_scene", lambda scene, *rest: opened.append(scene) or real(scene, *rest)
    )
    tree = prepared("archive", tmp_path / "scenes", tmp_path / "out", **SMALL).dataset
    assert tree["samples"] == 18
    assert [scene.scene_id for scene in opened] == ["a", "b"]


def test_a_faulty_scene_between_good_ones_is_named_chip_by_chip(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_scene(tmp_path, name, np.ones((3, 64, 64), np.uint8), np.zeros((64, 64), np.uint8))
    write_scene(tmp_path, "b", np.ones((3, 64, 64), np.uint8), np.full((64, 64), 9, np.uint8))
    with pytest.raises(InputError, match="4 samples cannot be used") as caught:
        prepared("archive", tmp_path / "scenes", tmp_path / "out", **SMALL)
    assert str(caught.value).count("b/r") == 4


def test_a_scene_that_cannot_be_opened_is_named_before_anything_is_written(tmp_path: Path) -> None:
    blank(tmp_path, "a", 40)
    (tmp_path / "scenes/a.tif").write_bytes(b"II*\0 broken")
    with pytest.raises(InputError, match=r"1 scene cannot be used: a \(header\)"):
        prepared("archive", tmp_path / "scenes", tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_the_limits_of_the_config_hold_for_scenes(tmp_path: Path) -> None:
    blank(tmp_path, "a", 64)
    with pytest.raises(InputError, match=r"a \(limit\).* limits\.file_block_bytes"):
        prepared("archive", tmp_path / "scenes", tmp_path / "out", limits={"file_block_bytes": 5000}, **SMALL)
    assert not (tmp_path / "out").exists()
