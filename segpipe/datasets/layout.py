"""The protocol of a layout: what it lists, and how one sample is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from segpipe.config.card import ClassInfo
from segpipe.errors import InputError
from segpipe.geometry.georef import Transform
from segpipe.geometry.grid import Window
from segpipe.rasters.scene import SceneSource
from segpipe.wording import counted, few

Array = np.ndarray[Any, Any]

LEFT_OUT: Final = ""
"""The split of a sample that is listed but left out: an excluded area, ground of two splits."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One sample as listed: no pixel is read yet."""

    sample_id: str
    split: str
    scene: SceneSource
    """Where image and label lie, with their versions."""
    size_bytes: int
    """About what the encoded image takes: shards are cut by it."""
    window: Window | None = None
    """The part of the scene; None = all of it."""
    payload: Any = None
    """What else the layout must know to make the label; JSON-ready, part of the shard's key."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as stored, with its pixels for the statistics."""

    image: bytes
    """Encoded image of exactly the bands of ``pixels``."""
    suffix: str
    """What a file of these bytes is called: png, jpg, webp or tif."""
    pixels: Array
    """(bands, height, width)."""
    valid: Array | None
    """bool (height, width), false = no data; None = all are data."""
    label: Array
    """uint8 (height, width): class index, 255 = ignore."""
    window: Window
    crs: str | None = None
    transform: Transform | None = None
    """Affine a..f of the sample's own pixel grid."""


class Layout(Protocol):
    """One way in which a data set lies on storage. Instances pickle: samples are read by workers."""

    @property
    def classes(self) -> Sequence[ClassInfo]:
        """The classes; an index is its place."""

    @property
    def expands(self) -> bool:
        """A listed scene becomes several samples: ``expand`` reads its header."""

    def listing(self) -> Iterator[SampleRef]:
        """All samples (or scenes, where ``expands``), without reading pixels. Raises `InputError`."""

    def expand(self, ref: SampleRef) -> list[SampleRef]:
        """The samples of one listed scene; the split of those that are left out is ``LEFT_OUT``."""

    def read(self, ref: SampleRef) -> Sample | None:
        """Read one sample; None = it is left out. Raises `SceneError` for a sample that is faulty."""

    def reading(self) -> AbstractContextManager[Callable[[SampleRef], Sample | None]]:
        """Give a function that does what `read` does, for one thread; it may keep files open till its end."""


class _Reads(Protocol):
    def read(self, ref: SampleRef) -> Sample | None: ...


class ReadsAlone:
    """A layout that lists its samples one by one. They share no file: nothing is kept open between them."""

    expands = False

    def expand(self, ref: SampleRef) -> list[SampleRef]:
        """The sample itself."""
        return [ref]

    def reading(self: _Reads) -> AbstractContextManager[Callable[[SampleRef], Sample | None]]:
        """See `Layout`."""
        return nullcontext(self.read)


def refuse_missing(missing: Sequence[str], what: str, where: str) -> None:
    """Raise `InputError` with the first few names where something is missing."""
    if missing:
        raise InputError(
            f"no {what} for {counted(len(missing), 'listed sample')}: {few(missing)}",
            where,
            "Complete the data, or take them off the list.",
        )
