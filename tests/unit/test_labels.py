"""Labels become class indices, by value or by colour; what no class maps is an error."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasters import noise, source_of, version_of, write_tiff

from segpipe.config.card import ClassInfo
from segpipe.config.model import InputConfig
from segpipe.errors import ConfigError, SceneError
from segpipe.geometry.grid import Window
from segpipe.rasters.header import inspect_scene
from segpipe.rasters.labels import open_label, parse_label_map
from segpipe.rasters.scene import SceneSource, Version

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
CLASSES = (
    ClassInfo(name="ground", color=RED),
    ClassInfo(name="water", color=GREEN),
    ClassInfo(name="roof", color=BLUE),
)
NORTH_UP = Affine(0.3, 0.0, 500_000.0, 0.0, -0.3, 5_000_000.0)
SOUTH_UP = Affine(0.3, 0.0, 500_000.0, 0.0, 0.3, 5_000_000.0)
ROTATED = NORTH_UP @ Affine.rotation(30)
UTM33_HEIGHT = "EPSG:32633+5773"  # with heights: a system without a code of its own
INDICES = (np.arange(600).reshape(20, 30) % 3).astype(np.uint8)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_tiff(tmp_path / "scene.tif", noise(3, 20, 30))


def read(
    scene: Path, label: Path, label_map: dict[str, int] | None = None, size: tuple[int, int] = (20, 30)
) -> Any:
    config = InputConfig(label_map=label_map or {})
    with open_label(source_of(scene, label=label), *size, CLASSES, config) as reader:
        return reader.read(Window(0, 0, *size))


def fault(kind: str, *words: str) -> Any:
    return pytest.raises(SceneError, match="(?s)" + ".*".join(words), check=lambda error: error.kind == kind)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def colour_image(
    indices: np.ndarray = INDICES, colours: tuple[tuple[int, ...], ...] = (RED, GREEN, BLUE)
) -> Any:
    return Image.fromarray(np.array(colours, np.uint8)[indices])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "uint32", "float32", "float64"])
def test_values_are_class_indices_and_255_is_ignored(scene: Path, tmp_path: Path, dtype: str) -> None:
    values = INDICES.copy()
    values[5] = 255
    label = write_tiff(tmp_path / "l.tif", values[None].astype(dtype), compress="deflate")
    found = read(scene, label)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, values)


def test_a_window_of_a_label_is_cut_out_of_the_whole(scene: Path, tmp_path: Path) -> None:
    source = source_of(scene, label=write_tiff(tmp_path / "l.tif", INDICES[None]))
    with open_label(source, 20, 30, CLASSES, InputConfig()) as reader:
        np.testing.assert_array_equal(reader.read(Window(7, 9, 5, 11)), INDICES[7:12, 9:20])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_mapped_values_become_their_classes(scene: Path, tmp_path: Path, dtype: str) -> None:
    values = np.array([7, 26, 33])[INDICES].astype(dtype)
    values[0] = 255
    found = read(scene, write_tiff(tmp_path / "l.tif", values[None]), {"7": 2, "26": 0, "33": 255})
    expected = np.array([2, 0, 255], np.uint8)[INDICES]
    expected[0] = 255
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "value"), [("int16", -1), ("int32", 70_000), ("int32", -70_000), ("float64", 1e6)]
)
def test_values_outside_of_a_byte_can_be_mapped(
    scene: Path, tmp_path: Path, dtype: str, value: float
) -> None:
    values = np.where(INDICES == 0, value, INDICES.astype(np.int64)).astype(dtype)
    found = read(scene, write_tiff(tmp_path / "l.tif", values[None]), {f"{value:.0f}": 0, "1": 1, "2": 2})
    np.testing.assert_array_equal(found, INDICES)


def test_255_can_be_a_class_when_it_is_mapped(scene: Path, tmp_path: Path) -> None:
    values = np.where(INDICES == 1, 255, 0).astype(np.uint8)
    found = read(scene, write_tiff(tmp_path / "l.tif", values[None]), {"0": 0, "255": 1})
    np.testing.assert_array_equal(found, (INDICES == 1).astype(np.uint8))


def test_unmapped_values_are_an_error_that_names_five_of_them(scene: Path, tmp_path: Path) -> None:
    values = np.arange(600).reshape(20, 30) % 9
    label = write_tiff(tmp_path / "l.tif", values[None].astype(np.uint8))
    with fault("label_value", "l.tif", "3, 4, 5, 6, 7 and 1 more", " label_map"):
        read(scene, label)
    with fault("label_value", ": 0$|: 0\\."):
        read(scene, label, {str(value): 1 for value in range(1, 9)})


@pytest.mark.parametrize("value", [0.5, -1.0, np.inf])
def test_floats_that_are_no_class_are_unmapped(scene: Path, tmp_path: Path, value: float) -> None:
    values = INDICES.astype(np.float32)
    values[3, 3] = value
    with fault("label_value", " label_map"):
        read(scene, write_tiff(tmp_path / "l.tif", values[None]))


def test_nan_in_a_label_is_ignored(scene: Path, tmp_path: Path) -> None:
    values = INDICES.astype(np.float32)
    values[3] = np.nan
    expected = INDICES.copy()
    expected[3] = 255
    np.testing.assert_array_equal(read(scene, write_tiff(tmp_path / "l.tif", values[None])), expected)


def test_the_labels_own_nodata_is_ignored_unless_it_is_mapped(scene: Path, tmp_path: Path) -> None:
    label = write_tiff(tmp_path / "l.tif", INDICES[None], nodata=0)
    np.testing.assert_array_equal(read(scene, label), np.where(INDICES == 0, 255, INDICES))
    np.testing.assert_array_equal(read(scene, label, {"0": 0, "1": 1, "2": 2}), INDICES)
    label = write_tiff(
        tmp_path / "far.tif",
        np.where(INDICES == 0, -9999, INDICES.astype(np.int64))[None].astype(np.int16),
        nodata=-9999,
    )
    np.testing.assert_array_equal(read(scene, label), np.where(INDICES == 0, 255, INDICES))


def test_masked_pixels_of_a_label_are_ignored_whatever_they_hold(scene: Path, tmp_path: Path) -> None:
    mask = np.where(INDICES == 2, 0, 255).astype(np.uint8)
    values = np.where(INDICES == 2, 200, INDICES).astype(np.uint8)
    label = write_tiff(tmp_path / "l.tif", values[None], mask=mask)
    np.testing.assert_array_equal(read(scene, label), np.where(INDICES == 2, 255, INDICES))
    label = save(tmp_path / "la.png", Image.fromarray(np.dstack([values, mask]), "LA"))
    np.testing.assert_array_equal(read(scene, label), np.where(INDICES == 2, 255, INDICES))


def test_colours_of_the_classes_are_read_without_a_map(scene: Path, tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(scene, save(tmp_path / "l.png", colour_image())), INDICES)
    label = write_tiff(tmp_path / "l.tif", np.asarray(colour_image()).transpose(2, 0, 1), compress="deflate")
    np.testing.assert_array_equal(read(scene, label), INDICES)


def test_transparent_pixels_of_a_colour_label_are_ignored(scene: Path, tmp_path: Path) -> None:
    colours = ((*RED, 255), (*GREEN, 255), (7, 7, 7, 0))
    label = save(tmp_path / "l.png", colour_image(colours=colours))
    np.testing.assert_array_equal(read(scene, label), np.where(INDICES == 2, 255, INDICES))


def test_mapped_colours_become_their_classes(scene: Path, tmp_path: Path) -> None:
    label = save(tmp_path / "l.png", colour_image(colours=((60, 16, 152), (226, 169, 41), (0, 0, 0))))
    found = read(scene, label, {"#3C1098": 2, "#e2a929": 1, "#000000": 255})
    np.testing.assert_array_equal(found, np.array([2, 1, 255], np.uint8)[INDICES])


def test_unmapped_colours_are_named_as_colours(scene: Path, tmp_path: Path) -> None:
    label = save(tmp_path / "l.png", colour_image(colours=(RED, GREEN, (1, 2, 3))))
    with fault("label_value", "#010203", " label_map"):
        read(scene, label)
    with fault("label_read", "numbers only"):
        read(scene, label, {"1": 1})


@pytest.mark.parametrize("label_map", [{}, {"0": 0, "1": 1, "2": 2}])
def test_a_palette_without_mapped_colours_is_read_by_index(
    scene: Path, tmp_path: Path, label_map: dict[str, int]
) -> None:
    values = INDICES.copy()
    values[4] = 255
    image = Image.fromarray(values, "P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [9] * 759)
    np.testing.assert_array_equal(read(scene, save(tmp_path / "l.png", image), label_map), values)


def test_a_palette_with_mapped_colours_is_read_by_colour(scene: Path, tmp_path: Path) -> None:
    image = Image.fromarray(INDICES, "P")
    image.putpalette([*BLUE, *RED, *GREEN])
    label_map = {"#ff0000": 0, "#00ff00": 1, "#0000ff": 2}
    found = read(scene, save(tmp_path / "l.png", image), label_map)
    np.testing.assert_array_equal(found, np.array([2, 0, 1], np.uint8)[INDICES])


def test_transparent_colours_of_a_palette_are_ignored_where_it_is_read_by_colour(
    scene: Path, tmp_path: Path
) -> None:
    indices = INDICES.copy()
    indices[7] = 3
    image = Image.fromarray(indices, "P")
    image.putpalette([*BLUE, *RED, *GREEN, 7, 7, 7])
    label = save(tmp_path / "l.png", image, transparency=bytes([255, 255, 0, 0]))
    found = read(scene, label, {"#ff0000": 0, "#0000ff": 2})
    np.testing.assert_array_equal(found, np.array([2, 0, 255, 255], np.uint8)[indices])


def test_grey_labels_can_be_mapped_by_colour(scene: Path, tmp_path: Path) -> None:
    label = save(tmp_path / "l.png", Image.fromarray((INDICES == 1).astype(np.uint8) * 255))
    found = read(scene, label, {"#000000": 0, "#ffffff": 1})
    np.testing.assert_array_equal(found, (INDICES == 1).astype(np.uint8))
    label = write_tiff(tmp_path / "l.tif", (INDICES == 1)[None].astype(np.uint8) * 255, nodata=0)
    np.testing.assert_array_equal(read(scene, label, {"#000000": 0, "#ffffff": 1}), found)


def test_one_bit_labels_are_read(scene: Path, tmp_path: Path) -> None:
    label = write_tiff(tmp_path / "l.tif", (INDICES == 1)[None].astype(np.uint8), nbits=1)
    np.testing.assert_array_equal(read(scene, label), (INDICES == 1).astype(np.uint8))


def test_another_size_is_an_error_with_both_sizes(scene: Path, tmp_path: Path) -> None:
    label = write_tiff(tmp_path / "l.tif", INDICES[None])
    with fault("label_size", "l.tif", "20 x 30", "21 x 30"):
        read(scene, label, size=(21, 30))


def place(crs: Any = "EPSG:3857", shift_px: float = 0.0, transform: Affine | None = None) -> dict[str, Any]:
    """Return CRS and transform of pixels of 0.3 m; the label's columns lie ``shift_px`` further."""
    there = NORTH_UP if transform is None else transform
    return {"crs": crs, "transform": there @ Affine.translation(shift_px, 0)}


