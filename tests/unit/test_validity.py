"""One test for each rule that says which pixels are data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rasters import noise, read_scene, source_of, write_tiff

from segpipe.config.model import InputConfig
from segpipe.errors import SceneError
from segpipe.rasters.header import inspect_scene
from segpipe.rasters.validity import no_data_by_value

TEMPLATE = InputConfig(valid="{stem}_mask.tif")


def rule(valid: str) -> InputConfig:
    return InputConfig(valid=valid)


def hole(height: int = 20, width: int = 30) -> np.ndarray:
    """Bool (height, width), false in a corner."""
    there = np.ones((height, width), bool)
    there[:4, :7] = False
    return there


def test_without_any_source_all_pixels_are_data(tmp_path: Path) -> None:
    header, _, valid = read_scene(write_tiff(tmp_path / "x.tif", noise(3, 20, 30)), 3)
    assert (header.valid_source, valid) == ("none", None)


def test_alpha_zero_is_no_data(tmp_path: Path) -> None:
    pixels = noise(4, 20, 30)
    pixels[3][~hole()] = 0
    pixels[3][10] = 1  # nearly transparent is data
    header, read, valid = read_scene(write_tiff(tmp_path / "x.tif", pixels, alpha=4), 3)
    assert header.valid_source == "alpha"
    np.testing.assert_array_equal(valid, hole())
    np.testing.assert_array_equal(read, pixels[:3])


def test_alpha_of_uint16_counts_as_data_unless_it_is_zero(tmp_path: Path) -> None:
    pixels = noise(4, 20, 30, "uint16")
    pixels[3] = np.where(hole(), 255, 0)
    header, _, valid = read_scene(write_tiff(tmp_path / "x.tif", pixels, alpha=4), 3)
    assert header.valid_source == "alpha"
    np.testing.assert_array_equal(valid, hole())


def test_alpha_of_a_png_counts(tmp_path: Path) -> None:
    pixels = noise(4, 20, 30)
    pixels[3] = np.where(hole(), 255, 0)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_scene(tmp_path / "x.png", 3)[2], hole())


@pytest.mark.parametrize(("valid", "transparent"), [("auto", True), ("none", False)])
def test_transparent_colours_of_a_palette_are_no_data_unless_a_rule_is_named(
    tmp_path: Path, valid: str, transparent: bool
) -> None:
    indices = np.where(hole(), 1, 2).astype(np.uint8)
    indices[0, :3] = 3
    image = Image.fromarray(indices, "P")
    image.putpalette([0, 0, 0, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    image.save(tmp_path / "x.png", transparency=bytes([255, 1, 0, 0]))  # nearly transparent is data
    _, read, found = read_scene(tmp_path / "x.png", 3, rule(valid))
    there = np.ones((20, 30), bool) if found is None else found
    np.testing.assert_array_equal(there, hole() if transparent else True)
    np.testing.assert_array_equal(read[0], np.array([0, 9, 6, 3])[indices])


def test_an_alpha_band_among_the_chosen_bands_is_no_mask(tmp_path: Path) -> None:
    pixels = noise(4, 20, 30)
    pixels[3][~hole()] = 0
    path = write_tiff(tmp_path / "x.tif", pixels, alpha=4)
    header, read, valid = read_scene(path, 4, InputConfig(bands=(1, 2, 3, 4)))
    assert (header.valid_source, valid) == ("none", None)
    np.testing.assert_array_equal(read, pixels)


def test_nodata_counts_only_where_all_chosen_bands_have_it(tmp_path: Path) -> None:
    pixels = noise(4, 20, 30)
    pixels[:3][:, ~hole()] = 0
    pixels[0, 10:] = 0  # one band alone is data
    path = write_tiff(tmp_path / "x.tif", pixels, nodata=0)
    header, _, valid = read_scene(path, 3)
    assert header.valid_source == "nodata"
    np.testing.assert_array_equal(valid, hole())
    only_first = read_scene(path, 1)[2]
    assert only_first is not None
    assert only_first.sum() == 10 * 30 - 28


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [
        ("uint16", 65535),
        ("int16", -9999),
        ("float32", -9999.0),
        ("float32", -3.4028234663852886e38),
        ("float64", 0.5),
    ],
)
def test_nodata_is_compared_in_the_pixel_type(tmp_path: Path, dtype: str, nodata: float) -> None:
    pixels = noise(2, 20, 30, dtype)
    pixels[:, ~hole()] = nodata
    header, _, valid = read_scene(write_tiff(tmp_path / "x.tif", pixels, nodata=nodata), 2)
    assert header.valid_source == "nodata"
    np.testing.assert_array_equal(valid, hole())


def test_nan_as_nodata_counts_in_any_chosen_band(tmp_path: Path) -> None:
    pixels = noise(3, 20, 30, "float32")
    pixels[1][~hole()] = np.nan
    pixels[2, 19, 29] = np.nan  # not chosen below
    header, _, valid = read_scene(write_tiff(tmp_path / "x.tif", pixels, nodata=np.nan), 2)
    assert header.valid_source == "nodata"
    np.testing.assert_array_equal(valid, hole())


@pytest.mark.parametrize("valid", ["auto", "none", "nodata"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_no_data_under_every_rule(tmp_path: Path, valid: str, value: float) -> None:
    pixels = noise(2, 20, 30, "float64")
    pixels[1][~hole()] = value
    np.testing.assert_array_equal(
        read_scene(write_tiff(tmp_path / "x.tif", pixels), 2, rule(valid))[2], hole()
    )


def test_an_internal_mask_counts(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(3, 20, 30), mask=hole().astype(np.uint8) * 255)
    header, _, valid = read_scene(path, 3)
    assert header.valid_source == "mask"
    np.testing.assert_array_equal(valid, hole())


def test_a_msk_sidecar_counts_when_the_catalogue_names_it_and_never_by_itself(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(3, 20, 30))
    sidecar = write_tiff(tmp_path / "x.tif.msk", hole()[None].astype(np.uint8) * 255)
    header, _, valid = read_scene(path, 3, valid=sidecar)
    assert header.valid_source == "sidecar"
    np.testing.assert_array_equal(valid, hole())
    header, _, valid = read_scene(path, 3)
    assert (header.valid_source, valid) == ("none", None)


def test_a_template_mask_replaces_all_other_sources(tmp_path: Path) -> None:
    pixels = noise(4, 20, 30)
    pixels[3] = 0
    path = write_tiff(tmp_path / "x.tif", pixels, alpha=4)
    Image.fromarray(hole()).save(tmp_path / "x_mask.png")  # one bit
    header, _, valid = read_scene(path, 3, TEMPLATE, valid=tmp_path / "x_mask.png")
    assert header.valid_source == "sidecar"
    np.testing.assert_array_equal(valid, hole())


def test_auto_joins_all_sources_and_names_the_first(tmp_path: Path) -> None:
    pixels = noise(4, 20, 30)
    pixels[:3, 0] = 0
    pixels[3, 1] = 0
    mask = np.full((20, 30), 255, np.uint8)
    mask[2] = 0
    beside = np.full((1, 20, 30), 255, np.uint8)
    beside[0, 3] = 0
    path = write_tiff(tmp_path / "x.tif", pixels, alpha=4, nodata=0, mask=mask)
    sidecar = write_tiff(tmp_path / "x.tif.msk", beside)
    header, _, valid = read_scene(path, 3, valid=sidecar)
    assert header.valid_source == "mask"
    assert valid is not None
    assert not valid[:4].any()
    assert valid[4:].all()


@pytest.mark.parametrize(
    ("valid", "rows"), [("none", set()), ("nodata", {0}), ("alpha", {1}), ("auto", {0, 1})]
)
def test_a_named_rule_looks_at_its_own_source_only(tmp_path: Path, valid: str, rows: set[int]) -> None:
    pixels = noise(4, 20, 30)
    pixels[:3, 0] = 7
    pixels[3, 1] = 0
    path = write_tiff(tmp_path / "x.tif", pixels, alpha=4, nodata=7)
    header, _, found = read_scene(path, 3, rule(valid))
    there = np.ones((20, 30), bool) if found is None else found
    assert {row for row in range(20) if not there[row].all()} == rows
    assert header.valid_source == ("alpha" if valid == "auto" else valid)


@pytest.mark.parametrize("nodata", [b"-99", b"999", b"0.5", b"inf"])
def test_a_nodata_value_that_no_pixel_can_have_is_no_rule(tmp_path: Path, nodata: bytes) -> None:
    pixels = np.full((1, 20, 30), 157, np.uint8)  # -99 as int8
    pixels[0, 0] = [0, 1, 231, 255, *range(26)]  # what the others could be cut down to
    path = write_tiff(tmp_path / "x.tif", pixels, nodata=111)
    data = path.read_bytes()
    assert data.count(b"111\0") == 1  # the tag is text
    path.write_bytes(data.replace(b"111\0", nodata + b"\0"))
    header, _, valid = read_scene(path, 1)
    assert (header.valid_source, valid) == ("none", None)


def test_a_transparent_colour_of_a_png_is_no_data(tmp_path: Path) -> None:
    pixels = noise(3, 20, 30)
    pixels[:, ~hole()] = np.array([[9], [8], [7]])
    pixels[0, 10] = 9
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "x.png", transparency=(9, 8, 7))
    header, read, valid = read_scene(tmp_path / "x.png", 3)
    assert header.valid_source == "nodata"
    np.testing.assert_array_equal(valid, hole())
    np.testing.assert_array_equal(read, pixels)


def test_alpha_that_is_asked_for_but_missing_is_an_error(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(3, 20, 30))
    with pytest.raises(SceneError) as caught:
        inspect_scene(source_of(path), 3, rule("alpha"))
    assert caught.value.kind == "valid_mask"


def test_a_mask_of_another_size_or_none_at_all_is_an_error(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(3, 20, 30))
    small = write_tiff(tmp_path / "x_mask.tif", noise(1, 19, 30))
    text = tmp_path / "x_text.tif"
    text.write_text("no raster")
    for fields in ({"valid": small}, {"valid": text}, {}):
        with pytest.raises(SceneError) as caught:
            inspect_scene(source_of(path, **fields), 3, TEMPLATE)
        assert caught.value.kind == "valid_mask"
    with pytest.raises(SceneError, match="19 x 30 pixels, the scene 20 x 30"):
        inspect_scene(source_of(path, valid=small), 3, TEMPLATE)


def test_named_rules_do_not_open_the_sidecar(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", noise(3, 20, 30))
    (tmp_path / "x.tif.msk").write_text("no raster")
    for valid in ("none", "nodata"):
        assert read_scene(path, 3, rule(valid), valid=tmp_path / "x.tif.msk")[2] is None


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from(["uint8", "int16", "float32"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_no_data_by_value_is_the_plain_definition(
    bands: int, size: int, dtype: str, with_nodata: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 3, (bands, size, size + 1)).astype(dtype)
    if dtype == "float32":
        pixels[rng.random(pixels.shape) < 0.05] = np.nan
    nodata = tuple(float(value) for value in rng.integers(0, 3, bands)) if with_nodata else None
    expected = ~np.isfinite(pixels).all(axis=0)
    if nodata is not None:
        expected |= (pixels == np.array(nodata)[:, None, None]).all(axis=0)
    found = no_data_by_value(pixels, nodata)
    np.testing.assert_array_equal(np.zeros_like(expected) if found is None else found, expected)
    assert found is None or found.any()


def test_no_data_by_value_joins_its_chunks() -> None:
    pixels = np.ones((2, 3000, 300), np.uint8)
    pixels[:, 0, 0] = pixels[:, 2999, 299] = 0
    found = no_data_by_value(pixels, (0.0, 0.0))
    assert found is not None
    assert [tuple(place) for place in np.argwhere(found)] == [(0, 0), (2999, 299)]
