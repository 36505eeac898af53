"""Whole images: passed through as they are encoded, or encoded again where alpha or a palette is in them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from segpipe.config.card import IGNORE, PIXEL_DTYPES, ClassInfo
from segpipe.config.model import InputConfig, LimitsConfig
from segpipe.datasets.layout import Sample, SampleRef
from segpipe.errors import SceneError
from segpipe.geometry.georef import Located, Transform
from segpipe.geometry.grid import Window
from segpipe.rasters import georeference
from segpipe.rasters.chips import encode_tiff
from segpipe.rasters.driver import Raster, open_raster_bytes, read_object
from segpipe.rasters.header import check_limits
from segpipe.rasters.labels import open_label
from segpipe.rasters.palette import has_palette, palette_of
from segpipe.rasters.reader import read_pixels
from segpipe.rasters.scene import SceneSource
from segpipe.rasters.shards import read_member
from segpipe.rasters.validity import ValidityRule, alpha_bands, find_rule

Array = np.ndarray[Any, Any]

STORED_LIMITS: Final = LimitsConfig()
"""Of images in shards: what `segpipe prepare` was allowed beyond them is encoded again."""

_SUFFIXES: Final = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GTiff": "tif"}


@dataclass(frozen=True, slots=True)
class _ImageHeader:
    """What the header says."""

    height: int
    width: int
    dtype: str
    bands: tuple[int, ...]
    rule: ValidityRule
    palette: Array | None
    """What `palette_of` gives; None = no indexed image."""
    located: Located
    plain: bool
    """The encoded image has just these bands, so it can be passed through."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image decoded from its encoded bytes."""

    pixels: Array
    valid: Array | None
    suffix: str
    plain: bool
    crs: str | None
    transform: Transform | None

    @property
    def located(self) -> Located:
        """CRS and transform."""
        return self.crs, self.transform


def read_pair(
    ref: SampleRef, classes: tuple[ClassInfo, ...], label_map: dict[str, int], limits: LimitsConfig
) -> Sample:
    """Read an image and its label raster. Raises `SceneError` for either."""
    data = read_encoded(ref.scene)
    image = decode_image(data, ref.scene.where, limits)
    height, width = image.pixels.shape[1:]
    config = InputConfig(label_map=label_map, limits=limits)
    with open_label(ref.scene, height, width, classes, config, image.located) as reader:
        label = reader.read(Window(0, 0, height, width))
    return whole_sample(data, image, label)


def whole_sample(data: bytes, image: DecodedImage, label: Array) -> Sample:
    """The sample of a whole image; pixels without data get the label 255."""
    height, width = image.pixels.shape[1:]
    if image.valid is not None:
        label = np.where(image.valid, label, np.uint8(IGNORE))
    encoded, suffix = (data, image.suffix) if image.plain else encode_image(image.pixels, image.valid)
    window = Window(0, 0, height, width)
    return Sample(encoded, suffix, image.pixels, image.valid, label, window, image.crs, image.transform)


def read_encoded(scene: SceneSource) -> bytes:
    """The bytes of a scene's file or shard member, in the listed version. Raises `SceneError`."""
    if scene.member is not None:
        return read_member(scene)
    return read_object(scene.uri, scene.version)


def decode_image(data: bytes, where: str, limits: LimitsConfig) -> DecodedImage:
    """Decode all bands but alpha; a palette becomes three. Raises `SceneError`."""
    with open_raster_bytes(data, where) as raster:
        raster.call("header", lambda dataset: check_limits(dataset, raster.driver, where, limits))
        facts = raster.call("header", lambda dataset: _facts(dataset, where))
        stays = limits == STORED_LIMITS or _is_within(raster, where, STORED_LIMITS)
        window = Window(0, 0, facts.height, facts.width)
        pixels, no_data = read_pixels(raster, window, facts.bands, facts.dtype, facts.rule, facts.palette)
    valid = None if no_data is None else ~no_data
    crs, transform = facts.located
    return DecodedImage(pixels, valid, _SUFFIXES[raster.driver], facts.plain and stays, crs, transform)


def encode_image(pixels: Array, valid: Array | None) -> tuple[bytes, str]:
    """Encode (bands, height, width) losslessly: 8-bit grey and RGB as PNG, else GeoTIFF; and the suffix.

    Pixels that ``valid``, bool (height, width), calls no data are transparent, or masked in a GeoTIFF.
    """
    if valid is not None and valid.all():
        valid = None
    if pixels.dtype != np.uint8 or len(pixels) not in (1, 3):
        return encode_tiff(pixels, valid), "tif"
    bands = pixels if valid is None else np.concatenate([pixels, valid[None] * np.uint8(255)])
    shown = bands[0] if len(bands) == 1 else np.ascontiguousarray(bands.transpose(1, 2, 0))
    sink = io.BytesIO()
    Image.fromarray(shown).save(sink, "PNG", compress_level=4)
    return sink.getvalue(), "png"


def _facts(dataset: Any, where: str) -> _ImageHeader:
    alpha = alpha_bands(dataset)
    bands = tuple(number for number in range(1, dataset.count + 1) if number not in alpha)
    dtypes = {str(dataset.dtypes[number - 1]) for number in bands}
    if len(dtypes) != 1 or not dtypes <= set(PIXEL_DTYPES):
        raise SceneError("dtype", f"its pixels are {' and '.join(sorted(dtypes))}", where, "Convert it.")
    palette = palette_of(dataset) if has_palette(dataset) else None
    return _ImageHeader(
        height=dataset.height,
        width=dataset.width,
        dtype=dtypes.pop(),
        bands=bands,
        rule=find_rule(dataset, bands, "auto", False, where),
        palette=palette,
        located=georeference.of_dataset(dataset),
        plain=not alpha and palette is None,
    )


def _is_within(raster: Raster, where: str, limits: LimitsConfig) -> bool:
    try:
        raster.call("header", lambda dataset: check_limits(dataset, raster.driver, where, limits))
    except SceneError:
        return False
    return True
