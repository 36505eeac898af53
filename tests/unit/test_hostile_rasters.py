"""Files that lie, break off or ask for too much: one clear error each, nothing followed or allocated."""

from __future__ import annotations

import resource
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasters import AUTO, noise, read_scene, source_of, whole, write_sparse_tiff, write_tiff

from segpipe.config.card import ClassInfo
from segpipe.config.model import InputConfig, LimitsConfig
from segpipe.errors import SceneError
from segpipe.geometry.grid import Window
from segpipe.rasters.driver import driver_of, open_raster
from segpipe.rasters.georeference import parse_aux
from segpipe.rasters.header import MAX_SIDE_PX, inspect_scene
from segpipe.rasters.labels import open_label
from segpipe.rasters.reader import open_scene
from segpipe.rasters.scene import SceneSource

TILES = {"tiled": True, "blockxsize": 64, "blockysize": 64}
CLASSES = [ClassInfo(name="ground", color=(0, 0, 0))]


def vrt(target: str, height: int = 64, width: int = 64) -> str:
    return (
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><VRTRasterBand dataType="Byte" band="1">'
        f'<SimpleSource><SourceFilename relativeToVRT="0">{target}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )


def kind_of(source: SceneSource, config: InputConfig = AUTO, num_bands: int = 1) -> str:
    with pytest.raises(SceneError) as caught:
        inspect_scene(source, num_bands, config)
    assert source.uri in str(caught.value)
    return caught.value.kind


def decode_kind(path: Path, num_bands: int) -> str:
    """Kind of the error on reading a file whose header is good."""
    source = source_of(path)
    header = inspect_scene(source, num_bands, AUTO)
    with open_scene(source, header, AUTO) as reader, pytest.raises(SceneError) as caught:
        reader.read(whole(header))
    assert str(path) in str(caught.value)
    return caught.value.kind


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"I",
        b"no raster at all",
        b"<VRTDataset/>",
        b"GIF89a" + bytes(50),
        bytes(64),
        b"\x89PNG",
        b"RIFF1234WAVE",
    ],
)
def test_what_is_no_raster_by_its_first_bytes_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tif"
    path.write_bytes(content)
    assert kind_of(source_of(path)) == "not_raster"


def test_a_folder_named_like_a_raster_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "x.tif").mkdir()
    version = source_of(write_tiff(tmp_path / "y.tif", noise(1, 5, 5))).version
    assert kind_of(SceneSource("x", str(tmp_path / "x.tif"), version)) == "not_found"


def test_a_vrt_named_tif_reads_no_other_file(tmp_path: Path) -> None:
    secret = write_tiff(tmp_path / "secret.tif", noise(1, 64, 64))
    path = tmp_path / "x.tif"
    path.write_text(vrt(str(secret)))
    with rasterio.open(path) as dataset:
        assert dataset.read().any()  # GDAL left to itself follows it
    assert kind_of(source_of(path)) == "not_raster"


