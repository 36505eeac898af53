"""Image shards: WebDataset tar files and Parquet files of encoded images, read in place, never extracted."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from segpipe.errors import InputError, ObjectChanged, ObjectMissing, SceneError
from segpipe.rasters.parquet_shards import FIX, list_parquet, parquet_columns, read_cell
from segpipe.rasters.scene import CHANGED_FIX, SceneSource, Version
from segpipe.rasters.scene_ids import RASTER_SUFFIXES, has_suffix
from segpipe.storage import open_object

LABEL_EXTENSIONS: Final = tuple(
    f"{name}{suffix}" for name in ("label", "mask", "seg") for suffix in (".png", ".tif", ".tiff", ".webp")
)
IMAGE_EXTENSIONS: Final = tuple(suffix[1:] for suffix in RASTER_SUFFIXES)

MAX_MEMBER_BYTES: Final = 1 << 30
"""Most bytes of one encoded image in a tar: members are read whole."""

_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a shard, as listed."""

    key: str
    """Name of the scene inside its shard."""
    member: str
    """What SceneSource.member becomes: a tar member's name, a Parquet row's number."""
    offset: int | None = None
    """Place of the encoded image in a tar, bytes."""
    length: int | None = None
    has_label: bool = False
    label_offset: int | None = None
    label_length: int | None = None


def is_catalogue(uri: str, version: Version) -> bool:
    """Whether a Parquet file is a catalogue: it has a ``uri`` column. ``InputError`` for no Parquet."""
    return "uri" in parquet_columns(uri, version)


def list_members(uri: str, version: Version) -> Iterator[Member]:
    """The images of a shard in the shard's order. Raises ``InputError`` for one that is damaged or unsafe."""
    if not has_suffix(uri, (".tar",)):
        for row in list_parquet(uri, version):
            yield Member(row.key, str(row.number), has_label=row.has_label)
        return
    yield from _list_tar(uri, version)


def read_member(source: SceneSource) -> bytes:
    """The encoded image of a shard's member.

    Raises ``SceneError``: not_found, scene_changed, shard_count (a Parquet shard with another row count than
    was planned), limit, decode; and ``StorageError`` for a fault that may pass.
    """
    return _read(source, source.offset, source.length, "image")


def read_label_member(source: SceneSource) -> bytes | None:
    """The encoded label that lies in the same shard; None where the shard holds none for this member.

    Raises what ``read_member`` raises, with kind label_read for a label that cannot be read.
    """
    if source.member is None or source.label_uri != source.uri:
        return None
    if source.offset is not None and source.label_offset is None:
        return None
    try:
        return _read(source, source.label_offset, source.label_length, "label")
    except SceneError as error:
        if error.kind in ("scene_changed", "shard_count"):
            raise
        raise SceneError("label_read", error.what, error.where, error.fix) from error


def _read(source: SceneSource, offset: int | None, length: int | None, role: str) -> bytes:
    if source.member is None:
        raise ValueError(f"{source.uri} is no member of a shard")
    try:
        if source.offset is None:
            return read_cell(
                source.uri, source.version, int(source.member), source.shard_members, role, source.where
            )
        if (length or 0) > MAX_MEMBER_BYTES:
            what = f"the {role} has {length:,} bytes, the limit in a shard is {MAX_MEMBER_BYTES:,}"
            raise SceneError("limit", what, source.where, "Keep it as a GeoTIFF of its own.")
        storage, key = open_object(source.uri)
        data = storage.read_range(key, offset or 0, length or 0, source.version.etag)
    except ObjectChanged:
        what = "the shard changed since it was planned"
        raise SceneError("scene_changed", what, source.where, CHANGED_FIX) from None
    except ObjectMissing:
        raise SceneError(
            "not_found", "the shard is gone", source.uri, "Put it back, or leave it out."
        ) from None
    if len(data) != length:
        what = f"{len(data)} bytes instead of {length}: the shard is cut short"
        raise SceneError("decode", what, source.where, "Copy the shard again, or leave it out.")
    return data


def _list_tar(uri: str, version: Version) -> Iterator[Member]:
    """Group the members of a tar by key: the name up to the first dot of its last part."""
    storage, name = open_object(uri)
    num_images = 0
    group = _Group(uri, "")
    with storage.open_range(name, version.etag, version.size_bytes) as file:
        for info in _tar_headers(file, uri):
            path = _safe_name(info, uri)
            folder, slash, base = path.rpartition("/")
            if not info.isreg() or base.startswith("."):
                continue
            stem, _, extension = base.partition(".")
            if folder + slash + stem != group.key:
                yield from (members := group.finish())
                num_images += len(members)
                group = _Group(uri, folder + slash + stem)
            group.add(info, extension.lower())
        yield from (members := group.finish())
    if not num_images + len(members):
        raise InputError("the shard holds no image (png, jpg, jpeg, webp, tif, tiff)", uri, FIX)


class _Group:
    """The members of one key, one after the other in the tar."""

    def __init__(self, uri: str, key: str) -> None:
        self.uri, self.key = uri, key
        self.image: tarfile.TarInfo | None = None
        self.label: tarfile.TarInfo | None = None
        self.other = ""

    def add(self, info: tarfile.TarInfo, extension: str) -> None:
        if extension in IMAGE_EXTENSIONS:
            if self.image is not None:
                raise self._doubled("images", self.image, info)
            self.image = info
        elif extension in LABEL_EXTENSIONS:
            if self.label is not None:
                raise self._doubled("labels", self.label, info)
            self.label = info
        elif has_suffix(extension, RASTER_SUFFIXES):
            self.other = info.name

    def _doubled(self, what: str, first: tarfile.TarInfo, second: tarfile.TarInfo) -> InputError:
        return InputError(f"two {what} with one key: {first.name!r} and {second.name!r}", self.uri, FIX)

    def finish(self) -> list[Member]:
        """The group as a member; none where it is only text or other data."""
        if self.image is None:
            if self.other or self.label is not None:
                name = self.other or (self.label.name if self.label else "")
                fix = "The key ends at the first dot of the name: rename it to KEY.png, or take it out."
                raise InputError(f"the member {name!r} has no image with its key", self.uri, fix)
            return []
        label = self.label
        return [
            Member(
                self.key,
                self.image.name,
                self.image.offset_data,
                self.image.size,
                label is not None,
                label.offset_data if label else None,
                label.size if label else None,
            )
        ]


def _tar_headers(file: BinaryIO, uri: str) -> Iterator[tarfile.TarInfo]:
    """All headers of an uncompressed tar; contents are skipped. A tar without its end is cut short."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # TarFile keeps them all: memory would grow with the shard
                yield info
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise InputError("the shard is cut short or damaged: its end mark is missing", uri, FIX)
    except tarfile.TarError as error:
        raise InputError(f"no valid tar: {error}", uri, FIX) from None


def _safe_name(info: tarfile.TarInfo, uri: str) -> str:
    """The member's name without "./". Links, devices, sparse files and names that climb out are refused."""
    name = info.name.removeprefix("./")
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise InputError(f"the member {info.name!r} is a link, a device or a sparse file", uri, FIX)
    if name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise InputError(f"the member name {info.name!r} climbs out of the shard", uri, FIX)
    return name