def read_placed(tmp_path: Path, of_scene: dict[str, Any], of_label: dict[str, Any]) -> None:
    scene = write_tiff(tmp_path / "scene.tif", noise(3, 20, 30), **of_scene)
    label = write_tiff(tmp_path / "l.tif", INDICES[None], **of_label)
    source = source_of(scene, label=label)
    located = inspect_scene(source, 3, InputConfig()).located
    with open_label(source, 20, 30, CLASSES, InputConfig(), located) as reader:
        np.testing.assert_array_equal(reader.read(Window(0, 0, 20, 30)), INDICES)


@pytest.mark.parametrize("turn", [NORTH_UP, SOUTH_UP, ROTATED])
@pytest.mark.parametrize("shift_px", [0.0, 0.3, -0.5])
def test_a_label_on_the_scenes_grid_is_read(tmp_path: Path, turn: Affine, shift_px: float) -> None:
    read_placed(tmp_path, place(transform=turn), place(shift_px=shift_px, transform=turn))


@pytest.mark.parametrize("turn", [NORTH_UP, SOUTH_UP, ROTATED])
@pytest.mark.parametrize(("shift_px", "text"), [(1.0, "1.0"), (-50.0, "50.0"), (0.6, "0.60")])
def test_a_label_that_lies_elsewhere_is_an_error_with_the_distance(
    tmp_path: Path, turn: Affine, shift_px: float, text: str
) -> None:
    with fault("label_size", "l.tif", "upper left corner is " + text + " pixels", "Warp it to"):
        read_placed(tmp_path, place(transform=turn), place(shift_px=shift_px, transform=turn))


