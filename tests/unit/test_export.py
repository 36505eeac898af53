"""export: a valid COG a scene, equal to the masks, and every reason for which a scene is left out."""

from __future__ import annotations

import shutil
import struct
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from masks_run import CLASSES, UTM_TRANSFORM, MadeRun, MadeScene, build_run, make_info

from segpipe.errors import IncompleteError, InputError, StorageError
from segpipe.masks.run import unit_key
from segpipe.masks.verify import verify_run
from segpipe.pipelines.export import SceneExport, export_run
from segpipe.rasters.cog import CogSpec, write_cog
from segpipe.storage import open_storage

ROTATED = (0.4, 0.3, 450_000.0, 0.3, -0.4, 60_000.0)
SOUTH_UP = (0.5, 0.0, 450_000.0, 0.0, 0.5, 60_000.0)
OWN_CRS = (
    'PROJCS["site grid",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
    'PARAMETER["latitude_of_origin",1.5],PARAMETER["central_meridian",9.3],PARAMETER["scale_factor",1],'
    'PARAMETER["false_easting",1000],PARAMETER["false_northing",2000],UNIT["metre",1]]'
)


def export(run: MadeRun, output: Path | str, **options: Any) -> tuple[Any, dict[str, SceneExport]]:
    told: dict[str, SceneExport] = {}

    def on_scene(scene: SceneExport) -> None:
        assert scene.scene_id not in told
        told[scene.scene_id] = scene

    return export_run(run.storage.root, str(output), on_scene=on_scene, **options), told


def structure(path: Path) -> tuple[str, list[list[int]]]:
    """Return the ghost header of a TIFF and, of each directory in file order, [offset, size, first tile]."""
    data = path.read_bytes()
    assert data[:4] == b"II*\0"
    ghost = data[8:300].split(b" \x00")[0].decode("latin1")
    types = {3: "<H", 4: "<I", 16: "<Q"}
    (at,) = struct.unpack_from("<I", data, 4)
    found = []
    while at:
        (count,) = struct.unpack_from("<H", data, at)
        tags = {}
        for i in range(count):
            tag, kind, length, value = struct.unpack_from("<HHII", data, at + 2 + 12 * i)
            if kind in types:
                size = struct.calcsize(types[kind])
                place = at + 2 + 12 * i + 8 if length * size <= 4 else value
                tags[tag] = struct.unpack_from(types[kind], data, place)[0]
        found.append([at, max(tags[256], tags[257]), tags[324]])
        (at,) = struct.unpack_from("<I", data, at + 2 + 12 * count)
    return ghost, found


def assert_valid_cog(path: Path) -> None:
    """Directories first, largest picture first; then the pixels, smallest overview first."""
    ghost, directories = structure(path)
    assert "LAYOUT=IFDS_BEFORE_DATA" in ghost
    offsets, sizes, tiles = (list(column) for column in zip(*directories, strict=True))
    assert offsets == sorted(offsets)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 512
    assert max(offsets) < min(tiles)
    assert tiles == sorted(tiles, reverse=True)
    with rasterio.open(path) as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.block_shapes == [(512, 512)]
        assert len(dataset.overviews(1)) == len(directories) - 1


