"""Which pixels are data: the rules of ``input.valid``, and their arithmetic.

A pixel is no data (``auto``) where the raster's mask, its alpha band or a mask sidecar is 0, where all chosen
bands equal the nodata value, or where a chosen band is NaN or infinite. The last holds under every rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from rasterio.enums import ColorInterp, MaskFlags

from segpipe.errors import SceneError
from segpipe.pages import block_zeros

Array = np.ndarray[Any, Any]

_CHUNK_PX: Final = 1 << 18  # comparisons of this many pixels stay in the processor's cache


@dataclass(frozen=True, slots=True)
class ValidityRule:
    """What to look at in one raster."""

    source: str
    """For the plan: mask, sidecar, alpha, nodata or none; the first of these that counts."""
    mask: bool = False
    """The raster's own mask (a TIFF's mask directory)."""
    alpha: int | None = None
    """Number of the alpha band; never one of the chosen bands."""
    nodata: tuple[float, ...] | None = None
    """Nodata value of each chosen band, as pixels of the raster's type can have it."""


def alpha_bands(dataset: Any) -> tuple[int, ...]:
    """Numbers of the bands that say they are alpha."""
    return tuple(
        number for number, meaning in enumerate(dataset.colorinterp, start=1) if meaning == ColorInterp.alpha
    )


def find_rule(dataset: Any, bands: Sequence[int], valid: str, has_sidecar: bool, where: str) -> ValidityRule:
    """The rule for a raster of which ``bands`` are chosen, under ``input.valid``.

    Raises `SceneError` ``valid_mask`` where ``valid`` asks for an alpha band or a sidecar that is not there.
    """
    alpha = next((number for number in alpha_bands(dataset) if number not in bands), None)
    has_nodata, nodata = _nodata_values(dataset, bands)
    if valid == "none":
        return ValidityRule("none")
    if valid == "nodata":
        return ValidityRule("nodata" if has_nodata else "none", nodata=nodata)
    if valid == "alpha":
        if alpha is None:
            fix = "Set input.valid to auto, or leave the scene out."
            raise SceneError("valid_mask", "it has no alpha band besides the chosen ones", where, fix)
        return ValidityRule("alpha", alpha=alpha)
    if valid != "auto":
        if not has_sidecar:
            fix = "Write the mask beside the scene, or change input.valid."
            raise SceneError("valid_mask", "there is no validity mask for it", where, fix)
        return ValidityRule("sidecar")
    flags = dataset.mask_flag_enums[bands[0] - 1]
    mask = MaskFlags.per_dataset in flags and not {MaskFlags.alpha, MaskFlags.nodata} & set(flags)
    found = {"mask": mask, "sidecar": has_sidecar, "alpha": alpha is not None, "nodata": has_nodata}
    source = next((name for name, there in found.items() if there), "none")
    return ValidityRule(source, mask, alpha, nodata)


def no_data_by_value(pixels: Array, nodata: Sequence[float] | None) -> Array | None:
    """Bool (height, width), true where all bands equal ``nodata`` or one is NaN or infinite; None = nowhere.

    ``pixels``: (bands, height, width) of any type of ``PIXEL_DTYPES``.
    """
    floats = pixels.dtype.kind == "f"
    if nodata is None and not floats:
        return None
    values = None if nodata is None else [pixels.dtype.type(value) for value in nodata]
    height, width = pixels.shape[1:]
    found: Array | None = None
    rows = max(1, _CHUNK_PX // max(1, width))
    for start in range(0, height, rows):
        part = pixels[:, start : start + rows]
        bad = _bad_rows(part, values, floats)
        if bad is not None and bad.any():
            if found is None:
                found = block_zeros((height, width), np.bool_)
            found[start : start + rows] = bad
    return found


def join_no_data(no_data: Array | None, mask: Array) -> Array | None:
    """``no_data`` or ``mask == 0``; None where that is nowhere."""
    zeros = np.equal(mask, 0, out=block_zeros(mask.shape, np.bool_))
    if not zeros.any():
        return no_data
    return zeros if no_data is None else np.logical_or(no_data, zeros, out=no_data)


def can_equal(dtype: Any, value: float) -> bool:
    """Whether a pixel of that type can equal ``value``: not -9999 in uint8, 0.5 in uint16, NaN, infinity."""
    kind = np.dtype(dtype)
    if not np.isfinite(value) or kind.kind not in "iuf":
        return False
    if kind.kind == "f":
        return True
    info = np.iinfo(kind)
    return bool(value == int(value) and info.min <= int(value) <= info.max)


def _bad_rows(part: Array, values: list[Any] | None, floats: bool) -> Array | None:
    bad: Array | None = None
    if values is not None:
        bad = part[0] == values[0]
        for band, value in zip(part[1:], values[1:], strict=True):
            bad &= band == value
    if floats:
        finite = np.isfinite(part[0])
        for band in part[1:]:
            finite &= np.isfinite(band)
        np.logical_not(finite, out=finite)
        bad = finite if bad is None else bad | finite
    return bad


def _nodata_values(dataset: Any, bands: Sequence[int]) -> tuple[bool, tuple[float, ...] | None]:
    """Whether nodata is declared in a way that counts, and the value of each chosen band to compare with.

    NaN counts but is not compared: it has its own rule. A band without a value, or with one that none of its
    pixels can have, ends the rule. ``NODATA_VALUES`` is what GDAL calls one value a band, such as the
    transparent colour of an RGB PNG.
    """
    words = dataset.tags().get("NODATA_VALUES", "").split()
    values: list[float | None] = list(dataset.nodatavals)
    if len(words) == dataset.count:
        try:
            values = [float(word) for word in words]
        except ValueError:
            return False, None
    chosen = [value for value in (values[number - 1] for number in bands) if value is not None]
    if len(chosen) == len(bands) and all(
        can_equal(dataset.dtypes[number - 1], value) for number, value in zip(bands, chosen, strict=True)
    ):
        return True, tuple(chosen)
    floats = all(np.dtype(dataset.dtypes[number - 1]).kind == "f" for number in bands)
    return floats and any(np.isnan(value) for value in chosen), None