def test_each_corner_of_a_label_must_be_the_scenes(tmp_path: Path) -> None:
    with fault("label_size", "upper right corner is 15.0 pixels"):
        read_placed(tmp_path, place(), place(transform=NORTH_UP @ Affine.scale(1.5, 1)))
    with fault("label_size", "lower left corner is 2.0 pixels"):
        read_placed(tmp_path, place(), place(transform=NORTH_UP @ Affine.scale(1, 1.1)))
    with fault("label_size", "upper left corner is 20.0 pixels"):
        read_placed(tmp_path, place(), place(transform=SOUTH_UP @ Affine.translation(0, -20)))


def test_a_label_that_another_system_puts_elsewhere_is_an_error_that_names_both(tmp_path: Path) -> None:
    with fault("label_size", "l.tif", "(it is in EPSG:32645, the scene in EPSG:3857)", "Warp it"):
        read_placed(tmp_path, place(), place("EPSG:32645"))


def test_a_label_that_another_system_puts_in_the_same_place_is_read(tmp_path: Path) -> None:
    etrs89 = place("EPSG:25832", transform=Affine(2, 0, 5e5, 0, -2, 5.5e6))
    wgs84 = place("EPSG:32632", transform=Affine(2, 0, 5e5, 0, -2, 5.5e6))
    read_placed(tmp_path, etrs89, wgs84)
    with fault("label_size", "upper left corner is 3.0 pixels", "EPSG:32632"):
        read_placed(tmp_path, etrs89, place("EPSG:32632", 3.0, Affine(2, 0, 5e5, 0, -2, 5.5e6)))


