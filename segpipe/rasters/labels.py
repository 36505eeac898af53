"""Labels: index rasters, palettes and colour images become class indices on the scene's own grid."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import numpy as np
from rasterio.enums import MaskFlags

from segpipe.config.card import IGNORE, ClassInfo
from segpipe.config.model import InputConfig
from segpipe.errors import ConfigError, SceneError
from segpipe.geometry.georef import Located, stray_corner
from segpipe.geometry.grid import Window
from segpipe.pages import block_zeros
from segpipe.rasters import georeference, shards
from segpipe.rasters.driver import Raster, faults_as, open_raster, open_raster_bytes
from segpipe.rasters.header import check_limits
from segpipe.rasters.palette import has_palette
from segpipe.rasters.scene import SceneSource
from segpipe.rasters.validity import alpha_bands, can_equal
from segpipe.wording import few

Array = np.ndarray[Any, Any]

_COLOUR: Final = re.compile(r"#[0-9a-fA-F]{6}")
_UNMAPPED: Final = 256  # of the uint16 tables; 0..255 are class bytes
_CHUNK_PX: Final = 1 << 18
_MOST_NAMED: Final = 5
_NEAR_PX: Final = 0.5 + 1e-6  # half a pixel is what "point" and "area" differ by; the rest is rounding
_NO_TRUTH: Final = -1  # code of a pixel that the label itself marks as no data


def open_label(
    source: SceneSource,
    height: int,
    width: int,
    classes: Sequence[ClassInfo],
    config: InputConfig,
    located: Located = (None, None),
) -> LabelReader:
    """Open the label of a scene of ``height`` x ``width`` pixels that is ``located`` there.

    Where scene and label both have a CRS and a transform, the label must lie on the scene's grid: its corners
    within half a scene pixel, and in the same system as far as that can be told.
    Values: ``label_map`` ("7" or "#rrggbb" -> class index or 255); without it an index raster's values
    are the class indices, and a colour image's colours those of the classes. 255 is ignored unless it is
    mapped. A palette counts as colours where the map has colours, else as indices.
    Raises `SceneError` ``label_read``, ``label_size``, ``scene_changed``; `ConfigError` for a map that is
    wrong; storage faults as themselves.
    """
    value_map, colour_map = parse_label_map(config.label_map, len(classes))
    with faults_as("label_read"):
        raster = _open(source)
    try:
        with faults_as("label_read"):
            facts = raster.call("header", _facts)
        if (facts.height, facts.width) != (height, width):
            what = f"the label has {facts.height} x {facts.width} pixels, the scene {height} x {width}"
            raise SceneError("label_size", what, raster.where, "Write the label on the scene's own grid.")
        _check_place(facts, located, raster.where)
        with faults_as("label_read"):
            raster.call("header", lambda data: check_limits(data, raster.driver, raster.where, config.limits))
            decoder = _decoder(facts, value_map, colour_map, classes, raster.where)
    except BaseException:
        raster.close()
        raise
    return LabelReader(raster, facts, decoder)


def parse_label_map(label_map: Mapping[str, int], num_classes: int) -> tuple[dict[int, int], dict[int, int]]:
    """``label_map`` as (value -> class, colour as 0xrrggbb -> class).

    Raises `ConfigError` for a key that is neither, and for a class that there is not.
    """
    values: dict[int, int] = {}
    colours: dict[int, int] = {}
    for key, index in label_map.items():
        if index != IGNORE and not 0 <= index < num_classes:
            what = f"{key!r} becomes class {index}, there are only the classes 0 to {num_classes - 1}"
            raise ConfigError(what, "label_map", f"Use one of these, or {IGNORE} for ignore.")
        text = key.strip()
        if _COLOUR.fullmatch(text):
            colours[int(text[1:], 16)] = index
            continue
        try:
            values[int(text)] = index
        except ValueError:
            what = f"{key!r} is neither a whole number nor a colour"
            raise ConfigError(what, "label_map", 'Write "7" or "#1a2b3c".') from None
    return values, colours


@dataclass(frozen=True, slots=True)
class _LabelHeader:
    """What the label's header says."""

    height: int
    width: int
    count: int
    dtype: str
    alpha: int | None
    mask: bool
    nodata: float | None
    palette: tuple[int, ...] | None
    """Colour of each index as 0xrrggbb, -1 where it is transparent."""
    located: Located


@dataclass(frozen=True, slots=True)
class _Decoder:
    """How values become classes: ``table[value - first]``, uint16, `_UNMAPPED` where there is none."""

    bands: tuple[int, ...]
    table: Array
    first: int
    further: dict[int, int]
    """Mapped values outside of the table."""
    colours: bool
    nodata: float | None


