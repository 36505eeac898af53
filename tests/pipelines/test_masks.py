"""What ``segpipe predict`` promises of its masks, through the command, with the local executor."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive import (
    CLASSES,
    TILE_PX,
    make_model,
    objects,
    ok,
    planned,
    predict,
    rows,
    whole_masks,
    write_scene,
)

import segpipe.inference.engine
import segpipe.pipelines.predict as driver
from segpipe.config.model import InputConfig
from segpipe.geometry.grid import make_grid
from segpipe.inference.engine import Engine, EngineConfig
from segpipe.models.file import load_model
from segpipe.rasters.reader import open_scene

Array = np.ndarray[Any, Any]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """All engines that commands make, with their counts."""
    made: list[Engine] = []

    class Watched(Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(segpipe.inference.engine, "Engine", Watched)
    return made


def masks_in_one_piece(run_uri: Path, model: Path, **changes: Any) -> dict[str, Array]:
    """Return each scene's mask as the engine makes it of the whole scene in one block."""
    network, card = load_model(str(model))
    config = EngineConfig(
        tile_px=card.tile_px, batch_size=4, threads=1, precision="fp32", blend=changes.get("blend", "crop")
    )
    engine = Engine(network, card, config)
    masks = {}
    try:
        for _, scene in planned(run_uri):
            grid = make_grid(
                scene.header.height,
                scene.header.width,
                tile_px=card.tile_px,
                margin_px=8,
                block_px=1_000_000,
                **changes,
            )
            assert grid.num_blocks == 1
            block = grid.block(0)
            with open_scene(scene.source, scene.header, InputConfig()) as reader:
                pixels, valid = reader.read(block.read)
            masks[scene.source.scene_id] = engine.segment(pixels, valid, block.tiles).mask
    finally:
        engine.close()
    return masks


def coverage(run_uri: Path) -> dict[str, Array]:
    """Return how many rows hold each pixel of each scene."""
    counts: dict[str, Array] = {}
    columns = ("scene_id", "row_off", "col_off", "height", "width", "scene_height", "scene_width")
    for row in rows(run_uri, *columns):
        shape = (row["scene_height"], row["scene_width"])
        count = counts.setdefault(row["scene_id"], np.zeros(shape, np.uint8))
        row_off, col_off = row["row_off"], row["col_off"]
        count[row_off : row_off + row["height"], col_off : col_off + row["width"]] += 1
    return counts


@pytest.mark.parametrize("blend", ["crop", "linear"])
@pytest.mark.parametrize("downsample", [1, 2])
def test_masks_are_the_same_for_every_block_size_and_unit_size(
    tmp_path: Path, blend: str, downsample: int
) -> None:
    model = make_model(tmp_path / "model.safetensors")
    pixels = write_scene(tmp_path / "in/tiled.tif", 157, 211, nodata=0)
    pixels[:, 20:90, 30:75] = 0
    write_scene(tmp_path / "in/tiled.tif", 157, 211, pixels=pixels, nodata=0)
    write_scene(tmp_path / "in/strips.tif", 157, 211, pixels=pixels, nodata=0, strips=True)
    write_scene(tmp_path / "in/tall.tif", 190, 40, seed=3)
    cuts = [{"block_px": 32, "unit_px": 5000}, {"block_px": 75, "unit_px": 20_000}, {"block_px": 4096}]
    num_rows = []
    expected: dict[str, Array] = {}
    for number, cut in enumerate(cuts):
        run = tmp_path / f"run{number}"
        ok(predict(tmp_path / "in", model, run, blend=blend, downsample=downsample, **cut))
        expected = expected or masks_in_one_piece(run, model, blend=blend, downsample=downsample)
        masks = whole_masks(run)
        assert masks.keys() == {"tiled", "strips", "tall"}
        for name, mask in masks.items():
            assert np.array_equal(mask, expected[name]), (name, cut)
            assert (coverage(run)[name] == 1).all()
        num_rows.append(len(rows(run, "scene_id")))
    assert num_rows[0] > num_rows[1] > num_rows[2] == 3
    assert np.array_equal(masks["tiled"], masks["strips"])
    assert ((masks["tiled"] == 255) == (pixels == 0).all(axis=0)).all()
    assert set(np.unique(masks["tiled"])) == {0, 1, 2, 255}, "the model must see classes to tell apart"


