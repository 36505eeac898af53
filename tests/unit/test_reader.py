"""Scenes are read as they are in the file: any layout, by content, in windows."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasters import AUTO, noise, read_scene, source_of, whole, write_tiff

from segpipe.config.card import PIXEL_DTYPES
from segpipe.config.model import InputConfig
from segpipe.errors import SceneError
from segpipe.geometry.grid import Window
from segpipe.rasters.header import inspect_scene
from segpipe.rasters.reader import open_scene

LAYOUTS = {
    "tiles": {"tiled": True, "blockxsize": 64, "blockysize": 64},
    "strips": {"blockysize": 16},
    "band_tiles": {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "band"},
    "one_strip": {"blockysize": 150},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", ["none", "deflate", "lzw", "zstd", "packbits", "lerc", "lzma"])
def test_lossless_geotiffs_come_back_exactly(tmp_path: Path, layout: str, compression: str) -> None:
    pixels = noise(3, 150, 170)
    path = write_tiff(tmp_path / "x.tif", pixels, compress=compression, **LAYOUTS[layout])
    header, read, valid = read_scene(path, 3)
    np.testing.assert_array_equal(read, pixels)
    assert valid is None
    assert (header.driver, header.dtype, header.bands) == ("GTiff", "uint8", (1, 2, 3))
    assert header.strips is ("strip" in layout)


@pytest.mark.parametrize(
    ("dtype", "predictor"),
    [(name, predictor) for name in PIXEL_DTYPES for predictor in (1, 2)] + [("float32", 3), ("float64", 3)],
)
def test_every_pixel_type_comes_back_exactly(tmp_path: Path, dtype: str, predictor: int) -> None:
    pixels = noise(2, 70, 90, dtype) * (1 if dtype == "uint8" else 100)
    path = write_tiff(tmp_path / "x.tif", pixels, compress="deflate", predictor=predictor)
    header, read, valid = read_scene(path, 2)
    assert (header.dtype, read.dtype) == (dtype, dtype)
    np.testing.assert_array_equal(read, pixels)
    assert valid is None


@pytest.mark.parametrize("options", [{"bigtiff": "YES"}, {"endianness": "BIG"}])
def test_bigtiff_and_big_endian_files_are_geotiffs(tmp_path: Path, options: dict[str, str]) -> None:
    pixels = noise(3, 40, 50, "uint16")
    path = write_tiff(tmp_path / "x.tif", pixels, **options)
    np.testing.assert_array_equal(read_scene(path, 3)[1], pixels)


def test_jpeg_in_tiff_comes_as_rgb(tmp_path: Path) -> None:
    flat = np.broadcast_to(np.array([200, 40, 90], np.uint8)[:, None, None], (3, 128, 128)).copy()
    path = write_tiff(
        tmp_path / "x.tif",
        flat,
        compress="jpeg",
        photometric="ycbcr",
        tiled=True,
        blockxsize=64,
        blockysize=64,
    )
    read = read_scene(path, 3)[1].astype(int)
    assert abs(read - flat).max() <= 3


@pytest.mark.parametrize("name", ["x.tif", "x.png", "x.jpg", "no_suffix"])
@pytest.mark.parametrize(
    ("driver", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})]
)
def test_the_content_and_not_the_suffix_says_what_a_file_is(
    tmp_path: Path, name: str, driver: str, options: dict[str, object]
) -> None:
    path = tmp_path / name
    image = Image.fromarray(noise(3, 60, 80).transpose(1, 2, 0))
    image.save(path, driver, **options)
    header, read, valid = read_scene(path, 3)
    assert header.driver == driver
    assert valid is None
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(read, dataset.read())


@pytest.mark.parametrize(
    "name", ["a b.tif", "ä%20#?.tif", "GTIFF_DIR:1:x.tif", "a!b.tif", "[x]{y}*.tif", "zip+x.tif"]
)
def test_odd_file_names_are_only_names(tmp_path: Path, name: str) -> None:
    pixels = noise(1, 20, 30)
    path = write_tiff(tmp_path / "plain.tif", pixels).rename(tmp_path / name)
    np.testing.assert_array_equal(read_scene(path, 1)[1], pixels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_are_cut_out_of_the_whole(tmp_path: Path, layout: str) -> None:
    pixels = noise(3, 150, 170)
    source = source_of(write_tiff(tmp_path / "x.tif", pixels, compress="deflate", **LAYOUTS[layout]))
    header = inspect_scene(source, 3, AUTO)
    with open_scene(source, header, AUTO) as reader:
        for window in (
            Window(0, 0, 1, 1),
            Window(149, 169, 1, 1),
            Window(60, 63, 70, 3),
            Window(100, 0, 50, 170),
        ):
            read, valid = reader.read(window)
            rows, cols = window.slices_in(whole(header))
            np.testing.assert_array_equal(read, pixels[:, rows, cols])
            assert read.flags.c_contiguous
            assert valid is None


def test_a_window_outside_the_scene_is_refused(tmp_path: Path) -> None:
    source = source_of(write_tiff(tmp_path / "x.tif", noise(1, 20, 30)))
    header = inspect_scene(source, 1, AUTO)
    with open_scene(source, header, AUTO) as reader:
        for window in (Window(0, 0, 21, 30), Window(-1, 0, 5, 5), Window(0, 28, 5, 5), Window(0, 0, 0, 5)):
            with pytest.raises(ValueError, match="does not lie in"):
                reader.read(window)


# --- bands


def test_the_first_bands_are_taken_and_more_are_left(tmp_path: Path) -> None:
    pixels = noise(5, 20, 30)
    header, read, _ = read_scene(write_tiff(tmp_path / "x.tif", pixels), 3)
    assert (header.bands, header.num_bands) == ((1, 2, 3), 5)
    np.testing.assert_array_equal(read, pixels[:3])


def test_named_bands_come_in_their_order(tmp_path: Path) -> None:
    pixels = noise(5, 20, 30)
    path = write_tiff(tmp_path / "x.tif", pixels)
    header, read, _ = read_scene(path, 3, InputConfig(bands=(5, 1, 1)))
    assert header.bands == (5, 1, 1)
    np.testing.assert_array_equal(read, pixels[[4, 0, 0]])
    assert read.flags.c_contiguous


def test_an_alpha_band_is_never_taken_by_default(tmp_path: Path) -> None:
    pixels = noise(4, 20, 30)
    path = write_tiff(tmp_path / "x.tif", pixels, alpha=1)
    header, read, _ = read_scene(path, 3)
    assert header.bands == (2, 3, 4)
    np.testing.assert_array_equal(read, pixels[1:])


def test_fewer_bands_than_the_model_takes_are_an_error_of_kind_bands(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(2, 20, 30))
    for config in (AUTO, InputConfig(bands=(1, 2, 3)), InputConfig(bands=(1, 2))):
        with pytest.raises(SceneError) as caught:
            inspect_scene(source_of(path), 3, config)
        assert caught.value.kind == "bands"
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("found", "wanted", "bands", "text"),
    [
        (1, 3, "auto", "it has 1 band, 3 are wanted"),
        (2, 3, "auto", "it has 2 bands, 3 are wanted"),
        (2, 1, (1, 2), "input.bands names 2 bands, 1 is wanted"),
    ],
)
def test_bands_are_counted_in_plain_words(
    tmp_path: Path, found: int, wanted: int, bands: Any, text: str
) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(found, 20, 30))
    with pytest.raises(SceneError, match=text):
        inspect_scene(source_of(path), wanted, InputConfig(bands=bands))


def test_rgbi_that_claims_alpha_names_the_way_out(tmp_path: Path) -> None:
    pixels = noise(4, 20, 30)
    pixels[3, :5] = 0
    path = write_tiff(tmp_path / "x.tif", pixels, alpha=4, photometric="rgb")
    with pytest.raises(SceneError, match=r"input\.bands: \[1, 2, 3, 4\]"):
        inspect_scene(source_of(path), 4, AUTO)
    header, read, valid = read_scene(path, 4, InputConfig(bands=(1, 2, 3, 4)))
    np.testing.assert_array_equal(read, pixels)
    assert valid is None  # near infrared of 0 is data
    assert header.valid_source == "none"


def test_a_palette_image_becomes_rgb_for_a_model_of_three_bands(tmp_path: Path) -> None:
    indices = np.arange(240, dtype=np.uint8).reshape(1, 12, 20) % 5
    colours = {
        0: (255, 0, 0, 255),
        1: (0, 255, 0, 255),
        2: (0, 0, 255, 255),
        3: (9, 8, 7, 0),
        4: (1, 2, 3, 255),
    }
    path = write_tiff(tmp_path / "x.tif", indices, colormap=colours)
    header, read, valid = read_scene(path, 3)
    table = np.array([colours[index][:3] for index in range(5)], np.uint8)
    np.testing.assert_array_equal(read, table[indices[0]].transpose(2, 0, 1))
    assert (header.num_bands, header.dtype) == (1, "uint8")
    assert read.flags.c_contiguous
    assert read.shape == (3, 12, 20)
    np.testing.assert_array_equal(read_scene(path, 1)[1], indices)
    np.testing.assert_array_equal(read_scene(path, 3, InputConfig(bands=(1, 1, 1)))[1], indices.repeat(3, 0))
    assert valid is None or not valid.all()


def test_a_palette_of_16_bits_becomes_rgb_too(tmp_path: Path) -> None:
    indices = np.arange(240, dtype=np.uint16).reshape(1, 12, 20) * 270
    colours = {int(index): (int(index) % 251, int(index) >> 8, 7, 255) for index in indices.flat}
    path = write_tiff(tmp_path / "x.tif", indices, colormap=colours)
    header, read, valid = read_scene(path, 3)
    table = np.array([colours[int(index)][:3] for index in indices.flat], np.uint8)
    np.testing.assert_array_equal(read, table.reshape(12, 20, 3).transpose(2, 0, 1))
    assert (header.dtype, read.dtype) == ("uint8", np.uint8)
    assert valid is None
    np.testing.assert_array_equal(read_scene(path, 1)[1], indices)


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int32", "complex64", "complex128", "int64"])
def test_other_pixel_types_are_errors_of_kind_dtype(tmp_path: Path, dtype: str) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(1, 20, 30, dtype))
    with pytest.raises(SceneError) as caught:
        inspect_scene(source_of(path), 1, AUTO)
    assert caught.value.kind == "dtype"
    assert dtype in str(caught.value)


def test_bilevel_images_are_errors_of_kind_dtype(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(1, 20, 30) % 2, nbits=1)
    with pytest.raises(SceneError, match="1-bit") as caught:
        inspect_scene(source_of(path), 1, AUTO)
    assert caught.value.kind == "dtype"


def test_twelve_bits_in_uint16_are_read(tmp_path: Path) -> None:
    pixels = noise(1, 20, 30, "uint16") * 16
    path = write_tiff(tmp_path / "x.tif", pixels, nbits=12)
    np.testing.assert_array_equal(read_scene(path, 1)[1], pixels)


def test_scale_and_offset_are_left_alone(tmp_path: Path) -> None:
    pixels = noise(1, 20, 30, "int16")
    path = write_tiff(tmp_path / "x.tif", pixels)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = (0.01,), (100.0,)
    np.testing.assert_array_equal(read_scene(path, 1)[1], pixels)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"TIFFTAG_DATETIME": "2014:04:01 10:30:00"}, "2014-04-01T10:30:00"),
        ({"ACQUISITIONDATETIME": "2019-06-11T10:12:33+00:00"}, "2019-06-11T10:12:33+00:00"),
        ({"TIFFTAG_DATETIME": "yesterday"}, None),
        ({}, None),
    ],
)
def test_the_acquisition_time_is_read(tmp_path: Path, tags: dict[str, str], expected: str | None) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(1, 20, 30))
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(**tags)
    assert inspect_scene(source_of(path), 1, AUTO).datetime == expected


# --- threads, shards, real files


def test_threads_with_their_own_readers_read_the_same(tmp_path: Path) -> None:
    pixels = noise(3, 512, 512)
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    source = source_of(write_tiff(tmp_path / "x.tif", pixels, compress="deflate", **tiles))
    header = inspect_scene(source, 3, AUTO)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with open_scene(source, header, AUTO) as reader:
            for _ in range(20):
                row, col = (int(value) for value in rng.integers(0, 400, 2))
                read = reader.read(Window(row, col, 100, 110))[0]
                if not np.array_equal(read, pixels[:, row : row + 100, col : col + 110]):
                    wrong.append((row, col))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_reader_may_be_closed_twice_and_by_another_thread(tmp_path: Path) -> None:
    source = source_of(write_tiff(tmp_path / "x.tif", noise(1, 20, 30)))
    reader = open_scene(source, inspect_scene(source, 1, AUTO), AUTO)
    thread = threading.Thread(target=reader.close)
    thread.start()
    thread.join()
    reader.close()


def test_a_member_of_a_tar_shard_is_read_in_place(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    pixels = noise(3, 30, 40)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(encoded, "PNG")
    path = tmp_path / "shard.tar"
    path.write_bytes(b"#" * 100 + encoded.getvalue() + b"#" * 50)
    member = {"member": "a.png", "offset": 100, "length": len(encoded.getvalue()), "shard_members": 1}
    header, read, valid = read_scene(path, 3, **member)
    assert header.driver == "PNG"
    np.testing.assert_array_equal(read, pixels)
    assert valid is None


def test_real_rasters_are_read_as_rasterio_reads_them(shared_data: Path) -> None:
    paths = sorted((shared_data / "rasters").glob("*.tif"))
    assert len(paths) >= 9
    for path in paths:
        with rasterio.open(path) as dataset:
            expected = dataset.read()
            masked = dataset.dataset_mask()
        num_bands = min(3, len(expected))
        header, read, valid = read_scene(path, num_bands)
        np.testing.assert_array_equal(read, expected[:num_bands], err_msg=path.name)
        if header.valid_source in ("alpha", "mask"):
            np.testing.assert_array_equal(
                np.ones_like(masked, bool) if valid is None else valid, masked != 0, err_msg=path.name
            )


def test_chips_whose_suffix_lies_are_read_with_their_sidecar_georeference(shared_data: Path) -> None:
    folder = shared_data / "hot-fair-buildings" / "raw-chips"
    drivers = {}
    for path in sorted(folder.glob("OAM-*.png")) + sorted(folder.glob("OAM-*.tif")):
        header, read, _ = read_scene(path, 3)
        drivers.setdefault(path.suffix, set()).add(header.driver)
        with rasterio.open(path) as dataset:
            np.testing.assert_array_equal(read, dataset.read((1, 2, 3)))
        assert (header.crs == "EPSG:4326") is (path.suffix == ".tif")
        assert (header.transform is not None) is (path.suffix == ".tif")
    assert drivers == {".png": {"PNG", "JPEG"}, ".tif": {"JPEG"}}
