"""Names of scenes: how they follow from a path, and what they may be."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from typing import Final

from segpipe.errors import InputError

RASTER_SUFFIXES: Final = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".webp")
SHARD_SUFFIXES: Final = (".tar", ".parquet")
MAX_ID_BYTES: Final = 1024
"""Longest key of an object in S3."""

_FIX: Final = "Give a catalogue (CSV or Parquet) with a scene_id column that names it otherwise."


def scene_id_of(path: str) -> str:
    """The id that follows from a relative path: without its suffix, "/" kept as separator."""
    return posixpath.splitext(path)[0]


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a name ends with one of the (lower-case) suffixes, in any case."""
    return name.lower().endswith(suffixes)


def check_scene_id(scene_id: str, where: str) -> str:
    """``scene_id`` itself, or ``InputError`` naming ``where`` if no file and no object may be called so.

    Refused: what climbs out (``..``, a leading "/"), empty parts, parts that begin with a dot, backslashes,
    control characters, text that is not valid Unicode, more than MAX_ID_BYTES bytes of UTF-8.
    """
    fault = _fault(scene_id)
    if fault:
        raise InputError(f"the scene id {scene_id[:200]!r} {fault}", printable(where), _FIX)
    return scene_id


def _fault(scene_id: str) -> str:
    try:
        num_bytes = len(scene_id.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if num_bytes > MAX_ID_BYTES:
        return f"is longer than {MAX_ID_BYTES} bytes"
    if "\\" in scene_id or any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in scene_id):
        return "holds a backslash or a control character"
    for part in scene_id.split("/"):
        if not part or part.isspace():
            return "has an empty part"
        if part == "..":
            return "climbs out of its folder"
        if part.startswith("."):
            return "has a part that begins with a dot"
    return ""


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: a file's name may hold bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def fold_id(scene_id: str) -> str:
    """What two ids share when some file systems take them for one: case and Unicode composition set aside."""
    if scene_id.isascii():
        return scene_id.lower()  # the same, at a fraction of the cost
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", scene_id).casefold())


def printable(text: str) -> str:
    """``text`` with bytes that are no Unicode (from a file name) shown as escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")
