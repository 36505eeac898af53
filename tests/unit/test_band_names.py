"""Bands that a file names in another order than the model takes them are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasters import AUTO, noise, read_scene, source_of, write_tiff

from segpipe.config.model import InputConfig
from segpipe.rasters.band_names import contradict
from segpipe.rasters.header import inspect_scene

RGB = ("red", "green", "blue")
BGR = ("blue", "green", "red")


def written(
    path: Path, dtype: str = "uint8", *, meanings: tuple[str, ...] = (), texts: tuple[str, ...] = ()
) -> Path:
    """Write bands with a colour interpretation, or with descriptions."""
    write_tiff(path, noise(max(3, len(meanings), len(texts)), 20, 30, dtype))
    with rasterio.open(path, "r+") as file:
        if meanings:
            file.colorinterp = [ColorInterp[name] for name in meanings]
        if texts:
            file.descriptions = texts
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"meanings": BGR}, BGR),
        ({"texts": BGR}, BGR),
        ({"texts": ("Blue ", "GREEN", "red")}, BGR),
        ({"texts": BGR, "meanings": RGB}, BGR),
        ({"texts": ("B8", "B4", "B3"), "meanings": ("nir", "red", "green")}, ("nir", "red", "green")),
        ({"meanings": ("alpha", *BGR)}, BGR),
    ],
)
def test_names_are_those_of_the_chosen_bands(
    tmp_path: Path, dtype: str, names: Any, found: tuple[str, ...]
) -> None:
    path = written(tmp_path / "x.tif", dtype, **names)
    assert inspect_scene(source_of(path), 3, AUTO).band_names == found
    assert inspect_scene(source_of(path), 2, AUTO).band_names == found[:2]
    assert inspect_scene(source_of(path), 3, InputConfig(bands=(1, 2, 3))).band_names == ()


def test_bands_without_colours_and_palettes_have_no_names(tmp_path: Path) -> None:
    path = written(tmp_path / "x.tif", "uint16", texts=("first", "second", "third"))
    assert inspect_scene(source_of(path), 3, AUTO).band_names == ("", "", "")
    indices = np.zeros((1, 20, 30), np.uint8)
    path = write_tiff(tmp_path / "p.tif", indices, colormap={0: (1, 2, 3, 255)}, photometric="palette")
    assert inspect_scene(source_of(path), 3, AUTO).band_names == ()


def test_descriptions_that_are_no_text_fail_no_scene(tmp_path: Path) -> None:
    path = written(tmp_path / "x.tif", texts=("greenX", "blue", "red"))
    data = path.read_bytes()
    assert b"greenX" in data
    path.write_bytes(data.replace(b"greenX", b"gr\xfcnes"))
    header, _, _ = read_scene(path, 3)
    assert header.band_names == RGB


@pytest.mark.parametrize(
    ("names", "wanted", "others"),
    [
        (RGB, RGB, False),
        (BGR, RGB, True),
        (BGR, ("Blue", "Green", "Red"), False),
        (BGR, ("band_1", "band_2", "band_3"), False),
        (BGR, ("red", "green", "band_3"), False),
        (("", "", ""), RGB, False),
        (("red", "green", ""), RGB, False),
        (("blue", "", ""), RGB, True),
        (("nir", "red", "green"), RGB, True),
        (RGB, ("nir", "red", "green"), True),
        ((*RGB, ""), (*RGB, "nir"), False),
        ((*BGR, "nir"), (*RGB, "nir"), True),
        (("swir", "rededge"), ("rededge", "swir"), True),
        (("swir", "tir"), ("rededge", "swir"), False),
        (("nir",), ("pan",), True),
        ((), RGB, False),
    ],
)
def test_another_order_and_other_colours_are_told(
    names: tuple[str, ...], wanted: tuple[str, ...], others: bool
) -> None:
    assert contradict(names, wanted) is others
