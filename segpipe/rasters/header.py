"""What planning must know of a scene, from its header alone: no pixel is decoded here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import numpy as np
from rasterio.enums import Interleaving

from segpipe.config.card import PIXEL_DTYPES
from segpipe.config.model import InputConfig, LimitsConfig
from segpipe.errors import SceneError
from segpipe.rasters import georeference, shards
from segpipe.rasters.band_names import band_names
from segpipe.rasters.driver import Raster, faults_as, open_raster, open_raster_bytes
from segpipe.rasters.palette import has_palette
from segpipe.rasters.scene import SceneHeader, SceneSource
from segpipe.rasters.validity import ValidityRule, alpha_bands, find_rule
from segpipe.wording import counted

MAX_SIDE_PX: Final = 1 << 22
"""Longest side of a scene: tiles are listed axis by axis, so no header of one endless row may pass."""

_PALETTE_BANDS: Final = (1, 1, 1)
_TIME_TAGS: Final = ("ACQUISITIONDATETIME", "EXIF_DateTimeOriginal", "TIFFTAG_DATETIME", "EXIF_DateTime")


def inspect_scene(source: SceneSource, num_bands: int, config: InputConfig) -> SceneHeader:
    """Read the header of one scene for a model of ``num_bands`` bands.

    Raises `SceneError`: ``not_found``, ``not_raster``, ``header``, ``limit``, ``bands``, ``dtype``,
    ``valid_mask``, ``scene_changed``, ``shard_count``. A fault of the storage is raised as itself.
    """
    with open_source(source) as raster:
        header = raster.call("header", lambda dataset: _header(dataset, raster, source, num_bands, config))
    if uses_sidecar(source, config):
        open_sidecar(source, header.height, header.width, config.limits).close()
    return header


def open_source(source: SceneSource) -> Raster:
    """The scene's own raster, from its file or out of its image shard."""
    if source.member is None:
        return open_raster(source.uri, source.version)
    return open_raster_bytes(shards.read_member(source), source.where)


def check_limits(dataset: Any, driver: str, where: str, limits: LimitsConfig) -> tuple[int, int]:
    """Hold the header against ``limits``; return the file block's height and width.

    A WebP image is decoded as a whole: it is one block. Raises `SceneError` ``limit``.
    """
    height, width = dataset.height, dataset.width
    if height * width > limits.scene_px:
        size = f"{height} x {width} = {height * width:,} pixels"
        what = f"its header claims {size}, the limit is {limits.scene_px:,.0f}"
        raise SceneError("limit", what, where, "Raise limits.scene_px if that is true.")
    if max(height, width) > MAX_SIDE_PX:
        what = f"its header claims {height} x {width} pixels, the longest side may have {MAX_SIDE_PX:,}"
        raise SceneError("limit", what, where, "Cut it into several scenes.")
    block_h, block_w = (height, width) if driver == "WEBP" else dataset.block_shapes[0]
    together = dataset.count if driver != "GTiff" or _is_pixel_interleaved(dataset) else 1
    size = block_h * block_w * together * max(np.dtype(_plain(name)).itemsize for name in dataset.dtypes)
    if size > limits.file_block_bytes:
        what = (
            f"one tile or strip of it decodes to {block_h} x {block_w} pixels = {size:,} bytes, "
            f"the limit is {limits.file_block_bytes:,}"
        )
        fix = "Write it with smaller tiles, or raise limits.file_block_bytes."
        raise SceneError("limit", what, where, fix)
    return int(block_h), int(block_w)


def is_palette(header: SceneHeader, config: InputConfig) -> bool:
    """The scene is an indexed image whose colours are the model's three bands."""
    return config.bands == "auto" and header.num_bands == 1 and header.bands == _PALETTE_BANDS


def uses_sidecar(source: SceneSource, config: InputConfig) -> bool:
    """Whether a mask beside the scene is used: with ``auto``, or with a template."""
    return source.valid_uri is not None and config.valid not in ("none", "nodata", "alpha")


def open_sidecar(source: SceneSource, height: int, width: int, limits: LimitsConfig) -> Raster:
    """The validity mask beside the scene. Raises `SceneError` ``valid_mask``."""
    if source.valid_uri is None:
        raise ValueError("the scene has no validity mask")
    with faults_as("valid_mask"):
        raster = open_raster(source.valid_uri, source.valid_version)
        try:
            raster.call("header", lambda dataset: check_limits(dataset, raster.driver, raster.where, limits))
            size = raster.call("header", lambda dataset: (dataset.height, dataset.width))
            if size != (height, width):
                what = f"the validity mask has {size[0]} x {size[1]} pixels, the scene {height} x {width}"
                raise SceneError("valid_mask", what, raster.where, "Write the mask on the scene's own grid.")
        except BaseException:
            raster.close()
            raise
    return raster


