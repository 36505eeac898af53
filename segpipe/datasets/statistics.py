"""Sums over samples that merge exactly: pixels of each class, and of each band its sum and squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from segpipe.config.card import IGNORE
from segpipe.datasets.layout import Sample
from segpipe.rasters.georeference import pixel_size_m

Array = np.ndarray[Any, Any]

_SIZE_TOLERANCE: Final = 1.1
_SIZE_DIGITS: Final = 4


@dataclass(slots=True)
class Sums:
    """Whole-number sums, exact and so equal in any order; of float images float64, added in shard order."""

    samples: int = 0
    dropped: int = 0
    """Samples that were left out: too little label."""
    valid_px: int = 0
    ignore_px: int = 0
    class_px: list[int] = field(default_factory=list)
    band_sum: list[float] = field(default_factory=list)
    band_squares: list[float] = field(default_factory=list)
    pixel_m_min: float | None = None
    """Least and greatest ground pixel size of the samples as stored, metres; None where none is known."""
    pixel_m_max: float | None = None
    pixel_m_unknown: int = 0
    """Samples whose ground pixel size is not known."""
    present_px: list[int] = field(default_factory=list)
    """Of each class the labelled pixels of all samples that hold it."""

    def add(self, sample: Sample, num_classes: int) -> None:
        """Count one sample."""
        counts = np.bincount(sample.label.ravel(), minlength=256)
        pixels = sample.pixels.reshape(len(sample.pixels), -1)
        if sample.valid is not None:
            pixels = pixels[:, sample.valid.ravel()]
        totals, squares = _moments(pixels)
        pixel_m = pixel_size_m(sample.crs, sample.transform, *sample.label.shape)
        class_px = [int(count) for count in counts[:num_classes]]
        labelled_px = sum(class_px)
        self.merge(
            Sums(
                samples=1,
                valid_px=pixels.shape[1],
                ignore_px=int(counts[IGNORE]),
                class_px=class_px,
                band_sum=totals,
                band_squares=squares,
                pixel_m_min=pixel_m,
                pixel_m_max=pixel_m,
                pixel_m_unknown=int(pixel_m is None),
                present_px=[labelled_px if px else 0 for px in class_px],
            )
        )

    def merge(self, other: Sums) -> None:
        """Add the sums of other samples."""
        self.samples += other.samples
        self.dropped += other.dropped
        self.valid_px += other.valid_px
        self.ignore_px += other.ignore_px
        self.class_px = _added(self.class_px, other.class_px)
        self.band_sum = _added(self.band_sum, other.band_sum)
        self.band_squares = _added(self.band_squares, other.band_squares)
        self.pixel_m_min = _extreme(min, self.pixel_m_min, other.pixel_m_min)
        self.pixel_m_max = _extreme(max, self.pixel_m_max, other.pixel_m_max)
        self.pixel_m_unknown += other.pixel_m_unknown
        self.present_px = _added(self.present_px, other.present_px)

    def common_pixel_m(self) -> float | None:
        """Ground pixel size of all samples, metres; None where they differ by over 10 % or one is unknown."""
        least, most = self.pixel_m_min, self.pixel_m_max
        if least is None or most is None or self.pixel_m_unknown or most > _SIZE_TOLERANCE * least:
            return None
        return float(f"{math.sqrt(least * most):.{_SIZE_DIGITS}g}")

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each band over its valid pixels; a constant band has the std 1."""
        count = self.valid_px
        if not count:
            return [0.0] * len(self.band_sum), [1.0] * len(self.band_sum)
        means = [total / count for total in self.band_sum]
        stds = []
        for total, squares in zip(self.band_sum, self.band_squares, strict=True):
            variance = (count * squares - total * total) / count**2  # of whole numbers: exact up to here
            stds.append(math.sqrt(variance) if variance > 0 else 1.0)
        return means, stds


def _moments(pixels: Array) -> tuple[list[float], list[float]]:
    """Sum and sum of squares of each row."""
    if pixels.dtype == np.uint8:
        values = np.arange(256, dtype=np.int64)
        tables = [np.bincount(band, minlength=256) for band in pixels]
        return [int(table @ values) for table in tables], [int(table @ values**2) for table in tables]
    wide = pixels.astype(np.int64 if pixels.dtype.kind in "iu" else np.float64)
    return [band.sum().item() for band in wide], [(band * band).sum().item() for band in wide]


def _extreme(choose: Callable[..., float], one: float | None, other: float | None) -> float | None:
    return choose((size for size in (one, other) if size is not None), default=None)


def _added(one: list[Any], other: list[Any]) -> list[Any]:
    if not one or not other:
        return list(one or other)
    return [a + b for a, b in zip(one, other, strict=True)]