SHAPES = {
    "one pixel": (1, 1),
    "column": (700, 1),
    "odd": (131, 257),
    "tile": (512, 512),
    "more than a tile": (513, 40),
    "several blocks": (1301, 1703),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_cog_is_valid_and_holds_the_mask_for_any_size(tmp_path: Path, shape: tuple[int, int]) -> None:
    info = make_info(tile_px=256, margin_px=16, block_px=512, unit_px=700_000)
    scene = MadeScene("s", *shape)
    run = build_run(str(tmp_path / "run"), [[scene]], info=info)
    result, _ = export(run, tmp_path / "out")
    assert (result.exported, result.exit_code, result.pixels) == (1, 0, shape[0] * shape[1])
    path = tmp_path / "out" / "s.tif"
    assert_valid_cog(path)
    with rasterio.open(path) as dataset:
        assert (dataset.dtypes, dataset.nodata) == (("uint8",), 255)
        np.testing.assert_array_equal(dataset.read(1), scene.classes())


PLACES = {
    "north-up": ("EPSG:32632", UTM_TRANSFORM),
    "rotated": ("EPSG:32632", ROTATED),
    "south-up": ("EPSG:3857", SOUTH_UP),
    "no epsg code": (OWN_CRS, UTM_TRANSFORM),
    "no crs": (None, UTM_TRANSFORM),
    "none": (None, None),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_cog_lies_on_the_grid_of_its_scene(tmp_path: Path, place: tuple[Any, Any]) -> None:
    crs, transform = place
    scene = MadeScene("s", 150, 190, crs=crs, transform=transform)
    export(build_run(str(tmp_path / "run"), [[scene]]), tmp_path / "out")
    with rasterio.open(tmp_path / "out" / "s.tif") as dataset:
        assert tuple(dataset.transform)[:6] == pytest.approx(transform or (1, 0, 0, 0, 1, 0))
        assert dataset.crs == (None if crs is None else rasterio.crs.CRS.from_user_input(crs))
        np.testing.assert_array_equal(dataset.read(1), scene.classes())


def test_a_cog_carries_colours_names_and_where_it_came_from(tmp_path: Path) -> None:
    scene = MadeScene("a/b", uri="https://host/x.tif?X-Amz-Signature=secret")
    export(build_run(str(tmp_path / "run"), [[scene]]), tmp_path / "out")
    path = tmp_path / "out" / "a" / "b.tif"
    with rasterio.open(path) as dataset:
        colors = dataset.colormap(1)
        assert [colors[i][:3] for i in range(len(CLASSES))] == [info.color for info in CLASSES]
        assert colors[255] == (0, 0, 0, 0)
        assert [dataset.tags(1)[f"CLASS_{i}"] for i in range(3)] == [info.name for info in CLASSES]
        tags = dataset.tags()
    assert tags["SEGPIPE_RECIPE_KEY"] == "0" * 64
    assert tags["SEGPIPE_MODEL_SHA256"] == "f" * 64
    assert tags["SEGPIPE_SCENE_ID"] == "a/b"
    assert tags["SEGPIPE_SOURCE"] == "https://host/x.tif"
    assert "secret" not in path.read_bytes().decode("latin1")


def test_gdal_reads_the_category_names(tmp_path: Path) -> None:
    export(build_run(str(tmp_path / "run"), [[MadeScene("s")]]), tmp_path / "out")
    rasterio.shutil.copy(str(tmp_path / "out" / "s.tif"), str(tmp_path / "s.vrt"), driver="VRT")
    text = (tmp_path / "s.vrt").read_text()
    names = [line.strip() for line in text.splitlines() if "<Category>" in line]
    assert names == [
        "<Category>background</Category>",
        "<Category>building &amp; shed</Category>",
        "<Category>water</Category>",
    ]


def test_overviews_hold_the_commonest_class(tmp_path: Path) -> None:
    info = make_info(tile_px=256, margin_px=16, block_px=2048, unit_px=10**7)
    scene = MadeScene("s", 1400, 1400)
    export(build_run(str(tmp_path / "run"), [[scene]], info=info), tmp_path / "out")
    with rasterio.open(tmp_path / "out" / "s.tif", overview_level=0) as dataset:
        half = dataset.read(1)
    quads = scene.classes().reshape(700, 2, 700, 2).transpose(0, 2, 1, 3).reshape(700, 700, 4)
    same = (quads == quads[:, :, :1]).all(axis=2)
    np.testing.assert_array_equal(half[same], quads[:, :, 0][same])
    assert set(np.unique(half)) == {0, 1, 2, 255}


def test_empty_scenes_are_exported_as_no_data(tmp_path: Path) -> None:
    result, _ = export(build_run(str(tmp_path / "run"), [[MadeScene("e", empty=True)]]), tmp_path / "out")
    assert result.exported == 1
    with rasterio.open(tmp_path / "out" / "e.tif") as dataset:
        assert (dataset.read(1) == 255).all()


def test_scenes_that_share_units_come_out_each_as_itself(tmp_path: Path) -> None:
    scenes = [MadeScene(f"x/{i}", 20 + i, 31) for i in range(12)]
    scenes.insert(5, MadeScene("big", 150, 190))
    result, told = export(build_run(str(tmp_path / "run"), [scenes]), tmp_path / "out", workers=3)
    assert result.exported == len(scenes) == len(told)
    for scene in scenes:
        with rasterio.open(tmp_path / "out" / f"{scene.scene_id}.tif") as dataset:
            np.testing.assert_array_equal(dataset.read(1), scene.classes())


def test_failed_scenes_are_left_out_and_named(tmp_path: Path) -> None:
    scenes = [
        MadeScene("good"),
        MadeScene("part", 150, 190, failed={2: "decode"}),
        MadeScene("unreadable", unreadable="not_raster"),
    ]
    result, _ = export(build_run(str(tmp_path / "run"), [scenes]), tmp_path / "out")
    assert result.failed.first == ["part: decode", "unreadable: not_raster"]
    assert (result.exported, result.exit_code) == (1, 0)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tif")) == ["good.tif"]


def test_an_unfinished_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("a", 150, 190), MadeScene("b")]])
    (tmp_path / "run" / unit_key(0, 1)).unlink()
    with pytest.raises(IncompleteError, match=r"1 of \d+ units .*--partial"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_partial_exports_the_scenes_that_are_done_and_names_the_others(tmp_path: Path) -> None:
    run = build_run(
        str(tmp_path / "run"), [[MadeScene("a", 150, 190), MadeScene("b"), MadeScene("c", 60, 60)]]
    )
    (tmp_path / "run" / unit_key(0, 0)).unlink()
    result, _ = export(run, tmp_path / "out", partial=True)
    assert result.incomplete.first == ["a: units are missing"]
    assert (result.exported, result.exit_code) == (2, 0)


def test_a_run_without_plan_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError):
        export(build_run(str(tmp_path / "run"), [], success=False), tmp_path / "out")