def test_one_system_may_be_written_in_several_ways(tmp_path: Path) -> None:
    utm = CRS.from_epsg(32633)
    for other in (utm.to_wkt(version="WKT1_ESRI"), "+proj=utm +zone=33 +datum=WGS84 +units=m", UTM33_HEIGHT):
        read_placed(tmp_path, place(utm), place(other))
        read_placed(tmp_path, place(other), place(utm))
    read_placed(tmp_path, place("EPSG:3857"), place("ESRI:102100"))
    with fault("label_size", "lies elsewhere"):  # the place stands where the system cannot be told
        read_placed(tmp_path, place(utm), place(UTM33_HEIGHT, shift_px=3))


@pytest.mark.parametrize("lacking", ["crs", "transform"])
def test_what_has_no_whole_georeference_is_taken_as_it_lies(tmp_path: Path, lacking: str) -> None:
    moved = place("EPSG:32645", shift_px=70)
    part = {name: value for name, value in moved.items() if name != lacking}
    read_placed(tmp_path, place(), part)
    read_placed(tmp_path, part, place())
    read_placed(tmp_path, place(), {})
    read_placed(tmp_path, {}, place())
    corners = [GroundControlPoint(row, col, col + 9e5, -row) for row in (0, 20) for col in (0, 30)]
    read_placed(tmp_path, place(), {"gcps": corners, "crs": "EPSG:3857"})


