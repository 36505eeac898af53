"""Labels of a scene, from a raster on its grid or from areas, read window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from segpipe.config.model import InputConfig
from segpipe.config.prepare import PrepareConfig
from segpipe.errors import InputError, SceneError
from segpipe.geometry.grid import Window
from segpipe.rasters.labels import open_label
from segpipe.rasters.scene import SceneHeader, SceneSource, Version
from segpipe.rasters.vectors import burn, check_vector_support, is_vector, overlaps, read_areas, window_bbox
from segpipe.storage import open_object

Array = np.ndarray[Any, Any]
ReadLabel = Callable[[Window], Array]


@contextmanager
def open_scene_label(scene: SceneSource, header: SceneHeader, config: PrepareConfig) -> Iterator[ReadLabel]:
    """Give a function from a window in scene pixels to uint8 (height, width): class index, 255 = ignore.

    Raises `SceneError` ``label_read``, ``label_size``, ``label_value``, ``scene_changed``.
    """
    if not is_vector(scene.label_uri):
        wanted = InputConfig(label_map=config.label_map, limits=config.limits)
        size = header.height, header.width
        with open_label(scene, *size, config.classes, wanted, header.located) as reader:
            yield reader.read
        return
    crs, transform = header.crs, header.transform
    if crs is None or transform is None or not scene.label_uri or not scene.label_version:
        what = "the scene has no georeference, so its vector label cannot be placed"
        raise SceneError("label_read", what, scene.where, "Give it a CRS, or a label raster.")
    areas = read_areas(scene.label_uri, scene.label_version, crs)
    values = [_class_of(area.properties, config, scene.label_uri) for area in areas]
    yield lambda window: burn(areas, values, transform, window)


def check_areas(uri: str | None, config: PrepareConfig) -> None:
    """Raise `InputError` where a label is a file of areas that cannot be read, or become no class here."""
    check_vector_support(uri)
    if is_vector(uri) and config.archive.class_property is None and len(config.classes) < 2:
        what = f"areas are class 1, ground is class 0, and classes names {len(config.classes)}"
        raise InputError(what, uri or "", "Name both in classes, the ground first.")


class Exclusion:
    """The areas that no chip may touch, pinned to a version. ``InputError`` where the file is not there."""

    def __init__(self, uri: str) -> None:
        storage, key = open_object(uri)
        info = storage.stat(key)
        if info is None:
            raise InputError("there is no such file", uri, "Correct archive.exclude_area.")
        self._uri = storage.uri(key)
        self._version = Version(info.size_bytes, info.etag)

    @property
    def version_text(self) -> str:
        return str(self._version)

    def touches(self, header: SceneHeader, window: Window) -> bool:
        """Whether an area touches a pixel of the window (scene pixels). Raises `SceneError`."""
        if header.crs is None or header.transform is None:
            return False
        areas = read_areas(self._uri, self._version, header.crs)
        seen = window_bbox(header.transform, window)
        near = [area for area in areas if overlaps(area.bbox, seen)]
        values = [1] * len(near)
        return bool(near) and bool(burn(near, values, header.transform, window, all_touched=True).any())


def _class_of(properties: dict[str, Any], config: PrepareConfig, where: str) -> int:
    name = config.archive.class_property
    if name is None:
        return 1
    if name not in properties:
        there = ", ".join(map(repr, properties)) or "none"
        what = f"an area has no property {name!r}; its properties: {there}"
        raise SceneError("label_value", what, where, "Correct archive.class_property.")
    value = str(properties[name])
    if value not in config.label_map:
        what = f"the property {name} is {value!r}, which no class maps"
        raise SceneError("label_value", what, where, 'Map it with label_map, such as {"house": 1}.')
    return config.label_map[value]
