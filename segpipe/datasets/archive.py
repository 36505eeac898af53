"""Scenes with label rasters or GeoJSON areas, cut into chips on a grid, split by place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from segpipe.config.card import IGNORE
from segpipe.config.model import InputConfig
from segpipe.config.prepare import PrepareConfig
from segpipe.datasets.folder import labelled_scenes
from segpipe.datasets.images import encode_image
from segpipe.datasets.layout import LEFT_OUT, Sample, SampleRef
from segpipe.datasets.splits import ground_cells, split_of
from segpipe.errors import InputError, SceneError
from segpipe.geometry import georef
from segpipe.geometry.grid import Window
from segpipe.rasters.georeference import footprint
from segpipe.rasters.header import inspect_scene, open_source
from segpipe.rasters.labels import open_label
from segpipe.rasters.reader import open_scene
from segpipe.rasters.scene import SceneHeader, SceneSource, Version
from segpipe.rasters.scene_ids import has_suffix
from segpipe.rasters.validity import alpha_bands
from segpipe.rasters.vectors import VECTOR_SUFFIXES, burn, overlaps, read_areas, window_bbox
from segpipe.storage import open_object

Array = np.ndarray[Any, Any]


class ArchiveLayout:
    """Chips of ``chip_px``; the last of an axis is moved inward, so that all lie inside their scene.

    A chip goes to the split of the ground cell that it lies in, and is left out where it reaches into a cell
    of another split: no ground lies on both sides, whatever is added later.
    """

    expands = True

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self.classes = config.classes
        self._input = InputConfig(scenes=config.sources, limits=config.limits)
        self._exclude = _pinned(config.archive.exclude_area)

    def listing(self) -> Iterator[SampleRef]:
        """The scenes."""
        for scene in labelled_scenes(self._config):
            yield SampleRef(scene.scene_id, "", scene, scene.version.size_bytes)

    def expand(self, ref: SampleRef) -> list[SampleRef]:
        """The chips of a scene; sample ids are scene_id/rROW_cCOL, in scene pixels. Raises `SceneError`."""
        header = self._header(ref.scene)
        chip_px = self._config.archive.chip_px
        chip_bytes = min(chip_px, header.height) * min(chip_px, header.width) * len(header.bands)
        refs = []
        for row_off, height in _spans(header.height, chip_px):
            for col_off, width in _spans(header.width, chip_px):
                window = Window(row_off, col_off, height, width)
                split = self._split(ref.scene, header, window)
                if self._excluded(header, window):
                    split = LEFT_OUT
                name = f"{ref.scene.scene_id}/r{row_off:05d}_c{col_off:05d}"
                size_bytes = chip_bytes * np.dtype(header.dtype).itemsize
                payload = None if self._exclude is None else str(self._exclude[1])
                refs.append(SampleRef(name, split, ref.scene, size_bytes, window, payload))
        return refs

    def read(self, ref: SampleRef) -> Sample | None:
        """One chip; no data is ignored; None where too little of it has a label."""
        window = ref.window
        if window is None:
            raise ValueError("a chip has a window")
        header = self._header(ref.scene)
        with open_scene(ref.scene, header, self._input) as reader:
            pixels, valid = reader.read(window)
        label = self._label(ref.scene, header, window)
        if valid is not None:
            label = np.where(valid, label, np.uint8(IGNORE))
        if (label != IGNORE).mean() <= self._config.archive.min_label_fraction:
            return None
        encoded, suffix = encode_image(pixels)
        transform = None if header.transform is None else georef.shift(header.transform, window)
        return Sample(encoded, suffix, pixels, valid, label, window, header.crs, transform)

    def _header(self, scene: SceneSource) -> SceneHeader:
        with open_source(scene) as raster:
            num_bands = raster.call("header", _num_bands)
        return inspect_scene(scene, num_bands, self._input)

    def _label(self, scene: SceneSource, header: SceneHeader, window: Window) -> Array:
        if not _is_vector(scene):
            config = InputConfig(label_map=self._config.label_map, limits=self._config.limits)
            with open_label(scene, header.height, header.width, self.classes, config) as reader:
                return reader.read(window)
        if header.crs is None or header.transform is None or not scene.label_uri or not scene.label_version:
            what = "the scene has no georeference, so its GeoJSON label cannot be placed"
            raise SceneError("label_read", what, scene.where, "Give it a CRS, or a label raster.")
        areas = read_areas(scene.label_uri, scene.label_version, header.crs)
        values = [self._class_of(area.properties, scene.label_uri) for area in areas]
        return burn(areas, values, header.transform, window)

    def _class_of(self, properties: dict[str, Any], where: str) -> int:
        name = self._config.archive.class_property
        if name is None:
            return 1
        value = str(properties.get(name))
        if value not in self._config.label_map:
            what = f"the property {name} is {value!r}, which no class maps"
            raise SceneError("label_value", what, where, 'Map it with label_map, such as {"house": 1}.')
        return self._config.label_map[value]

    def _split(self, scene: SceneSource, header: SceneHeader, window: Window) -> str:
        """The chip's split; LEFT_OUT where it reaches into a cell of another one."""
        config = self._config.split
        located = footprint(header.crs, header.transform, window)
        if located is None:
            return split_of(scene.scene_id, scene.scene_id, config)
        west, south, east, north = located[1]
        east += 360.0 * (east < west)
        if not config.fractions:
            return split_of(scene.scene_id, "", config)
        cells = ground_cells((west, south, east, north), config.grid_m)
        splits = {split_of(scene.scene_id, f"{row},{col}", config) for row, col in cells}
        return splits.pop() if len(splits) == 1 else LEFT_OUT

    def _excluded(self, header: SceneHeader, window: Window) -> bool:
        if self._exclude is None or header.crs is None or header.transform is None:
            return False
        areas = read_areas(*self._exclude, header.crs)
        seen = window_bbox(header.transform, window)
        near = [area for area in areas if overlaps(area.bbox, seen)]
        return bool(near) and bool(
            burn(near, [1] * len(near), header.transform, window, all_touched=True).any()
        )


def _spans(num_px: int, chip_px: int) -> list[tuple[int, int]]:
    """(offset, size) of the chips along an axis: evenly spread from the first pixel to the last."""
    if num_px <= chip_px:
        return [(0, num_px)]
    count = math.ceil(num_px / chip_px)
    return [(index * (num_px - chip_px) // (count - 1), chip_px) for index in range(count)]


def _num_bands(dataset: Any) -> int:
    if dataset.count == 1 and dataset.colorinterp[0].name == "palette":
        return 3
    return int(dataset.count) - len(alpha_bands(dataset))


def _is_vector(scene: SceneSource) -> bool:
    return scene.label_uri is not None and has_suffix(scene.label_uri, VECTOR_SUFFIXES)


def _pinned(uri: str | None) -> tuple[str, Version] | None:
    """The exclusion's file and its version. Raises `InputError` where it is not there."""
    if uri is None:
        return None
    storage, key = open_object(uri)
    info = storage.stat(key)
    if info is None:
        raise InputError("there is no such file", uri, "Correct archive.exclude_area.")
    return storage.uri(key), Version(info.size_bytes, info.etag)