def find_rule_of(
    dataset: Any, bands: Sequence[int], source: SceneSource, config: InputConfig
) -> ValidityRule:
    """The validity rule of a scene of which ``bands`` are chosen."""
    return find_rule(dataset, bands, config.valid, source.valid_uri is not None, source.where)


def _header(
    dataset: Any, raster: Raster, source: SceneSource, num_bands: int, config: InputConfig
) -> SceneHeader:
    file_block = check_limits(dataset, raster.driver, source.where, config.limits)
    bands = _choose_bands(dataset, num_bands, config, source.where)
    colours = config.bands == "auto" and bands == _PALETTE_BANDS
    dtype = "uint8" if colours else _dtype(dataset, bands, source.where)
    rule = find_rule_of(dataset, bands, source, config)
    crs, transform = georeference.of_dataset(dataset)
    if transform is None and source.member is None:
        crs, transform = georeference.of_sidecar(source.uri)
    height, width = dataset.height, dataset.width
    return SceneHeader(
        height=height,
        width=width,
        num_bands=dataset.count,
        dtype=dtype,
        driver=raster.driver,
        bands=bands,
        valid_source=rule.source,
        file_block=file_block,
        strips=file_block[1] == width,
        crs=crs,
        transform=transform,
        pixel_m=georeference.pixel_size_m(crs, transform, height, width),
        datetime=_datetime(dataset),
        num_alpha_bands=len(alpha_bands(dataset)),
        band_names=band_names(dataset, bands) if config.bands == "auto" and not colours else (),
    )


def _choose_bands(dataset: Any, num_bands: int, config: InputConfig, where: str) -> tuple[int, ...]:
    count = dataset.count
    if config.bands != "auto":
        chosen = tuple(config.bands)
        if len(chosen) != num_bands:
            what = f"input.bands names {counted(len(chosen), 'band')}, {_wanted(num_bands)}"
            raise SceneError("bands", what, where, "Name as many as are wanted.")
        if max(chosen) > count:
            what = f"input.bands names band {max(chosen)}, the file has {count}"
            raise SceneError("bands", what, where, "Correct input.bands, or leave the scene out.")
        return chosen
    if num_bands == 3 and has_palette(dataset):
        return _PALETTE_BANDS
    alpha = alpha_bands(dataset)
    colour = [number for number in range(1, count + 1) if number not in alpha]
    if len(colour) < num_bands:
        besides = f" besides alpha (band {alpha[0]})" if alpha else ""
        what = f"it has {counted(len(colour), 'band')}{besides}, {_wanted(num_bands)}"
        fix = "Leave the scene out."
        if count >= num_bands:
            numbers = ", ".join(str(number) for number in range(1, num_bands + 1))
            fix = f"If that band is no alpha, set input.bands: [{numbers}]."
        raise SceneError("bands", what, where, fix)
    return tuple(colour[:num_bands])


def _wanted(num_bands: int) -> str:
    return f"{num_bands} {'is' if num_bands == 1 else 'are'} wanted"


def _dtype(dataset: Any, bands: Sequence[int], where: str) -> str:
    names = {str(dataset.dtypes[number - 1]) for number in bands}
    bits = min(int(dataset.tags(number, ns="IMAGE_STRUCTURE").get("NBITS", "8")) for number in bands)
    if bits < 8:
        names = {f"{bits}-bit"}
    if len(names) != 1 or not names <= set(PIXEL_DTYPES):
        what = f"its pixels are {' and '.join(sorted(names))}, not one of {', '.join(PIXEL_DTYPES)}"
        raise SceneError("dtype", what, where, "Convert it, or leave it out.")
    return names.pop()


def _plain(name: str) -> str:
    """numpy's name of a GDAL type; complex integers are taken as the complex floats that hold them."""
    return "complex64" if name == "complex_int16" else name


def _is_pixel_interleaved(dataset: Any) -> bool:
    return bool(dataset.count > 1 and dataset.interleaving == Interleaving.pixel)


def _datetime(dataset: Any) -> str | None:
    tags = {**dataset.tags(ns="IMAGERY"), **dataset.tags()}
    for name in _TIME_TAGS:
        text = tags.get(name, "").strip().rstrip("\0")
        if text[4:5] == ":" and text[7:8] == ":":  # TIFF and EXIF: 2014:04:01 10:30:00
            text = text[:10].replace(":", "-") + text[10:]
        try:
            return datetime.fromisoformat(text).isoformat()
        except ValueError:
            continue
    return None
