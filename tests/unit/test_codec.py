from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peak_memory import peak_growth_bytes
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

from segpipe.errors import CheckError
from segpipe.masks.codec import _BAND_BYTES, DamagedMask, check_mask, decode_mask, encode_mask


def buildings(height: int, width: int) -> np.ndarray:
    """Some rectangles of class 1 on 0, with a border of 255."""
    rng = np.random.default_rng(3)
    mask = np.zeros((height, width), np.uint8)
    for row, col in zip(rng.integers(0, height, 40), rng.integers(0, width, 40), strict=True):
        mask[row : row + 30, col : col + 20] = 1
    mask[:, -3:] = 255
    return mask


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(height: int, width: int, raw: bytes, layout: tuple[int, ...] = (8, 0, 0, 0, 0)) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, *layout)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (5, 63), (5, 64), (301, 257), (900, 1100)])
def test_masks_come_back_as_they_were(shape: tuple[int, int]) -> None:
    mask = buildings(*shape)
    data = encode_mask(mask)
    decoded = decode_mask(data)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, mask)
    assert check_mask(data) == shape


def test_pillow_and_rasterio_open_the_png_with_the_same_pixels() -> None:
    mask = buildings(900, 1100)
    assert mask.size > 2 * _BAND_BYTES  # several bands and IDAT chunks
    data = encode_mask(mask)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), mask)
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    with MemoryFile(data) as file, file.open(driver="PNG") as dataset:
        np.testing.assert_array_equal(dataset.read(1), mask)


def test_a_mask_gives_the_same_bytes_however_it_lies_in_memory() -> None:
    mask = buildings(200, 300)
    wide = np.zeros((200, 600), np.uint8)
    wide[:, ::2] = mask
    assert encode_mask(wide[:, ::2]) == encode_mask(mask) == encode_mask(np.asfortranarray(mask))


def test_building_masks_pack_below_a_twentieth_of_a_byte_a_pixel() -> None:
    mask = buildings(1024, 1024)
    assert len(encode_mask(mask)) < mask.size / 20


def large_mask() -> np.ndarray:
    encode_mask(buildings(64, 64))  # what a first call loads is not counted
    return np.ones((8192, 16384), np.uint8)


def encode_large(mask: np.ndarray) -> None:
    assert len(encode_mask(mask)) < 2_000_000


def test_encoding_takes_little_memory_besides_the_result() -> None:
    assert peak_growth_bytes(large_mask, encode_large) < 8 * _BAND_BYTES + 8_000_000 < 8192 * 16384 / 4


@pytest.mark.parametrize(
    "mask", [np.zeros((0, 4), np.uint8), np.zeros((2, 2, 1), np.uint8), np.zeros((2, 2), int)]
)
def test_encode_refuses_what_is_no_mask(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a mask is uint8 \(h, w\)"):
        encode_mask(mask)


@pytest.mark.parametrize("compress_level", [1, 9])
def test_pngs_of_other_programs_are_read(compress_level: int) -> None:
    mask = buildings(120, 140)
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", compress_level=compress_level)
    np.testing.assert_array_equal(decode_mask(file.getvalue()), mask)


@pytest.mark.parametrize("filter_type", range(5))
def test_every_png_filter_is_read(filter_type: int) -> None:
    rng = np.random.default_rng(filter_type)
    raw = rng.integers(0, 256, (6, 9), dtype=np.uint8)
    raw[:, 0] = filter_type
    data = png(6, 8, raw.tobytes())
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode_mask(data), np.asarray(image))


@pytest.mark.parametrize("look", [decode_mask, check_mask])
def test_a_png_cut_off_anywhere_or_with_more_behind_it_is_damaged(look: Callable[[bytes], Any]) -> None:
    data = encode_mask(buildings(30, 40))
    for stop in range(0, len(data), 7):
        with pytest.raises(DamagedMask, match=r"cut off|does not begin as a PNG"):
            look(data[:stop])
    with pytest.raises(DamagedMask, match="4 bytes follow its end"):
        look(data + b"more")


@pytest.mark.parametrize("look", [decode_mask, check_mask])
def test_a_wrong_checksum_is_damaged_though_the_pixels_could_be_unpacked(
    look: Callable[[bytes], Any],
) -> None:
    data = bytearray(encode_mask(buildings(30, 40)))
    data[-13] ^= 1  # last byte of the last IDAT's checksum
    with pytest.raises(DamagedMask, match="checksum"):
        look(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "does not begin as a PNG"),
        (b"II*\x00" + bytes(40), "does not begin as a PNG"),
        (png(2, 2, bytes(5)), "5 bytes of pixels where its header says 6"),
        (png(2, 2, bytes(7)), "7 bytes of pixels where its header says 6"),
        (png(2, 2, bytes(12), (16, 0, 0, 0, 0)), "not 8-bit greyscale"),
        (png(2, 2, bytes(14), (8, 2, 0, 0, 0)), "not 8-bit greyscale"),
        (png(2, 2, bytes(6), (8, 0, 0, 0, 1)), "interlacing"),
        (png(0, 2, b""), "0 x 2 pixels"),
        (png(1, 1, b"\x07\x00"), "unknown filter 7"),
        (png(1 << 30, 1 << 30, bytes(6)), "cannot lie in"),
    ],
)
def test_what_is_no_mask_png_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DamagedMask, match=reason):
        decode_mask(data)


def test_a_stream_of_no_zlib_is_damaged() -> None:
    header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", b"no zlib stream")
        + chunk(b"IEND", b"")
    )
    with pytest.raises(DamagedMask, match="cannot be unpacked"):
        decode_mask(data)


def test_a_zlib_stream_without_its_end_is_damaged_though_all_pixels_are_there() -> None:
    header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    stream = zlib.compress(bytes(4 * 5))[:-4]  # without the checksum of the pixels
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")
    with pytest.raises(DamagedMask, match="20 bytes of pixels"):
        decode_mask(data)


def bomb() -> bytes:
    decode_mask(encode_mask(buildings(64, 64)))
    return png(100, 99, bytes(50_000_000))


def decode_bomb(data: bytes) -> None:
    with pytest.raises(DamagedMask, match="where its header says 10000"):
        decode_mask(data)


def test_a_small_file_cannot_make_the_decoder_take_much_memory() -> None:
    assert peak_growth_bytes(bomb, decode_bomb) < 5_000_000


def test_a_damaged_mask_is_a_failed_check() -> None:
    assert issubclass(DamagedMask, CheckError)
    assert DamagedMask("x").exit_code == 4


def test_a_cityscapes_label_is_read_and_comes_back(shared_data: Path) -> None:
    folder = shared_data / "fixtures/cityscapes"
    found = sorted(folder.glob("gtFine/**/*_labelIds.png"))
    if not found:
        pytest.skip(f"no label rasters below {folder}")
    with Image.open(found[0]) as image:
        label = np.asarray(image)
    np.testing.assert_array_equal(decode_mask(found[0].read_bytes()), label)
    np.testing.assert_array_equal(decode_mask(encode_mask(label)), label)