def test_a_vrt_named_tif_or_msk_sends_no_request(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        url = f"/vsicurl/http://127.0.0.1:{server.getsockname()[1]}/secret.tif"
        path = tmp_path / "x.tif"
        path.write_text(vrt(url))
        good = write_tiff(tmp_path / "good.tif", noise(1, 64, 64))
        (tmp_path / "good.tif.msk").write_text(vrt(url))
        (tmp_path / "good.tif.ovr").write_text(vrt(url))
        assert kind_of(source_of(path)) == "not_raster"
        assert kind_of(source_of(good, valid=tmp_path / "good.tif.msk")) == "valid_mask"
        read_scene(good, 1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_gdal_sees_no_sidecars(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(1, 64, 64))
    secret = write_tiff(tmp_path / "secret.tif", np.zeros((1, 64, 64), np.uint8))
    for suffix in (".msk", ".ovr"):
        (tmp_path / f"x.tif{suffix}").write_text(vrt(str(secret)))
    (tmp_path / "x.tfw").write_text("2\n0\n0\n-2\n100\n200\n")
    (tmp_path / "x.IMD").write_text("version = 1;\n")
    (tmp_path / "x_RPC.TXT").write_text("LINE_OFF: 1\n")
    with open_raster(str(path), None) as raster:
        assert raster.call("header", lambda dataset: list(dataset.files)) == [str(path)]
        assert raster.call("header", lambda dataset: dataset.rpcs) is None
    header, _, valid = read_scene(path, 1)
    assert (header.transform, header.valid_source, valid) == (None, "none", None)


def test_plain_images_see_no_sidecars_either(tmp_path: Path) -> None:
    for name, driver in (("x.png", "PNG"), ("x.jpg", "JPEG"), ("x.webp", "WEBP")):
        Image.fromarray(noise(3, 20, 30).transpose(1, 2, 0)).save(tmp_path / name, driver)
        for suffix in (".msk", ".ovr"):
            (tmp_path / f"{name}{suffix}").write_text(vrt("/etc/hostname"))
    for suffix in ("pgw", "jgw", "wld", "pngw", "webpw"):
        (tmp_path / f"x.{suffix}").write_text("2\n0\n0\n-2\n100\n200\n")
    for name in ("x.png", "x.jpg", "x.webp"):
        with open_raster(str(tmp_path / name), None) as raster:
            assert raster.call("header", lambda dataset: list(dataset.files)) == [str(tmp_path / name)]
        header, _, valid = read_scene(tmp_path / name, 3)
        assert (header.transform, header.valid_source, valid) == (None, "none", None)


def test_reading_writes_no_sidecar(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(1, 64, 64))
    read_scene(path, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.tif"]


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE a [<!ENTITY b "c">]><PAMDataset><GeoTransform>1,2,0,3,0,2</GeoTransform></PAMDataset>',
        "<PAMDataset><GeoTransform>1,2,0,3,0</GeoTransform></PAMDataset>",
        "<PAMDataset><GeoTransform>1,nan,0,3,0,2</GeoTransform></PAMDataset>",
        "<PAMDataset><GeoTransform>0,1,0,0,0,1</GeoTransform></PAMDataset>",
        "<PAMDataset>",
        "no xml",
        "",
    ],
)
def test_a_strange_aux_xml_says_nothing(text: str) -> None:
    assert parse_aux(text.encode()) == (None, None)
    assert parse_aux(text.encode("utf-16")) == (None, None)


def test_a_huge_aux_xml_is_not_read(tmp_path: Path) -> None:
    Image.fromarray(noise(3, 20, 30).transpose(1, 2, 0)).save(tmp_path / "x.png")
    text = "<PAMDataset><GeoTransform>1,2,0,3,0,2</GeoTransform>{}</PAMDataset>"
    sidecar = tmp_path / "x.png.aux.xml"
    sidecar.write_text(text.format(" " * 1000))
    assert read_scene(tmp_path / "x.png", 3)[0].transform == (2.0, 0.0, 1.0, 0.0, 2.0, 3.0)
    sidecar.write_text(text.format(" " * (1 << 20)))
    assert read_scene(tmp_path / "x.png", 3)[0].transform is None


# --- limits


def test_one_endless_row_is_refused_before_its_tiles_are_listed(tmp_path: Path) -> None:
    path = write_sparse_tiff(tmp_path / "row.tif", 1, MAX_SIDE_PX + 1, 4096)
    assert kind_of(source_of(path)) == "limit"


def test_a_small_file_that_claims_100_gpx_is_refused_without_memory(tmp_path: Path) -> None:
    path = write_sparse_tiff(tmp_path / "x.tif", 316_228, 316_228, 8192)
    assert path.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SceneError) as caught:
        inspect_scene(source_of(path), 1, AUTO)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert caught.value.kind == "limit"
    for word in (f"{316_228**2:,}", "20,000,000,000", " limits.scene_px"):
        assert word in str(caught.value)


def test_one_giant_tile_is_refused_without_memory(tmp_path: Path) -> None:
    path = write_sparse_tiff(tmp_path / "x.tif", 20_000, 20_000, 16_384)
    limits = LimitsConfig(file_block_bytes=16_384**2 - 1)
    with pytest.raises(SceneError) as caught:
        inspect_scene(source_of(path), 1, InputConfig(limits=limits))
    assert caught.value.kind == "limit"
    for word in (f"{16_384**2:,}", f"{16_384**2 - 1:,}", " limits.file_block_bytes"):
        assert word in str(caught.value)
    assert inspect_scene(source_of(path), 1, AUTO).file_block == (16_384, 16_384)


@pytest.mark.parametrize("what", ["label", "valid"])
def test_the_limits_hold_for_labels_and_masks_too(tmp_path: Path, what: str) -> None:
    tiles = {"tiled": True, "blockxsize": 128, "blockysize": 128}
    scene = write_tiff(tmp_path / "x.tif", noise(1, 128, 128), **TILES)
    beside = write_tiff(tmp_path / "beside.tif", np.zeros((1, 128, 128), np.uint8), **tiles)
    source = source_of(scene, **{what: beside})

    def look(limit: int) -> None:
        config = InputConfig(limits=LimitsConfig(file_block_bytes=limit))
        inspect_scene(source, 1, config)
        if what == "label":
            open_label(source, 128, 128, CLASSES, config).close()

    look(128 * 128)
    with pytest.raises(SceneError, match=r"beside\.tif.* limits\.file_block_bytes"):
        look(128 * 128 - 1)


