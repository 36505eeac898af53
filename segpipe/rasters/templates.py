"""Templates of labels and validity masks: ``{stem}``, ``{parent}`` and ``{scene_id}`` filled in per scene."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Final

from segpipe.errors import ConfigError, InputError
from segpipe.rasters.scene_ids import scene_id_of
from segpipe.storage import join_uri, scheme_of, split_uri
from segpipe.storage.uris import normalize_root

FIELDS: Final = ("stem", "parent", "scene_id")


@dataclass(frozen=True, slots=True)
class PathTemplate:
    """Where the file that belongs to a scene lies.

    ``{stem}`` is the scene's file name (for a member of a shard: its key) without suffix, ``{parent}`` the
    folder of its file. A template that is a bare file name lies beside the scene; another relative one is
    taken from the current folder.
    """

    text: str
    pieces: tuple[tuple[str, str], ...]
    """(literal text, field or "") pairs."""
    beside: bool

    def fill(self, scene_id: str, uri: str, member: str | None = None) -> str:
        """The URI for one scene. Raises ``InputError`` where it climbs out of its bucket."""
        parent, name = split_uri(uri)
        stem = scene_id_of(name) if member is None else member.rpartition("/")[2]
        values = {"stem": stem, "parent": parent, "scene_id": scene_id, "": ""}
        text = "".join(literal + values[name] for literal, name in self.pieces)
        return resolve_uri(text, parent if self.beside else "")


def parse_template(text: str, key: str) -> PathTemplate:
    """Raises ``ConfigError`` naming the config's ``key`` for anything but plain known fields."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"the template {text!r} is broken: {error}", key, _fields_hint()) from None
    pieces = []
    for literal, name, spec, conversion in parsed:
        if name is not None and (name not in FIELDS or spec or conversion):
            raise ConfigError(f"the template {text!r} has the unknown field {{{name}}}", key, _fields_hint())
        pieces.append((literal, name or ""))
    if not any(name for _, name in pieces):
        raise ConfigError(f"the template {text!r} names one file for all scenes", key, _fields_hint())
    rooted = any(name in ("parent", "scene_id") for _, name in pieces)
    return PathTemplate(text, tuple(pieces), beside="/" not in text and not rooted)


def resolve_uri(text: str, folder: str) -> str:
    """``text`` as a full URI, with ``.`` and ``..`` resolved; a relative one lies below ``folder``.

    An empty ``folder`` is the current one. Raises ``InputError`` for a URI that names no object, climbs out
    of its bucket or carries credentials.
    """
    if folder and scheme_of(text) == "file" and "://" not in text and not text.startswith("/"):
        text = join_uri(folder, text)
    return join_uri(*split_uri(without_dots(text)))


def without_dots(uri: str) -> str:
    """A remote URI with ``.`` and ``..`` resolved; a local path as it is, for the system resolves those.

    Raises ``InputError`` where it climbs out of its bucket, or carries credentials, which are not repeated.
    """
    scheme, _, rest = uri.partition("://")
    if not rest or scheme_of(uri) in ("file", "local"):
        return uri
    normalize_root(uri)  # before any message names it
    parts: list[str] = []
    for part in rest.split("/"):
        if part == "..":
            if len(parts) < 2:  # the bucket stays
                raise InputError("the path climbs out of its bucket", uri, "Take out a '..'.")
            parts.pop()
        elif part != ".":
            parts.append(part)
    return f"{scheme}://{'/'.join(parts)}"


def _fields_hint() -> str:
    return "Use {stem}, {parent} or {scene_id}, as in {parent}/{stem}_mask.tif."