def test_objects_are_byte_equal_in_every_order_of_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model.safetensors")
    for number in range(4):
        write_scene(tmp_path / f"in/{number}.tif", 90 + 11 * number, 130, seed=number)
    cut = {"block_px": 40, "unit_px": 6000}
    ok(predict(tmp_path / "in", model, tmp_path / "straight", **cut))
    straight = objects(tmp_path / "straight")
    assert len(straight) > 8
    real = driver.missing_units

    def shuffled(storage: Any) -> Any:
        missing, total = real(storage)
        single = [unit for units in missing for unit in units.split(1)]
        random.Random(5).shuffle(single)
        return single, total

    monkeypatch.setattr(driver, "missing_units", shuffled)
    ok(predict(tmp_path / "in", model, tmp_path / "shuffled", **cut))
    assert objects(tmp_path / "shuffled") == straight


@pytest.mark.parametrize("blend", ["crop", "linear"])
def test_a_pixel_classifier_gives_what_each_pixel_says(tmp_path: Path, blend: str) -> None:
    model = make_model(tmp_path / "model.safetensors", "pixel")
    sizes = {"dot": (1, 1), "line": (3, 200), "small": (17, 31), "tile": (32, 32), "big": (101, 143)}
    pixels = {
        name: write_scene(tmp_path / f"in/{name}.tif", *size, seed=number)
        for number, (name, size) in enumerate(sizes.items())
    }
    ok(predict(tmp_path / "in", model, tmp_path / "run", blend=blend, block_px=50, unit_px=9000))
    masks = whole_masks(tmp_path / "run")
    assert masks.keys() == pixels.keys()
    for name, mask in masks.items():
        assert np.array_equal(mask, pixels[name].argmax(axis=0)), name


def test_a_scene_without_data_is_empty_and_costs_no_forward_pass(
    tmp_path: Path, engines: list[Engine]
) -> None:
    model = make_model(tmp_path / "model.safetensors")
    write_scene(tmp_path / "in/void.tif", 100, 140, pixels=np.zeros((3, 100, 140), np.uint8), nodata=0)
    ok(predict(tmp_path / "in", model, tmp_path / "run", block_px=64))
    found = rows(tmp_path / "run", "status", "valid_px", "class_px", "mask", "height", "width")
    assert {row["status"] for row in found} == {"empty"}
    assert all(row["valid_px"] == 0 and row["class_px"] == [0] * len(CLASSES) for row in found)
    assert (whole_masks(tmp_path / "run")["void"] == 255).all()
    assert [(engine.stats.batches, engine.stats.tiles_computed) for engine in engines] == [(0, 0)]
    assert engines[0].stats.tiles_empty > 1


def test_small_scenes_share_units_and_batches(tmp_path: Path, engines: list[Engine]) -> None:
    model = make_model(tmp_path / "model.safetensors")
    for number in range(200):
        write_scene(tmp_path / f"in/{number:03d}.tif", 20 + number % 20, 24, seed=number)
    done = ok(
        predict(tmp_path / "in", model, tmp_path / "run", "--json", unit_px=100 * TILE_PX**2, batch_size=4)
    ).tree
    assert (done["summary"]["scenes"]["ok"], done["units"]) == (200, 2)
    stats = engines[0].stats
    tiles = sum(1 + (20 + number % 20 > TILE_PX) for number in range(200))
    assert stats.tiles_computed == tiles
    fewest = -(-tiles // 4)
    assert fewest <= stats.batches <= fewest + 3