def test_a_second_export_finds_everything_there_and_writes_nothing(tmp_path: Path) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("a"), MadeScene("b", 150, 190)]])
    export(run, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    result, _ = export(run, tmp_path / "out")
    assert (result.exported, result.already_there, result.exit_code) == (0, 2, 0)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_the_same_masks_give_the_same_bytes(tmp_path: Path) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("a", 700, 600)]])
    for name in ("one", "two"):
        export(run, tmp_path / name, workers=1)
    assert (tmp_path / "one" / "a.tif").read_bytes() == (tmp_path / "two" / "a.tif").read_bytes()


def test_a_file_made_from_other_masks_is_left_and_named(tmp_path: Path) -> None:
    export(build_run(str(tmp_path / "run"), [[MadeScene("a")]]), tmp_path / "out")
    before = (tmp_path / "out" / "a.tif").read_bytes()
    other = build_run(str(tmp_path / "other"), [[MadeScene("a")]], info=make_info("2" * 64))
    result, _ = export(other, tmp_path / "out")
    assert (result.exit_code, result.conflict.count, result.exported) == (4, 1, 0)
    assert (tmp_path / "out" / "a.tif").read_bytes() == before


@pytest.mark.parametrize("length", [245, 250, 251])  # .tif.aux.xml has no room; nor has .tif
def test_a_name_too_long_for_the_output_is_told_and_the_rest_is_exported(tmp_path: Path, length: int) -> None:
    scenes = [MadeScene("a"), MadeScene("x" * length), MadeScene("y")]
    run = build_run(str(tmp_path / "run"), [scenes])
    for done in ((2, 0), (0, 2)):
        result, told = export(run, tmp_path / "out")
        assert (result.exported, result.already_there, result.exit_code) == (*done, 4)
        assert told["x" * length].outcome == "conflict"
        assert "file name too long" in told["x" * length].reason
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tif")) == ["a.tif", "y.tif"]
    with pytest.raises(InputError, match="file name too long"):
        export(run, tmp_path / ("o" * 256))


@pytest.mark.parametrize(
    ("change", "outcome"), [({"block_px": 96}, "already_there"), ({"precision": "bf16"}, "conflict")]
)
def test_facts_that_change_masks_tell_exports_apart(
    tmp_path: Path, change: dict[str, Any], outcome: str
) -> None:
    export(build_run(str(tmp_path / "run"), [[MadeScene("a")]]), tmp_path / "out")
    other = build_run(str(tmp_path / "other"), [[MadeScene("a")]], info=make_info(**change))
    assert export(other, tmp_path / "out")[1]["a"].outcome == outcome


def test_labels_that_change_make_no_other_export(tmp_path: Path) -> None:
    for name, labelled in (("run", False), ("other", True)):
        run = build_run(str(tmp_path / name), [[MadeScene("a", labelled=labelled)]])
        result, _ = export(run, tmp_path / "out")
    assert (result.already_there, result.conflict.count) == (1, 0)


