"""The two records that describe a scene: where it comes from, and what its header says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from segpipe.geometry.georef import Located

CHANGED_FIX: Final = "Run the same command again: it takes the new version."
"""What to do about a scene or shard that is not the planned version."""


@dataclass(frozen=True, slots=True)
class Version:
    """What pins an object's bytes: its size and etag (local files: size and modification time)."""

    size_bytes: int
    etag: str

    def __str__(self) -> str:
        return f"{self.size_bytes}:{self.etag}"

    @classmethod
    def parse(cls, text: str) -> Version:
        size, _, etag = text.partition(":")
        return cls(int(size), etag)


@dataclass(frozen=True, slots=True)
class SceneSource:
    """Where one scene, its label and its validity mask lie, pinned to a version.

    A member of an image shard has the shard's ``uri`` and ``version`` and says with ``member`` which
    image it is: a tar shard's member name with ``offset`` and ``length`` in bytes, a Parquet shard's
    row number in decimal.
    """

    scene_id: str
    uri: str
    version: Version
    label_uri: str | None = None
    label_version: Version | None = None
    valid_uri: str | None = None
    """A validity mask beside the scene (``NAME.msk`` or the template of ``input.valid``)."""
    valid_version: Version | None = None
    member: str | None = None
    offset: int | None = None
    length: int | None = None
    label_offset: int | None = None
    """Tar shards: where the label member's bytes start."""
    label_length: int | None = None
    shard_members: int | None = None
    """Members of the whole shard when it was listed."""
    datetime: str | None = None
    """Acquisition time from the catalogue; it wins over what the file's header says."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further catalogue columns, carried into the plan as they are."""

    @property
    def version_text(self) -> str:
        """The three versions as one string: the ``version`` column of plan and masks."""
        parts = (self.version, self.label_version, self.valid_version)
        return ";".join("" if part is None else str(part) for part in parts).rstrip(";")

    @property
    def where(self) -> str:
        """Name for messages."""
        return self.uri if self.member is None else f"{self.uri}!{self.member}"


@dataclass(frozen=True, slots=True)
class SceneHeader:
    """What planning reads of a scene; enough to cut it into blocks and to read windows later."""

    height: int
    width: int
    num_bands: int
    dtype: str
    """Pixel type of the chosen bands, one of ``PIXEL_DTYPES``."""
    driver: str
    """GDAL driver, found by content: GTiff, PNG, JPEG or WEBP."""
    bands: tuple[int, ...]
    """Chosen band numbers, from 1, in the model's order."""
    valid_source: str
    """What says which pixels are data: none, nodata, alpha, mask (internal) or sidecar."""
    file_block: tuple[int, int]
    """Height and width of the file's own tiles or strips, pixels."""
    strips: bool
    """The file is stored in full-width strips (or scanlines), not in tiles."""
    crs: str | None = None
    """``EPSG:n`` or WKT2."""
    transform: tuple[float, float, float, float, float, float] | None = None
    """Affine a, b, c, d, e, f: x = a col + b row + c, y = d col + e row + f."""
    pixel_m: float | None = None
    """Ground size of a pixel at the scene's centre, metres (square root of its ground area)."""
    datetime: str | None = None
    """Acquisition time, ISO 8601, where the file says it."""
    num_alpha_bands: int = 0
    """Of ``num_bands``; known while planning, not kept in the plan."""
    band_names: tuple[str, ...] = ()
    """Colours that the file gives the chosen bands, "" for none, where ``input.bands`` is auto; not kept."""

    @property
    def located(self) -> Located:
        """CRS and transform."""
        return self.crs, self.transform
