"""What one INPUT means: a glob, a folder, one object, a list file or a catalogue; and what folders hold."""

from __future__ import annotations

import io
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from segpipe.config.recipe import RUN_KEY
from segpipe.errors import InputError, ObjectMissing
from segpipe.rasters.scene import Version
from segpipe.rasters.scene_ids import RASTER_SUFFIXES, SHARD_SUFFIXES, has_suffix
from segpipe.rasters.shards import is_catalogue
from segpipe.rasters.templates import without_dots
from segpipe.storage import ObjectInfo, Storage, join_uri, open_object, open_storage, scheme_of, split_uri

SCENE_SUFFIXES: Final = RASTER_SUFFIXES + SHARD_SUFFIXES
_RUN_FILE_BYTES: Final = 1 << 24

NO_LISTING: Final = ("http", "https")
"""A page of links is no listing: it may be no page at all, or leave files out."""

Kind = Literal["listing", "object", "list_file", "catalogue"]


@dataclass(frozen=True, slots=True)
class Input:
    """One INPUT, looked at: what kind it is and where it lies."""

    text: str
    kind: Kind
    base: str
    """The folder that ids are relative to; for a single object the folder that holds it."""
    key: str = ""
    """Name below ``base`` of an object, a list file or a catalogue."""
    version: Version | None = None
    prefix: str = ""
    """What the keys of a listing begin with."""
    matches: Callable[[str], bool] = lambda key: True
    """Whether the glob matches a key of the listing."""
    any_suffix: bool = False
    """The user typed the suffix, so that others than the known ones are taken too."""

    @property
    def uri(self) -> str:
        return join_uri(self.base, self.key)


def classify_input(text: str) -> Input | None:
    """Find out what an INPUT is, by its name and by asking the store; None = nothing is there."""
    if not text.strip():
        raise InputError("an empty input", "inputs", "Name a file, a folder, a glob or a URI.")
    text = without_dots(text)
    if not text.endswith("/") and not _is_bucket(text):
        storage, key = open_object(text)
        found = storage.stat(key)
        if found is not None:
            version = Version(found.size_bytes, found.etag)
            return Input(text, _kind_of(join_uri(storage.root, key), version), storage.root, key, version)
    if scheme_of(text) in NO_LISTING:
        if not text.endswith("/") and not has_wildcard(text) and not _is_bucket(text):
            return None
        what = "a web server has no listing: its pages of links may leave files out"
        raise InputError(what, text, "Name the files, a list file or a catalogue.")
    if has_wildcard(text):
        return _glob(text)
    base = open_storage(text).root
    if next(open_storage(text).list(), None) is None:
        return None
    return Input(text, "listing", base)


def _is_bucket(text: str) -> bool:
    return scheme_of(text) not in ("file", "local") and "/" not in text.partition("://")[2].strip("/")


def _kind_of(uri: str, version: Version) -> Kind:
    if has_suffix(uri, (".txt",)):
        return "list_file"
    if has_suffix(uri, (".csv",)) or (has_suffix(uri, (".parquet",)) and is_catalogue(uri, version)):
        return "catalogue"
    return "object"


def has_wildcard(text: str) -> bool:
    return any(char in text for char in "*?[")


def _glob(text: str) -> Input:
    """Split a glob into its fixed folder, what names below begin with, and a test for the rest."""
    parts = text.split("/")
    first = next(index for index, part in enumerate(parts) if has_wildcard(part))
    base = "/".join(parts[:first]) or ("/" if text.startswith("/") else ".")
    if base.endswith(":/"):
        raise InputError("a glob over buckets cannot be listed", text, "Name the bucket.")
    below = parts[first:]
    prefix = re.split(r"[*?\[]", below[0], maxsplit=1)[0]
    pattern = glob_pattern("/".join(below), text)
    ending = re.split(r"[*?\]]", below[-1])[-1]
    root = open_storage(base).root
    return Input(
        text,
        "listing",
        root,
        prefix=prefix,
        matches=lambda key: pattern.fullmatch(key) is not None,
        any_suffix=bool(posixpath.splitext("x" + ending)[1]),
    )


def glob_pattern(glob: str, where: str) -> re.Pattern[str]:
    """A glob over keys as a regular expression: ``*`` and ``?`` stay within a part, ``**`` is any folders.

    ``[abc]``, ``[a-z]`` and ``[!a]`` are character sets; an unclosed "[" is itself.
    """
    parts = glob.split("/")
    out = []
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part == "**":
            out.append(".+" if last else "(?:[^/]+/)*")
        elif "**" in part:
            raise InputError(
                "** stands for whole folders only", where, "Write it between slashes: a/**/*.tif."
            )
        else:
            out.append(_part_pattern(part) + ("" if last else "/"))
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as error:
        raise InputError(f"the glob is broken: {error}", where, "Correct the [...] in it.") from None


def _part_pattern(part: str) -> str:
    out, index = "", 0
    while index < len(part):
        char = part[index]
        index += 1
        end = part.find("]", index + 1 + (part[index : index + 1] == "!")) if char == "[" else -1
        if char == "*":
            out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif end > 0:
            chars = part[index:end].replace("\\", r"\\").replace("[", r"\[")
            chars = f"^{chars[1:]}" if chars.startswith("!") else chars.replace("^", r"\^", 1)
            out += f"(?!/)[{chars}]"
            index = end + 1
        else:
            out += re.escape(char)
    return out


def list_objects(source: Input) -> Iterator[list[ObjectInfo]]:
    """Pages of all objects that a listing sees, wanted or not."""
    return open_storage(source.base).list(source.prefix)


def is_scene_file(key: str, source: Input) -> bool:
    """Whether a key of a listing is an image or a shard: right suffix, no sidecar, nothing hidden."""
    if any(part.startswith(".") for part in key.split("/")):
        return False
    if not source.any_suffix and not has_suffix(key, SCENE_SUFFIXES):
        return False
    return source.matches(key)


def is_run_file(storage: Storage, info: ObjectInfo) -> bool:
    """Whether an object of a listing is the run.json of a run or a training: others may use that name."""
    if info.key.rpartition("/")[2] != RUN_KEY or info.size_bytes > _RUN_FILE_BYTES:
        return False
    try:
        tree = json.loads(storage.read(info.key))
    except (ValueError, ObjectMissing):
        return False
    return isinstance(tree, dict) and "recipe_key" in tree


def list_file_lines(source: Input) -> Iterator[str]:
    """The paths or URIs of a list file, without comments and blank lines."""
    storage, key = open_object(source.uri)
    version = source.version
    with storage.open_range(
        key, version.etag if version else None, version.size_bytes if version else None
    ) as file:
        try:
            for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
                text = line.strip()
                if text and not text.startswith("#"):
                    yield text
        except UnicodeDecodeError:
            raise InputError(
                "a list file must be UTF-8 text", source.uri, "One path or URI a line."
            ) from None


def below(base: str, uri: str) -> str:
    """The path of ``uri`` below ``base``; its file name where it lies elsewhere."""
    start = base if base.endswith("/") else f"{base}/"
    return uri[len(start) :] if uri.startswith(start) else split_uri(uri)[1]