def test_a_scene_is_taken_from_its_newest_part(tmp_path: Path) -> None:
    newest = MadeScene("a", 44, 55, version="b")
    run = build_run(
        str(tmp_path / "run"), [[MadeScene("a"), MadeScene("c")], [newest]], replaces={1: {"a": 0}}
    )
    result, _ = export(run, tmp_path / "out")
    assert result.exported == 2
    with rasterio.open(tmp_path / "out" / "a.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(1), newest.classes())


def test_a_glob_picks_scenes_and_one_that_matches_none_is_an_error(tmp_path: Path) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("x/a"), MadeScene("x/b"), MadeScene("y")]])
    progress: list[tuple[int, int]] = []
    _, told = export(
        run,
        tmp_path / "out",
        scenes_glob="x/*",
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert sorted(told) == ["x/a", "x/b"]
    assert progress == [(1, 2), (2, 2)]
    with pytest.raises(InputError, match="'z'"):
        export(run, tmp_path / "out", scenes_glob="z")


def test_a_scene_is_picked_by_its_own_id_whatever_its_letters(tmp_path: Path) -> None:
    name = "Straße [1] #2 %41"
    run = build_run(str(tmp_path / "run"), [[MadeScene(name), MadeScene("Straße 1 #2 %41")]])
    _, told = export(run, tmp_path / "out", scenes_glob=name)
    assert told.keys() == {name, "Straße 1 #2 %41"}
    _, told = export(run, tmp_path / "others", scenes_glob="Straße [[]*")
    assert list(told) == [name]


def test_a_damaged_object_is_named_and_the_rest_is_exported(tmp_path: Path) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("a", 150, 190), MadeScene("b", 150, 190)]])
    path = tmp_path / "run" / unit_key(0, 0)
    data = bytearray(path.read_bytes())
    data[data.find(b"IDAT") + 9] ^= 1
    path.write_bytes(data)
    result, _ = export(run, tmp_path / "out")
    assert (result.exit_code, result.exported, result.damaged.count) == (4, 1, 1)
    assert unit_key(0, 0) in result.damaged.first[0]
    assert not (tmp_path / "out" / "a.tif").exists()


def test_objects_that_changed_places_are_never_exported(tmp_path: Path) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("a", 150, 190), MadeScene("b", 150, 190)]])
    shutil.copyfile(tmp_path / "run" / unit_key(0, 1), tmp_path / "run" / unit_key(0, 0))
    result, _ = export(run, tmp_path / "out")
    assert (result.damaged.count, result.exported) == (1, 1)


def test_scores_and_the_run_itself_as_output_are_refused(tmp_path: Path) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("a")]])
    with pytest.raises(InputError, match="the run itself"):
        export(run, tmp_path / "run")
    with pytest.raises(InputError, match=r"run\.json"):
        export_run(str(tmp_path), str(tmp_path / "out"))


def test_a_file_that_does_not_hold_what_was_written_is_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CogSpec(30, 40, CLASSES, None, None, {})
    mask = np.ones((30, 40), np.uint8)

    def lose_pixels(source: str, target: str, **options: Any) -> None:
        with rasterio.open(source, "r+") as dataset:
            dataset.write(np.zeros((1, 30, 40), np.uint8))
        plain(source, target, **options)

    plain = rasterio.shutil.copy
    monkeypatch.setattr(rasterio.shutil, "copy", lose_pixels)
    from segpipe.geometry.grid import Window

    with pytest.raises(StorageError, match="other pixels"):
        write_cog(spec, [(Window(0, 0, 30, 40), mask)], tmp_path, "a.tif")
    assert list(tmp_path.iterdir()) == []


def test_exports_go_to_any_storage() -> None:
    name = uuid.uuid4().hex
    scene = MadeScene("a", 600, 50)
    run = build_run(f"memory://{name}/run", [[scene]])
    result, _ = export(run, f"memory://{name}/out")
    assert result.exported == 1
    with (
        rasterio.MemoryFile(open_storage(f"memory://{name}/out").read("a.tif")) as file,
        file.open() as dataset,
    ):
        np.testing.assert_array_equal(dataset.read(1), scene.classes())
    assert export(run, f"memory://{name}/out")[0].already_there == 1


@pytest.mark.s3
def test_a_run_in_object_storage_is_verified_and_exported_there(s3_bucket: str) -> None:
    scenes = [MadeScene("a b", 150, 190, labelled=True), MadeScene("c/d")]
    run = build_run(f"{s3_bucket}/run", [scenes])
    assert verify_run(run.storage, full=True).exit_code == 0
    result, _ = export(run, f"{s3_bucket}/out")
    assert (result.exported, result.exit_code) == (2, 0)
    data = open_storage(f"{s3_bucket}/out").read("a b.tif")
    with rasterio.MemoryFile(data) as file, file.open() as dataset:
        np.testing.assert_array_equal(dataset.read(1), scenes[0].classes())
    assert export(run, f"{s3_bucket}/out")[0].already_there == 2