def test_a_missing_or_unreadable_label_is_an_error(scene: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no raster")
    with fault("label_read", "text.png"):
        read(scene, text)
    two = write_tiff(tmp_path / "two.tif", noise(2, 20, 30))
    with fault("label_read", "two.tif", "2 bands"):
        read(scene, two)
    gone = source_of(scene, label=write_tiff(tmp_path / "gone.tif", INDICES[None]))
    (tmp_path / "gone.tif").unlink()
    with fault("label_read", "gone.tif"):
        open_label(gone, 20, 30, CLASSES, InputConfig())
    with fault("label_read", "scene.tif"):
        open_label(source_of(scene), 20, 30, CLASSES, InputConfig())


def test_damaged_label_pixels_are_an_error_of_kind_label_read(scene: Path, tmp_path: Path) -> None:
    label = write_tiff(tmp_path / "l.tif", INDICES[None].repeat(20, 1).repeat(20, 2))
    label.write_bytes(label.read_bytes()[:-100_000])
    with fault("label_read", "l.tif"):
        read(scene, label, size=(400, 600))


def test_a_label_that_is_replaced_is_scene_changed(scene: Path, tmp_path: Path) -> None:
    label = write_tiff(tmp_path / "l.tif", INDICES[None])
    source = source_of(scene, label=label)
    with open_label(source, 20, 30, CLASSES, InputConfig()) as reader:
        write_tiff(tmp_path / "other.tif", INDICES[None], compress="deflate").rename(label)
        with fault("scene_changed", "l.tif"):
            reader.read(Window(0, 0, 20, 30))
    with fault("scene_changed", "l.tif"):
        open_label(source, 20, 30, CLASSES, InputConfig())


def test_a_label_map_must_name_values_or_colours_and_classes_that_exist() -> None:
    assert parse_label_map({"7": 1, " -1 ": 255, "#0A0b0C": 0}, 2) == ({7: 1, -1: 255}, {0x0A0B0C: 0})
    for bad in ({"roof": 1}, {"#fff": 1}, {"7": 2}, {"1.5": 0}):
        with pytest.raises(ConfigError, match=r"^label_map: "):
            parse_label_map(bad, 2)


def test_the_label_of_a_tar_member_is_read_in_place(tmp_path: Path) -> None:
    image, label = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise(3, 20, 30).transpose(1, 2, 0)).save(image, "PNG")
    Image.fromarray(INDICES).save(label, "PNG")
    first, second = image.getvalue(), label.getvalue()
    path = tmp_path / "shard.tar"
    path.write_bytes(first + second)
    fields: dict[str, Any] = {"member": "a.png", "offset": 0, "length": len(first), "shard_members": 1}
    fields |= {"label_uri": str(path), "label_offset": len(first), "label_length": len(second)}
    source = SceneSource("a", str(path), version_of(str(path)), **fields)
    with open_label(source, 20, 30, CLASSES, InputConfig()) as reader:
        np.testing.assert_array_equal(reader.read(Window(0, 0, 20, 30)), INDICES)


def test_real_palette_and_colour_labels_are_read(shared_data: Path) -> None:
    voc = sorted((shared_data / "fixtures" / "voc").glob("**/SegmentationClass/*.png"))
    assert voc
    for path in voc:
        expected = np.asarray(Image.open(path))
        classes = [ClassInfo(name=str(index), color=(index, 0, 0)) for index in range(21)]
        with open_label(source_of(path, label=path), *expected.shape, classes, InputConfig()) as reader:
            np.testing.assert_array_equal(reader.read(Window(0, 0, *expected.shape)), expected)


def test_an_unknown_label_version_is_taken_as_it_is(scene: Path, tmp_path: Path) -> None:
    label = write_tiff(tmp_path / "l.tif", INDICES[None])
    source = SceneSource("x", str(scene), Version(0, "0-0"), label_uri=str(label))
    with open_label(source, 20, 30, CLASSES, InputConfig()) as reader:
        np.testing.assert_array_equal(reader.read(Window(0, 0, 20, 30)), INDICES)
