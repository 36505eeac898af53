"""Taking URIs apart. Plain paths and ``file://`` become absolute local paths; nothing is asked of a store."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from segpipe.errors import InputError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
_CHAIN = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*::|^[^/]*://.*::[A-Za-z][A-Za-z0-9+.\-]*://")
_SECRET = re.compile(
    r"[?&]([^=&]*)(sig|signature|token|secret|password|credential|accesskey|apikey)[^=&]*=", re.I
)


def scheme_of(uri: str) -> str:
    """The scheme in lower case; "file" for a plain path."""
    match = _SCHEME.match(uri)
    return match.group(1).lower() if match else "file"


def normalize_root(uri: str) -> str:
    """``uri`` as a root: an absolute path or ``scheme://...``, without a slash at its end.

    Raises ``InputError`` for an empty URI, one that carries credentials (it is not repeated in the message)
    and a chain of several file systems.
    """
    if not uri or "\0" in uri:
        what = "a path with a zero byte" if uri else "an empty path"
        raise InputError(what, "", "Name a folder, a file or a URI such as s3://bucket/prefix.")
    match = _SCHEME.match(uri)
    if match is None:
        if "://" in uri and _CHAIN.match(uri):
            raise InputError("a chain of file systems (a::b) cannot be opened", "", "Give one plain URI.")
        return os.path.abspath(uri)
    scheme, rest = match.group(1).lower(), uri[match.end() :]
    if _CHAIN.match(uri):
        raise InputError("a chain of file systems (a::b) cannot be opened", "", "Give one plain URI.")
    if "@" in rest.split("/", 1)[0] or _SECRET.search(rest):
        raise InputError(
            f"a {scheme}:// URI carries credentials",
            "",
            "Take them out and set them in the environment, such as AWS_ACCESS_KEY_ID.",
        )
    if scheme in ("file", "local"):
        return _file_path(rest)
    if scheme in ("s3", "s3a"):
        scheme = "s3"
    return f"{scheme}://{rest.rstrip('/')}"


def _file_path(rest: str) -> str:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise InputError(f"file://{rest} names another machine", "", "Write file:///absolute/path.")
    return os.path.abspath("/" + unquote(path))


def join_uri(root: str, key: str) -> str:
    """The URI of ``key`` below ``root``; an empty key gives the root."""
    if not key:
        return root
    return root + key if root.endswith("/") else f"{root}/{key}"


def split_uri(uri: str) -> tuple[str, str]:
    """(root, key) of one object: ``s3://b/a/c.tif`` -> (``s3://b/a``, ``c.tif``).

    A local path gives an absolute root. Raises ``InputError`` where the URI names no object.
    """
    if uri.endswith("/"):
        raise InputError(f"{normalize_root(uri)}/ is a folder", "", "Name an object in it.")
    whole = normalize_root(uri)
    match = _SCHEME.match(whole)
    start = match.end() if match else 0
    folder, slash, name = whole[start:].rpartition("/")
    if scheme_of(whole) != "memory" and (not slash or (match and not folder)):
        raise InputError(f"{whole} names no object", "", "Add the object's name, as in s3://bucket/name.")
    if not name:
        raise InputError(f"{whole} names no object", "", "Add the object's name.")
    return (whole[:start] + folder if match or folder else "/"), name
