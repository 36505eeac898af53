"""The engine against plain torch and numpy: same classes, whatever the batch, block, pixel type or path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines import (
    PATHS,
    TILE_PX,
    CountingPath,
    assert_classes_agree,
    centred,
    grid_of,
    make_card,
    make_pixels,
    naive_scene,
    segment_scene,
    small_unet,
)
from torch import Tensor, nn

from segpipe.inference.network import prepare_network
from segpipe.models.families import FAMILIES, build

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the same classes as plain torch


@pytest.mark.parametrize(("family", "classes"), [*((name, 2) for name in sorted(FAMILIES)), ("unet", 19)])
def test_masks_equal_the_naive_loop(family: str, classes: int, make_engine: Any) -> None:
    torch.manual_seed(0)
    model = centred(
        build(family, bands=3, classes=classes, **({"width": 8} if family == "unet" else {})), classes
    )
    card, pixels = make_card(classes), make_pixels(100, 120)
    grid = grid_of(pixels)
    expected = naive_scene(model, card, pixels, grid, None)
    mask = segment_scene(make_engine(model, card), pixels, None, grid)
    assert len(np.unique(expected)) > 1
    assert_classes_agree(mask, expected)


@pytest.mark.parametrize(
    ("family", "options"), [("unet", {"width": 4, "depth": 6}), ("unet_mobilenet_v2", {})]
)
def test_tiles_larger_than_the_first_pass_too(family: str, options: Any, make_engine: Any) -> None:
    """Before any block a corner of a tile is computed: it must do for the deepest network."""
    torch.manual_seed(0)
    model = centred(build(family, bands=3, classes=2, **options), 2)
    card, pixels = make_card(2), make_pixels(150, 140)
    grid = grid_of(pixels, tile_px=128)
    expected = naive_scene(model, card, pixels, grid, None)
    mask = segment_scene(make_engine(model, card, tile_px=128), pixels, None, grid)
    assert len(np.unique(expected)) > 1
    assert_classes_agree(mask, expected)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_every_pixel_type_gives_the_naive_classes(dtype: str, path: Any, make_engine: Any) -> None:
    scale = {"uint8": 1, "uint16": 200, "int16": 100}.get(dtype, 0.01)
    pixels = (make_pixels(100, 90, bands=4).astype(np.float64) * scale).astype(dtype)
    model, card = small_unet(3, bands=4), make_card(3, bands=4, dtype=dtype)
    grid = grid_of(pixels)
    mask = segment_scene(make_engine(model, card, path), pixels, None, grid)
    expected = naive_scene(model, card, pixels, grid, None)
    assert len(np.unique(expected)) == 3
    assert_classes_agree(mask, expected)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("factor", [2, 3, 5])
def test_reduced_scenes_equal_the_mean_of_their_valid_pixels(
    factor: int, path: Any, make_engine: Any, unet: nn.Module
) -> None:
    pixels, card = make_pixels(301, 217), make_card(3)
    valid = np.random.default_rng(0).random((301, 217)) > 0.4
    valid[40:90, 100:160] = False
    grid = grid_of(pixels, block_px=120, downsample=factor)
    mask = segment_scene(make_engine(unet, card, path), pixels, valid, grid)
    expected = naive_scene(unet, card, pixels, grid, valid)
    assert (mask != expected).mean() < 1e-3
    np.testing.assert_array_equal(mask == 255, ~valid)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (5, 3), (17, 200), (63, 64)])
def test_scenes_smaller_than_a_tile_are_padded_by_repeated_reflection(
    size: tuple[int, int], path: Any, make_engine: Any, unet: nn.Module
) -> None:
    pixels, card = make_pixels(*size), make_card(3)
    grid = grid_of(pixels)
    mask = segment_scene(make_engine(unet, card, path), pixels, None, grid)
    assert_classes_agree(mask, naive_scene(unet, card, pixels, grid, None))


@pytest.mark.parametrize("blend", ["crop", "linear"])
@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("classes", [2, 5])
def test_torch_path_and_cpu_path_agree(blend: Any, factor: int, classes: int, make_engine: Any) -> None:
    pixels, card, model = make_pixels(260, 300), make_card(classes), small_unet(classes)
    valid = np.ones((260, 300), np.uint8)
    valid[:, :80] = 0
    grid = grid_of(pixels, block_px=130, blend=blend, downsample=factor)
    masks = [
        segment_scene(make_engine(model, card, path, blend=blend), pixels, valid, grid)
        for path in PATHS.values()
    ]
    assert (masks[0] != masks[1]).mean() < 1e-4
    assert len(np.unique(masks[0])) == classes + 1


# ---- independent of batch, place and block


@pytest.mark.parametrize("channels", [2, 19])
def test_logits_of_a_tile_are_the_same_bits_in_every_place_of_the_batch(channels: int) -> None:
    for model in (small_unet(channels), build("unet_mobilenet_v2", bands=3, classes=channels).eval()):
        forward = prepare_network(model, device="cpu", precision="fp32", compile_network=False)
        tile = torch.randn(3, TILE_PX, TILE_PX)
        seen = []
        with torch.inference_mode():
            for place in range(4):
                for others in (torch.zeros(4, 3, TILE_PX, TILE_PX), torch.randn(4, 3, TILE_PX, TILE_PX)):
                    batch = others.contiguous(memory_format=torch.channels_last)
                    batch[place] = tile
                    seen.append(forward(batch)[place].clone())
        assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("blend", ["crop", "linear"])
@pytest.mark.parametrize("factor", [1, 2])
def test_mask_is_the_same_bits_for_every_block_size(
    factor: int, blend: Any, path: Any, make_engine: Any, unet: nn.Module
) -> None:
    pixels, card = make_pixels(310, 270), make_card(3)
    valid = np.ones((310, 270), np.uint8)
    valid[100:230, 20:140] = 0
    masks = []
    for block_px in (10_000, 150, 60, 1):
        engine = make_engine(unet, card, path, blend=blend, batch_size=3)
        grid = grid_of(pixels, block_px, blend=blend, downsample=factor)
        masks.append(segment_scene(engine, pixels, valid, grid))
        engine.close()
    for other in masks[1:]:
        np.testing.assert_array_equal(masks[0], other)
    assert len(np.unique(masks[0])) == 4


def test_mask_is_the_same_bits_among_other_scenes(make_engine: Any, unet: nn.Module) -> None:
    card = make_card(3)
    engine = make_engine(unet, card)
    pixels = [make_pixels(90, 100, seed=seed) for seed in range(5)]
    plans = [grid_of(p).block(0).tiles for p in pixels]
    alone = [engine.segment(p, None, plan).mask for p, plan in zip(pixels, plans, strict=True)]
    with engine.reading():
        together = [engine.submit(p, None, plan) for p, plan in zip(pixels, plans, strict=True)]
    for one, future in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, future.result(60).mask)


# ---- linear blend


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("blend", ["crop", "linear"])
def test_pointwise_model_gives_the_whole_images_mask(blend: Any, path: Any, make_engine: Any) -> None:
    model = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.randint(-9, 9, (4, 3, 1, 1), generator=torch.Generator().manual_seed(3)))
        model.bias.copy_(torch.tensor([0.0, 300.0, -200.0, 100.0]))
    card = make_card(4).model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    pixels = np.random.default_rng(0).integers(0, 256, (3, 230, 333), dtype=np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).float()[None]).argmax(1)[0].numpy()
    grid = grid_of(pixels, block_px=100, blend=blend)
    mask = segment_scene(make_engine(model, card, path, blend=blend), pixels, None, grid)
    np.testing.assert_array_equal(mask, expected)


def test_linear_blend_is_the_weighted_mean_of_all_tiles(make_engine: Any, unet: nn.Module) -> None:
    pixels, card = make_pixels(100, 160), make_card(3)
    grid = grid_of(pixels, blend="linear")
    mean, std = (torch.tensor(v)[:, None, None] for v in (card.mean, card.std))
    x = (torch.from_numpy(pixels).float() - mean) / std
    sums = torch.zeros(3, 100, 160, dtype=torch.float64)

    def fade(start: int, length: int) -> Tensor:
        place = torch.arange(TILE_PX, dtype=torch.float64) + 0.5
        rising = place if start > 0 else torch.full_like(place, TILE_PX)
        falling = TILE_PX - place if start + TILE_PX < length else torch.full_like(place, TILE_PX)
        return torch.minimum(rising, falling)

    for top in grid.rows.origins:
        for left in grid.cols.origins:
            there = (slice(None), slice(top, top + TILE_PX), slice(left, left + TILE_PX))
            with torch.no_grad():
                logits = unet(x[there][None])[0].double()
            sums[there] += logits * fade(top, 100)[:, None] * fade(left, 160)
    mask = segment_scene(make_engine(unet, card, blend="linear"), pixels, None, grid)
    assert_classes_agree(mask, sums.argmax(0).numpy())


# ---- no data


def test_tiles_without_valid_pixels_cost_no_forward_pass(make_engine: Any, unet: nn.Module) -> None:
    pixels, card = make_pixels(TILE_PX * 4, TILE_PX * 4), make_card(3)
    engine = make_engine(unet, card, CountingPath, batch_size=1)
    grid = grid_of(pixels)
    plan = grid.block(0).tiles
    valid = np.zeros(pixels.shape[1:], bool)
    assert (engine.segment(pixels, valid, plan).mask == 255).all()
    assert engine._path.sizes == []
    valid[plan.rows[1].start + plan.rows[1].cell_start, plan.cols[2].start + plan.cols[2].cell_start] = True
    result = engine.segment(pixels, valid, plan)
    assert engine._path.sizes == [1]
    assert (result.tiles_computed, result.tiles_empty) == (1, plan.num_tiles - 1)
    assert (result.mask != 255).sum() == 1


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_no_data_pixels_enter_as_the_band_mean(path: Any, make_engine: Any, unet: nn.Module) -> None:
    card, grid = make_card(3, dtype="float32"), grid_of(make_pixels(120, 100))
    pixels = make_pixels(120, 100).astype(np.float32) * 0.01
    valid = np.ones((120, 100), bool)
    valid[30:70, 20:60] = False
    engine = make_engine(unet, card, path)
    masks = []
    for filler in (np.asarray(card.mean, np.float32)[:, None], np.float32(1e9), np.float32(np.nan)):
        filled = pixels.copy()
        filled[:, ~valid] = filler
        masks.append(segment_scene(engine, filled, valid, grid))
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])
    np.testing.assert_array_equal(masks[0] == 255, ~valid)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("factor", [1, 2])
def test_numbers_that_are_not_finite_do_not_spread(
    factor: int, path: Any, make_engine: Any, unet: nn.Module
) -> None:
    card = make_card(3, dtype="float32")
    pixels = make_pixels(150, 150).astype(np.float32) * 0.01
    grid = grid_of(pixels, downsample=factor)
    engine = make_engine(unet, card, path)
    clean = segment_scene(engine, pixels, None, grid)
    pixels[0, 3, 4], pixels[1, 5, 6] = np.nan, np.inf
    spoilt = segment_scene(engine, pixels, None, grid)
    assert (clean != spoilt)[64:, 64:].sum() == 0
    assert len(np.unique(spoilt)) == 3


def test_arguments_are_left_as_they_were(make_engine: Any, unet: nn.Module) -> None:
    pixels, valid = make_pixels(100, 100), np.random.default_rng(0).random((100, 100)) > 0.5
    pixels.flags.writeable = valid.flags.writeable = False
    before = pixels.copy(), valid.copy()
    plan = grid_of(pixels).block(0).tiles
    for path in PATHS.values():
        engine = make_engine(unet, make_card(3), path)
        first = engine.segment(pixels, valid, plan).mask
        wider = np.zeros((3, 100, 300), np.uint8)
        wider[:, :, ::3] = pixels
        np.testing.assert_array_equal(first, engine.segment(wider[:, :, ::3], valid, plan).mask)
    np.testing.assert_array_equal(before[0], pixels)
    np.testing.assert_array_equal(before[1], valid)
