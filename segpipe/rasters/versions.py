"""Pinning: scenes, labels and masks get the version that is there now, by listings where that is cheaper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from segpipe.errors import InputError, StorageRefused
from segpipe.rasters.listing import NO_LISTING
from segpipe.rasters.scene import Version
from segpipe.rasters.scene_ids import printable
from segpipe.rasters.spool import Role, Spool
from segpipe.storage import open_object, open_storage, scheme_of
from segpipe.wording import few

_THREADS: Final = 16
_LIST_FROM: Final = 50
"""Objects wanted in one remote folder from which listing it beats asking for each."""
_SHOWN: Final = 5


@dataclass(slots=True)
class Missing:
    """What was not there: the count and the first few."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)
    """(scene id, uri)."""

    def add(self, scene_id: str, uri: str) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append((scene_id, printable(uri)))

    def text(self, with_ids: bool) -> str:
        items = [f"{uri} (scene {scene_id!r})" if with_ids else uri for scene_id, uri in self.first]
        return few(items, _SHOWN, total=self.count)


def pin_versions(spool: Spool, role: Role, seen: list[str]) -> Missing:
    """Give each object of a role its version; returns those that are not there.

    ``seen``: beginnings of URIs below which every object that may be wanted stands in the spool; folders
    listed here are added. An optional mask that is not there is taken out of its scene silently.
    """
    missing = Missing()
    for folder, count in spool.crowded_folders(role, _LIST_FROM):
        start = f"{folder}/"
        if scheme_of(folder) in NO_LISTING:
            continue
        if not start.startswith(tuple(seen)) and _list_into(spool, folder, 4 * count + 10_000):
            seen.append(start)
    with ThreadPoolExecutor(_THREADS) as pool:
        for page in spool.unpinned(role):
            beginnings = tuple(seen)
            asked: dict[str, bool] = {}  # by URI, whether it may be lacking
            for _, _, uri, optional, known in page:
                if known is None and not uri.startswith(beginnings):
                    asked[uri] = role == "valid" and optional and asked.get(uri, True)
            answers = dict(zip(asked, _ask(asked, pool), strict=True))
            pinned, absent = [], []
            for n, scene_id, uri, optional, known in page:
                version = known or answers.get(uri)
                if version is not None:
                    pinned.append((n, version))
                    continue
                absent.append(n)
                if role != "valid" or not optional:
                    missing.add(scene_id, uri)
            spool.pin(role, pinned, absent if role == "valid" else ())
    return missing


def _list_into(spool: Spool, folder: str, most: int) -> bool:
    """List a folder into the spool.

    False where it may not be listed, or holds so much more that asking one by one is better.
    """
    count = 0
    storage = open_storage(folder)
    try:
        for page in storage.list():
            spool.add_objects(storage.root, page)
            count += len(page)
            if count > most:
                return False
    except StorageRefused:  # what is public to read need not be public to list
        return False
    return True


def _ask(asked: Mapping[str, bool], pool: ThreadPoolExecutor) -> Iterator[Version | None]:
    """The version of each, in order; remote ones side by side."""
    if any(scheme_of(uri) != "file" for uri in asked):
        return pool.map(_version, asked.keys(), asked.values())
    return map(_version, asked.keys(), asked.values())


def _version(uri: str, optional: bool) -> Version | None:
    try:
        return _stat(uri)
    except StorageRefused:
        # S3 says 403 for what is not there to those who may not list; a local refusal tells of a file.
        if optional and scheme_of(uri) != "file":
            return None
        raise
    except InputError:  # a long name has no room for a suffix
        if optional:
            return None
        raise


def _stat(uri: str) -> Version | None:
    storage, key = open_object(uri)
    found = storage.stat(key)
    return None if found is None else Version(found.size_bytes, found.etag)