class LabelReader:
    """Reads windows of one open label; one thread at a time. Made by `open_label`."""

    def __init__(self, raster: Raster, facts: _LabelHeader, decoder: _Decoder) -> None:
        self._raster = raster
        self._facts = facts
        self._decoder = decoder

    def read(self, window: Window) -> Array:
        """uint8 (height, width): class index, 255 = no truth there.

        Raises `SceneError` ``label_value`` (up to five values that no class maps), ``label_read``.
        """
        facts, decoder = self._facts, self._decoder
        bands = decoder.bands if facts.alpha is None else (*decoder.bands, facts.alpha)
        pixels = block_zeros((len(bands), window.height, window.width), facts.dtype)
        with faults_as("label_read"):
            self._raster.read(bands, window, pixels)
            mask = self._raster.read_mask(window) if facts.mask else None
        if facts.alpha is not None:
            mask = pixels[-1] if mask is None else np.minimum(mask != 0, pixels[-1] != 0)
        return self._classes(pixels[: len(decoder.bands)], mask)

    def close(self) -> None:
        """Close the file; may be called from any thread, and again."""
        self._raster.close()

    def __enter__(self) -> LabelReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _classes(self, pixels: Array, mask: Array | None) -> Array:
        height, width = pixels.shape[1:]
        out = block_zeros((height, width), np.uint8)
        unmapped: set[int | float] = set()
        rows = max(1, _CHUNK_PX // width)
        for start in range(0, height, rows):
            part = slice(start, start + rows)
            keep = None if mask is None else mask[part] != 0
            unmapped |= self._decode(pixels[:, part], keep, out[part])
        if unmapped:
            raise self._unmapped(unmapped)
        return out

    def _decode(self, pixels: Array, keep: Array | None, out: Array) -> set[int | float]:
        """Fill ``out`` (rows, width) where ``keep``; return some of the values that no class maps."""
        decoder = self._decoder
        values = _colour_codes(pixels) if decoder.colours else pixels[0]
        if decoder.nodata is not None:
            there = values != values.dtype.type(decoder.nodata)
            keep = there if keep is None else keep & there
        if values.dtype.kind == "f":
            finite = ~np.isnan(values)
            keep = finite if keep is None else keep & finite
        found, strange = _look_up(values, keep, decoder)
        out[...] = found
        return strange

    def _unmapped(self, values: set[int | float]) -> SceneError:
        first = sorted(values)[:_MOST_NAMED]
        names = [f"#{int(value):06x}" if self._decoder.colours else f"{value:g}" for value in first]
        named = few(names, _MOST_NAMED, total=len(values))
        example = "#ff0000" if self._decoder.colours else "7"
        fix = f'Map them with label_map, such as {{"{example}": 1}} (255 = ignore), or correct the label.'
        what = f"the label holds values that no class maps: {named}"
        return SceneError("label_value", what, self._raster.where, fix)


def _open(source: SceneSource) -> Raster:
    in_shard = source.member is not None and source.label_uri == source.uri
    if source.label_uri is not None and not in_shard:
        return open_raster(source.label_uri, source.label_version)
    data = shards.read_label_member(source) if in_shard else None
    if data is None:
        raise SceneError("label_read", "it has no label", source.where, "Check --labels.")
    return open_raster_bytes(data, f"{source.where} (label)")


def _facts(dataset: Any) -> _LabelHeader:
    alpha = next(iter(alpha_bands(dataset)), None)
    flags = set(dataset.mask_flag_enums[0])
    palette = None
    if has_palette(dataset):
        colours = dataset.colormap(1)
        top = max(colours, default=0)
        codes = [_NO_TRUTH] * (top + 1)
        for index, (red, green, blue, opacity) in colours.items():
            codes[index] = _NO_TRUTH if opacity == 0 else red << 16 | green << 8 | blue
        palette = tuple(codes)
    return _LabelHeader(
        height=dataset.height,
        width=dataset.width,
        count=dataset.count - (alpha is not None),
        dtype=str(dataset.dtypes[0]),
        alpha=alpha,
        mask=MaskFlags.per_dataset in flags and not {MaskFlags.alpha, MaskFlags.nodata} & flags,
        nodata=dataset.nodatavals[0],
        palette=palette,
        located=georeference.of_affine(dataset),
    )


def _check_place(facts: _LabelHeader, located: Located, where: str) -> None:
    """Raise `SceneError` ``label_size`` for a label that lies elsewhere than the scene."""
    (crs, transform), (own_crs, own_transform) = located, facts.located
    if crs is None or transform is None or own_crs is None or own_transform is None:
        return
    systems = ""
    if georeference.systems_differ(crs, own_crs):  # maybe in name alone: ETRS89 and WGS84
        size = facts.height, facts.width
        transform, own_transform = (georeference.in_lonlat(each, *size) for each in (located, facts.located))
        if transform is None or own_transform is None:
            return
        systems = f" (it is in {own_crs}, the scene in {crs})"
    stray = stray_corner(transform, own_transform, facts.height, facts.width, _NEAR_PX)
    if stray is not None:
        corner, distance_px = stray
        far = f"{distance_px:,.1f}" if distance_px > 0.95 else f"{distance_px:.2f}"
        what = f"the label lies elsewhere: its {corner} corner is {far} pixels from the scene's{systems}"
        fix = "Warp it to the scene's grid; a label without georeference is taken as it lies."
        raise SceneError("label_size", what, where, fix)


def _decoder(
    facts: _LabelHeader,
    value_map: dict[int, int],
    colour_map: dict[int, int],
    classes: Sequence[ClassInfo],
    where: str,
) -> _Decoder:
    if np.dtype(facts.dtype).kind not in "iuf":
        raise SceneError("label_read", f"its pixels are {facts.dtype}", where, "Write it as uint8.")
    if facts.count in (3, 4):
        return _colour_decoder(facts, value_map, colour_map, classes, where)
    if facts.count != 1:
        what = f"the label has {facts.count} bands; one band of indices or three of colour are read"
        raise SceneError("label_read", what, where, "Write it as one band.")
    mapping = dict(value_map)
    if colour_map and facts.palette is not None:
        of_colour = {**colour_map, _NO_TRUTH: IGNORE}
        mapping |= {index: of_colour[code] for index, code in enumerate(facts.palette) if code in of_colour}
    elif colour_map and not value_map:  # grey: v stands for the colour (v, v, v)
        mapping = {
            code & 0xFF: index for code, index in colour_map.items() if code == (code & 0xFF) * 0x010101
        }
    nodata = None if facts.nodata in mapping else facts.nodata
    if not value_map and not colour_map:
        mapping = {index: index for index in range(len(classes))}
    return _value_decoder(np.dtype(facts.dtype), {IGNORE: IGNORE, **mapping}, nodata)


def _value_decoder(dtype: Any, mapping: dict[int, int], nodata: float | None) -> _Decoder:
    """A table over all values of an 8 or 16 bit type, else over 0 .. 65535."""
    small = dtype.kind in "iu" and dtype.itemsize <= 2
    info = np.iinfo(dtype if small else np.uint16)
    table = np.full(int(info.max) - int(info.min) + 1, _UNMAPPED, np.uint16)
    further = {}
    for value, index in mapping.items():
        if info.min <= value <= info.max:
            table[value - info.min] = index
        else:
            further[value] = index
    if nodata is not None and not can_equal(dtype, nodata):
        nodata = None
    return _Decoder((1,), table, int(info.min), further, colours=False, nodata=nodata)


def _colour_decoder(
    facts: _LabelHeader,
    value_map: dict[int, int],
    colour_map: dict[int, int],
    classes: Sequence[ClassInfo],
    where: str,
) -> _Decoder:
    if facts.dtype != "uint8":
        what = f"the label has {facts.count} bands of {facts.dtype}; colours are uint8"
        raise SceneError("label_read", what, where, "Write it as uint8.")
    if value_map and not colour_map:
        what = "the label is a colour image, label_map has numbers only"
        raise SceneError("label_read", what, where, 'Map its colours, such as {"#ff0000": 1}.')
    mapping = colour_map
    if not mapping:
        mapping = {}
        for index, info in enumerate(classes):
            code = info.color[0] << 16 | info.color[1] << 8 | info.color[2]
            if code in mapping:
                what = f"classes {classes[mapping[code]].name} and {info.name} have one colour"
                raise SceneError("label_read", what, where, "Set label_map.")
            mapping[code] = index
    table = np.full(1 << 24, _UNMAPPED, np.uint16)
    for code, index in mapping.items():
        table[code] = index
    return _Decoder((1, 2, 3), table, 0, {}, colours=True, nodata=None)


def _colour_codes(pixels: Array) -> Array:
    """uint32 (rows, width), 0xrrggbb, of uint8 (3, rows, width)."""
    codes = pixels[0].astype(np.uint32)
    for band in pixels[1:]:
        codes <<= np.uint32(8)
        codes |= band
    return codes


def _look_up(values: Array, keep: Array | None, decoder: _Decoder) -> tuple[Array, set[int | float]]:
    """Classes of ``values`` (255 where not ``keep``) as an array of class bytes, and the unmapped values."""
    table, first = decoder.table, decoder.first
    if values.dtype.kind == "f" or values.dtype.itemsize > 2:
        inside = (values >= 0) & (values < len(table))
        if values.dtype.kind == "f":
            inside &= values == np.trunc(values)
        found = table.take(np.where(inside, values, 0).astype(np.int64))
        if not inside.all():
            found[~inside] = _UNMAPPED
            for value, index in decoder.further.items():
                found[values == value] = index
    elif first:
        found = table.take(values.astype(np.int32) - first)
    else:
        found = table.take(values)
    if keep is not None:
        found[~keep] = IGNORE
    if int(found.max(initial=0)) <= IGNORE:
        return found, set()
    return found, {value.item() for value in np.unique(values[found == _UNMAPPED])}
