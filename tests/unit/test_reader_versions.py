"""A scene is read in the version that was planned, or not at all."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rasters import AUTO, noise, source_of, whole, write_tiff

from segpipe.errors import SceneError
from segpipe.geometry.grid import Window
from segpipe.rasters.header import inspect_scene
from segpipe.rasters.reader import open_scene
from segpipe.rasters.scene import SceneSource, Version


def test_a_scene_that_is_gone_is_not_found(tmp_path: Path) -> None:
    source = SceneSource("x", str(tmp_path / "x.tif"), Version(1, "1-1"))
    with pytest.raises(SceneError) as caught:
        inspect_scene(source, 1, AUTO)
    assert caught.value.kind == "not_found"


@pytest.mark.parametrize("how", ["rename", "in_place"])
def test_a_scene_that_is_replaced_between_two_windows_is_an_error(tmp_path: Path, how: str) -> None:
    pixels = noise(3, 256, 256)
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    path = write_tiff(tmp_path / "x.tif", pixels, **tiles)
    other = write_tiff(tmp_path / "y.tif", 251 - pixels, **tiles)
    source = source_of(path)
    header = inspect_scene(source, 3, AUTO)
    with open_scene(source, header, AUTO) as reader:
        reader.read(Window(0, 0, 64, 64))
        if how == "rename":
            other.rename(path)
        else:
            time.sleep(0.01)
            path.write_bytes(other.read_bytes())
        with pytest.raises(SceneError) as caught:
            reader.read(Window(128, 128, 64, 64))
    assert caught.value.kind == "scene_changed"
    for call in (lambda: inspect_scene(source, 3, AUTO), lambda: open_scene(source, header, AUTO)):
        with pytest.raises(SceneError) as caught:
            call()
        assert caught.value.kind == "scene_changed"


def test_a_scene_that_is_removed_while_it_is_read_is_not_found(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(1, 64, 64))
    source = source_of(path)
    header = inspect_scene(source, 1, AUTO)
    with open_scene(source, header, AUTO) as reader:
        path.unlink()
        with pytest.raises(SceneError) as caught:
            reader.read(whole(header))
    assert caught.value.kind == "not_found"


@pytest.mark.parametrize("planned", [{"width": 29}, {"height": 21}, {"num_bands": 2}])
def test_a_scene_whose_header_is_not_the_planned_one_is_an_error(
    tmp_path: Path, planned: dict[str, Any]
) -> None:
    source = source_of(write_tiff(tmp_path / "x.tif", noise(1, 20, 30)))
    header = inspect_scene(source, 1, AUTO)
    with pytest.raises(SceneError, match="not the one that was planned") as caught:
        open_scene(source, replace(header, **planned), AUTO)
    assert caught.value.kind == "scene_changed"
