"""The one door to bytes: local files, S3 and any fsspec store behind one small protocol."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Final

from segpipe.storage.api import ObjectInfo, Storage
from segpipe.storage.local import LocalStorage
from segpipe.storage.uris import join_uri, normalize_root, scheme_of, split_uri

__all__ = [
    "ObjectInfo",
    "Storage",
    "join_uri",
    "open_object",
    "open_storage",
    "read_uri",
    "scheme_of",
    "split_uri",
]

_MAX_OPEN: Final = 256
_open: OrderedDict[tuple[str, int, str], Storage] = OrderedDict()
_lock = threading.Lock()


def open_storage(uri: str) -> Storage:
    """The storage below a folder or prefix: plain path, ``file://``, ``s3://``, ``memory://``, ``gs://``, ...

    Nothing is asked of the store and nothing is made. Instances are kept for this process, so opening again
    is cheap. Raises ``InputError`` for a URI that cannot be opened or that carries credentials.
    """
    root = normalize_root(uri)
    scheme = scheme_of(root)
    environment = ""
    if scheme == "s3":
        from segpipe.storage.s3client import environment_digest

        environment = environment_digest()
    key = (root, os.getpid(), environment)
    with _lock:
        found = _open.get(key)
        if found is None:
            found = _open[key] = _make(root, scheme)
            if len(_open) > _MAX_OPEN:
                _open.popitem(last=False)
        else:
            _open.move_to_end(key)
    return found


def _make(root: str, scheme: str) -> Storage:
    if scheme == "file":
        return LocalStorage(root)
    if scheme == "s3":
        from segpipe.storage.remote import S3Storage  # its imports take half a second

        return S3Storage(root)
    from segpipe.storage.generic import FsspecStorage

    return FsspecStorage(root)


def open_object(uri: str) -> tuple[Storage, str]:
    """The storage of the folder that holds the object, and the object's key in it."""
    root, key = split_uri(uri)
    return open_storage(root), key


def read_uri(uri: str) -> bytes:
    """The whole object under a URI. Raises ``ObjectMissing`` and what ``Storage.read`` raises."""
    storage, key = open_object(uri)
    return storage.read(key)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent's may be held by a thread that the child has not
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)
