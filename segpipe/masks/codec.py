"""Class masks as PNG: 8-bit greyscale, filter "up" on every row, zlib level 1 with its RLE strategy.

Masks change little from row to row, so the "up" filter leaves runs of zeros, which zlib's RLE strategy packs
as fast as it can read. Any PNG reader opens the result (PNG, W3C Recommendation 2003, sections 5, 9, 10).
The same mask gives the same bytes for one build of zlib; another implementation (zlib-ng) may pack the same
pixels into other bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from segpipe.errors import CheckError

Array = np.ndarray[Any, Any]

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_HEADER: Final = struct.Struct(">IIBBBBB")  # width, height, depth, colour, compression, filter, interlace
_GREY_8: Final = (8, 0, 0, 0, 0)
_UP: Final = 2
_LEVEL: Final = 1
_BAND_BYTES: Final = 1 << 18  # rows filtered at a time: they stay in the second-level cache
_NARROW_PX: Final = 64
_MAX_SIDE_PX: Final = (1 << 31) - 1
_MAX_RATIO: Final = 1032  # deflate cannot pack more tightly (https://zlib.net/zlib_tech.html)


class DamagedMask(CheckError):
    """The bytes are no whole mask PNG: cut off, changed, or of another kind."""


def encode_mask(mask: Array) -> bytes:
    """Return the PNG bytes of a uint8 (h, w) mask; h and w at least 1. Releases the GIL while it packs."""
    if mask.dtype != np.uint8 or mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"a mask is uint8 (h, w) and not empty, not {mask.dtype} {mask.shape}")
    height, width = mask.shape
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    parts = [_SIGNATURE, *_chunk(b"IHDR", _HEADER.pack(width, height, *_GREY_8))]
    for rows in _filtered_bands(mask):
        parts += _chunk(b"IDAT", packer.compress(rows.data))
    parts += _chunk(b"IDAT", packer.flush())
    parts += _chunk(b"IEND", b"")
    return b"".join(parts)


def decode_mask(data: bytes) -> Array:
    """Return the uint8 (h, w) mask of an 8-bit greyscale PNG, also of one written by another program.

    Checksums and sizes are checked, and no memory is taken that the data cannot fill. Raises DamagedMask.
    """
    height, width, packed = _parse(data)
    raw_bytes = height * (width + 1)
    if raw_bytes > _MAX_RATIO * (len(packed) + 1):
        raise _damaged(f"{height} x {width} pixels cannot lie in {len(packed)} bytes")
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(packed, raw_bytes + 1)
    except zlib.error as error:
        raise _damaged(f"its pixels cannot be unpacked ({error})") from error
    if len(raw) != raw_bytes or not unpacker.eof:
        raise _damaged(f"it holds {len(raw)} bytes of pixels where its header says {raw_bytes}")
    rows = np.frombuffer(raw, np.uint8).reshape(height, width + 1)
    if (rows[:, 0] == _UP).all():
        return _undo_up(rows[:, 1:])
    return _unfilter(rows, packed)


def check_mask(data: bytes) -> tuple[int, int]:
    """Return height and width of a mask PNG that is whole by its checksums, without unpacking it.

    Fast, and finds any changed byte. Raises DamagedMask.
    """
    chunks = _chunks(data)
    size = _parse_header(*next(chunks))
    deque(chunks, maxlen=0)
    return size


def _filtered_bands(mask: Array) -> Iterator[Array]:
    """Yield rows as PNG wants them: the filter's number, then the difference to the row above."""
    height, width = mask.shape
    band_rows = min(height, max(1, _BAND_BYTES // (width + 1)))
    band = np.empty((band_rows, width + 1), np.uint8)
    band[:, 0] = _UP
    for start in range(0, height, band_rows):
        stop = min(start + band_rows, height)
        out = band[: stop - start, 1:]
        if start:
            np.subtract(mask[start:stop], mask[start - 1 : stop - 1], out=out)
        else:
            out[0] = mask[0]
            np.subtract(mask[1:stop], mask[: stop - 1], out=out[1:])
        yield band[: stop - start]


def _chunk(kind: bytes, body: bytes) -> list[bytes]:
    """Return one PNG chunk in pieces; no empty IDAT, some readers stumble over it."""
    if kind == b"IDAT" and not body:
        return []
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return [struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum)]


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield (kind, body) of the chunks up to IEND, each with its checksum checked; nothing may follow it."""
    if data[: len(_SIGNATURE)] != _SIGNATURE:
        raise _damaged("it does not begin as a PNG")
    view, at = memoryview(data), len(_SIGNATURE)
    while at + 12 <= len(view):
        (length,) = struct.unpack_from(">I", view, at)
        end = at + 12 + length
        if end > len(view):
            break
        kind, body = bytes(view[at + 4 : at + 8]), view[at + 8 : end - 4]
        if struct.unpack_from(">I", view, end - 4)[0] != zlib.crc32(body, zlib.crc32(kind)):
            raise _damaged(f"a checksum is wrong at byte {at}")
        yield kind, body
        if kind == b"IEND":
            if end < len(view):
                raise _damaged(f"{len(view) - end} bytes follow its end")
            return
        at = end
    raise _damaged(f"it is cut off after {len(data)} bytes")


def _parse(data: bytes) -> tuple[int, int, bytes]:
    """Return height, width and the zlib stream."""
    chunks = _chunks(data)
    height, width = _parse_header(*next(chunks))
    return height, width, b"".join(body for kind, body in chunks if kind == b"IDAT")


def _parse_header(kind: bytes, body: memoryview) -> tuple[int, int]:
    if kind != b"IHDR" or len(body) != _HEADER.size:
        raise _damaged("its header is not where it belongs")
    width, height, *layout = _HEADER.unpack(body)
    if tuple(layout) != _GREY_8:
        raise _damaged("it is not 8-bit greyscale without interlacing")
    if not (1 <= width <= _MAX_SIDE_PX and 1 <= height <= _MAX_SIDE_PX):
        raise _damaged(f"its header says {height} x {width} pixels")
    return height, width


def _undo_up(rows: Array) -> Array:
    """Add each row to the one above, modulo 256."""
    mask: Array
    if rows.shape[1] < _NARROW_PX:
        mask = np.add.accumulate(rows, axis=0, dtype=np.uint8)
        return mask
    mask = np.empty(rows.shape, np.uint8)
    mask[0] = rows[0]
    for row in range(1, len(rows)):  # ten times accumulate's rate, which goes down one column after another
        np.add(mask[row - 1], rows[row], out=mask[row])
    return mask


def _unfilter(rows: Array, packed: bytes) -> Array:
    """Undo filters other than "up", which only other programs write."""
    if rows[:, 0].max() > 4:
        raise _damaged(f"a row has the unknown filter {int(rows[:, 0].max())}")
    from PIL import Image

    size = (rows.shape[1] - 1, rows.shape[0])
    try:
        return np.array(Image.frombytes("L", size, packed, "zip", "L"))
    except (ValueError, OSError) as error:
        raise _damaged(f"its rows cannot be decoded ({error})") from error


def _damaged(what: str) -> DamagedMask:
    return DamagedMask(f"damaged mask PNG: {what}")