@pytest.mark.parametrize(("interleave", "factor"), [("pixel", 3), ("band", 1)])
def test_a_block_counts_all_bands_that_are_decoded_together(
    tmp_path: Path, interleave: str, factor: int
) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(3, 100, 100, "uint16"), interleave=interleave, **TILES)
    size = 64 * 64 * 2 * factor
    for limit, refused in ((size, False), (size - 1, True)):
        config = InputConfig(limits=LimitsConfig(file_block_bytes=limit))
        if refused:
            assert kind_of(source_of(path), config) == "limit"
        else:
            inspect_scene(source_of(path), 1, config)


def test_a_webp_counts_as_one_block(tmp_path: Path) -> None:
    Image.fromarray(noise(3, 100, 90).transpose(1, 2, 0)).save(tmp_path / "x.webp")
    config = InputConfig(limits=LimitsConfig(file_block_bytes=100 * 90 * 3 - 1))
    assert kind_of(source_of(tmp_path / "x.webp"), config, 3) == "limit"
    assert inspect_scene(source_of(tmp_path / "x.webp"), 3, AUTO).file_block == (100, 90)


# --- damaged pixels


@pytest.mark.parametrize("compression", ["none", "deflate", "lzw", "zstd", "jpeg", "lerc"])
@pytest.mark.parametrize("layout", [TILES, {"blockysize": 16}], ids=["tiles", "strips"])
def test_a_truncated_geotiff_is_an_error_and_never_zeros(
    tmp_path: Path, compression: str, layout: dict[str, object]
) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(3, 200, 200), compress=compression, **layout)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    assert decode_kind(path, 3) == "decode"


@pytest.mark.parametrize("compression", ["deflate", "lzw", "lerc"])
def test_a_damaged_tile_is_an_error_and_the_other_tiles_are_read(tmp_path: Path, compression: str) -> None:
    pixels = noise(3, 256, 256)
    path = write_tiff(tmp_path / "x.tif", pixels, compress=compression, **TILES)
    with rasterio.open(path) as dataset:
        offset = int(dataset.get_tag_item("BLOCK_OFFSET_2_2", "TIFF", bidx=1))
        size = int(dataset.get_tag_item("BLOCK_SIZE_2_2", "TIFF", bidx=1))
    data = bytearray(path.read_bytes())
    data[offset : offset + size // 2] = b"\xff" * (size // 2)
    path.write_bytes(data)
    source = source_of(path)
    with open_scene(source, inspect_scene(source, 3, AUTO), AUTO) as reader:
        np.testing.assert_array_equal(reader.read(Window(0, 0, 128, 256))[0], pixels[:, :128])
        with pytest.raises(SceneError) as caught:
            reader.read(Window(128, 128, 10, 10))
        assert caught.value.kind == "decode"
        np.testing.assert_array_equal(reader.read(Window(192, 192, 64, 64))[0], pixels[:, 192:, 192:])


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 90}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {}),
    ],
)
def test_a_truncated_image_is_an_error_and_never_grey(
    tmp_path: Path, driver: str, options: dict[str, object]
) -> None:
    path = tmp_path / "x.img"
    Image.fromarray(noise(3, 200, 300).transpose(1, 2, 0)).save(path, driver, **options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    assert decode_kind(path, 3) == "decode"


@pytest.mark.parametrize(
    "magic", [b"II*\0", b"II+\0\x08\0\0\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP"]
)
def test_a_header_of_rubbish_is_an_error_of_kind_header(tmp_path: Path, magic: bytes) -> None:
    path = tmp_path / "x.tif"
    path.write_bytes(magic + noise(1, 1, 500).tobytes())
    assert driver_of(path.read_bytes()[:16]) is not None
    assert kind_of(source_of(path)) == "header"


def test_the_words_of_an_error_are_the_same_every_time(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(3, 200, 200), compress="deflate", **TILES)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    words = set()

    def work() -> None:
        source = source_of(path)
        header = inspect_scene(source, 3, AUTO)
        with open_scene(source, header, AUTO) as reader:
            try:
                reader.read(whole(header))
            except SceneError as error:
                words.add(str(error))

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(words) == 1


def test_tiles_that_a_sparse_file_leaves_out_are_nodata(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=128,
        width=128,
        count=1,
        dtype="uint8",
        sparse_ok=True,
        nodata=7,
        **TILES,
    ) as dataset:
        dataset.write(noise(1, 64, 64), window=rasterio.windows.Window(0, 0, 64, 64))
    _, pixels, valid = read_scene(path, 1)
    assert valid is not None
    assert (pixels[0, 64:] == 7).all()
    assert not valid[64:].any()
