"""The engine against plain torch and numpy: same classes, whatever the batch, block, pixel type or path."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.errors import ConfigError, SegpipeError
from segpipe.geometry.grid import SceneGrid, Window, make_grid
from segpipe.inference import kernels
from segpipe.inference.cpu_path import CpuPath
from segpipe.inference.device import default_batch_size, has_bf16_units, pick_device, resolve_precision
from segpipe.inference.engine import Engine, EngineConfig
from segpipe.inference.jobs import BlockJob, Done, TileRef
from segpipe.inference.memory import keep_freed_pages
from segpipe.inference.network import first_call, fold_batch_norms, prepare_network
from segpipe.inference.torch_path import TorchPath
from segpipe.models.families import FAMILIES, build

TILE_PX = 64
MARGIN_PX = 8
PATHS = {"cpu": CpuPath, "torch": TorchPath}

Array = np.ndarray[Any, Any]


def make_card(classes: int, bands: int = 3, dtype: str = "uint8") -> ModelCard:
    scale = {"uint8": 1.0, "uint16": 200.0, "int16": 100.0}.get(dtype, 0.01)
    return ModelCard(
        family="unet",
        bands=tuple(f"band{i}" for i in range(bands)),
        dtype=dtype,
        mean=tuple(scale * (100.0 + 10 * i) for i in range(bands)),
        std=tuple(scale * (60.0 + 5 * i) for i in range(bands)),
        tile_px=TILE_PX,
        classes=tuple(ClassInfo(name=f"class {i}", color=(i, i, i)) for i in range(classes)),
    )


def centred(model: nn.Module, classes: int, bands: int = 3) -> nn.Module:
    """Give batch norms statistics and the last layer a bias, so that every class occurs."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    x = F.interpolate(torch.randn(2, bands, 16, 16), size=(TILE_PX, TILE_PX), mode="bicubic")
    with torch.no_grad():
        model.train()(x)
        shift = model.eval()(x).mean((0, 2, 3))
        heads = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == classes]
        heads[-1].bias -= shift
    return model


def small_unet(classes: int = 3, bands: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return centred(build("unet", bands=bands, classes=classes, width=4, depth=2), classes, bands)


def make_pixels(height: int, width: int, bands: int = 3, seed: int = 0) -> Array:
    """Smooth uint8 texture (bands, height, width)."""
    coarse = torch.rand(1, bands, 9, 9, generator=torch.Generator().manual_seed(seed)) * 255
    noise = np.random.default_rng(seed).integers(-20, 20, (bands, height, width))
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")[0].numpy()
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def grid_of(pixels: Array, block_px: int = 10_000, **more: Any) -> SceneGrid:
    settings = {"tile_px": TILE_PX, "margin_px": MARGIN_PX, "block_px": block_px, **more}
    return make_grid(*pixels.shape[1:], **settings)


def cut(values: Array | None, window: Window) -> Array | None:
    if values is None:
        return None
    return values[..., window.row_off : window.row_stop, window.col_off : window.col_stop].copy()


def segment_scene(engine: Engine, pixels: Array, valid: Array | None, grid: SceneGrid) -> Array:
    """Segment all blocks of a scene and put them together."""
    mask = np.full(pixels.shape[1:], 77, np.uint8)
    pending = [
        (block, engine.submit(cut(pixels, block.read), cut(valid, block.read), block.tiles))  # type: ignore[arg-type]
        for block in grid.blocks()
    ]
    for block, future in pending:
        mask[block.window.slices_in(Window(0, 0, *pixels.shape[1:]))] = future.result(60).mask
    return mask


def reduce_by(pixels: Array, valid: Array, factor: int) -> Array:
    """Mean of the valid pixels of each group, NaN where there is none (float64)."""
    bands, height, width = pixels.shape
    rows, cols = -(-height // factor), -(-width // factor)
    reduced = np.full((bands, rows, cols), np.nan)
    for r in range(rows):
        for c in range(cols):
            group = (slice(r * factor, (r + 1) * factor), slice(c * factor, (c + 1) * factor))
            if valid[group].any():
                reduced[:, r, c] = pixels[(slice(None), *group)][:, valid[group]].mean(axis=1)
    return reduced


def naive_scene(
    model: nn.Module, card: ModelCard, pixels: Array, grid: SceneGrid, valid: Array | None
) -> Array:
    """What a plain script computes: tile by tile in torch, unfolded, full-size logits, numpy for the rest."""
    everything = np.ones(pixels.shape[1:], bool)
    usable = everything if valid is None else valid.astype(bool)
    values = reduce_by(pixels.astype(np.float64), usable, grid.downsample).astype(np.float32)
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (card.mean, card.std))
    x = np.nan_to_num((values - mean) / std, nan=0.0)
    classes = np.zeros(values.shape[1:], np.uint8)
    plan = (
        make_grid(*values.shape[1:], tile_px=grid.rows.tile_px, margin_px=grid.rows.margin_px, block_px=10**6)
        .block(0)
        .tiles
    )
    for row in plan.rows:
        for col in plan.cols:
            tile = x[:, row.start : row.start + row.size, col.start : col.start + col.size]
            if tile.shape[1:] != (plan.tile_px, plan.tile_px):
                tile = np.pad(
                    tile, ((0, 0), (0, plan.tile_px - row.size), (0, plan.tile_px - col.size)), mode="reflect"
                )
            with torch.no_grad():
                tile_classes = model(torch.from_numpy(tile.copy())[None]).argmax(1)[0].numpy()
            cell = tile_classes[row.cell_start : row.cell_stop, col.cell_start : col.cell_stop]
            classes[row.out_start :, col.out_start :][: cell.shape[0], : cell.shape[1]] = cell
    mask = classes.repeat(grid.downsample, 0).repeat(grid.downsample, 1)
    mask = mask[: pixels.shape[1], : pixels.shape[2]].copy()
    mask[~usable] = 255
    return mask


def assert_classes_agree(mask: Array, expected: Array) -> None:
    """Equal but for near ties, which the last digits of folded logits may tip: 1 pixel in 4000."""
    assert mask.shape == expected.shape
    assert (mask != expected).sum() <= mask.size // 4000


class CountingPath(CpuPath):
    """Counts forward passes and can be told to fail."""

    sizes: list[int]
    fail_on: int = -1

    def start(self) -> None:
        super().start()
        self.sizes = []

    def run(self, tiles: Sequence[TileRef], done: Done) -> None:
        self.sizes.append(len(tiles))
        if len(self.sizes) - 1 == self.fail_on:
            raise RuntimeError("out of memory on the device")
        super().run(tiles, done)


@pytest.fixture
def make_engine() -> Any:
    engines = []

    def make(
        model: nn.Module, card: ModelCard, path: type[CpuPath] | type[TorchPath] | None = None, **more: Any
    ):
        config = EngineConfig(**{"tile_px": TILE_PX, "batch_size": 4, "threads": 1, **more})
        engine = Engine(model, card, config, path=path(model, card, config) if path else None)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Small tensors: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return small_unet()


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


# ---- batches


def test_batches_run_on_across_rows_and_blocks(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(400, 300)
    grid = grid_of(pixels, block_px=100)
    engine = make_engine(unet, make_card(3), CountingPath, batch_size=5)
    with engine.reading():
        futures = [engine.submit(cut(pixels, b.read), None, b.tiles) for b in grid.blocks()]
    for future in futures:
        future.result(60)
    assert grid.num_blocks > 3
    assert engine._path.sizes[:-1] == [5] * (grid.num_tiles // 5)
    assert len(engine._path.sizes) == -(-grid.num_tiles // 5)
    assert engine.stats.tiles_computed == grid.num_tiles


def test_a_part_filled_batch_waits_only_while_a_block_is_being_read(
    make_engine: Any, unet: nn.Module
) -> None:
    pixels = make_pixels(TILE_PX, TILE_PX)
    plan = grid_of(pixels).block(0).tiles
    engine = make_engine(unet, make_card(3), CountingPath, batch_size=2)
    engine.start().result(60)
    engine.submit(pixels, None, plan).result(60)
    assert engine._path.sizes == [1]
    with engine.reading():
        first = engine.submit(pixels, None, plan)
        time.sleep(0.2)
        assert not first.done()
        second = engine.submit(pixels, None, plan)
        first.result(60)
        second.result(60)
    assert engine._path.sizes == [1, 2]


def test_a_reader_that_never_submits_does_not_block_others_for_ever(
    make_engine: Any, unet: nn.Module
) -> None:
    pixels = make_pixels(TILE_PX, TILE_PX)
    engine = make_engine(unet, make_card(3), batch_size=8)
    with engine.reading():
        assert engine.segment(pixels, None, grid_of(pixels).block(0).tiles).tiles_computed == 1


def test_blocks_from_many_threads_come_back_to_their_callers(make_engine: Any, unet: nn.Module) -> None:
    card = make_card(3)
    engine = make_engine(unet, card, batch_size=3)
    pixels = [make_pixels(60 + 20 * i, 110 - 10 * i, seed=i) for i in range(6)]
    results: dict[int, Array] = {}

    def work(i: int) -> None:
        with engine.reading():
            future = engine.submit(pixels[i], None, grid_of(pixels[i]).block(0).tiles)
        results[i] = future.result(60).mask

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, values in enumerate(pixels):
        assert_classes_agree(results[i], naive_scene(unet, card, values, grid_of(values), None))


def test_mask_is_the_same_bits_for_every_number_of_threads(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(200, 200)
    one, two = (
        segment_scene(make_engine(unet, make_card(3), threads=n), pixels, None, grid_of(pixels))
        for n in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


# ---- faults


def test_a_failed_batch_fails_its_blocks_and_the_engine_goes_on(make_engine: Any, unet: nn.Module) -> None:
    small, large = make_pixels(TILE_PX, TILE_PX), make_pixels(300, 300)
    engine = make_engine(unet, make_card(3), CountingPath, batch_size=4)
    engine.start().result(60)
    engine._path.fail_on = 0
    with engine.reading():
        doomed = [engine.submit(p, None, grid_of(p).block(0).tiles) for p in (small, large)]
    for future in doomed:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(60)
    assert len(engine._path.sizes) == 1
    assert engine.segment(large, None, grid_of(large).block(0).tiles).tiles_empty == 0


def test_a_network_that_cannot_start_fails_every_block(make_engine: Any) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no kernel for this device")

    pixels = make_pixels(TILE_PX, TILE_PX)
    engine = make_engine(Broken(), make_card(3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no kernel"):
            engine.segment(pixels, None, grid_of(pixels).block(0).tiles)
    with pytest.raises(RuntimeError, match="no kernel"):
        engine.start().result(60)


def test_close_fails_what_is_open_and_can_be_called_twice(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(TILE_PX, TILE_PX)
    plan = grid_of(pixels).block(0).tiles
    engine = make_engine(unet, make_card(3), batch_size=4)
    with engine.reading():
        future = engine.submit(pixels, None, plan)
        engine.close()
        with pytest.raises(SegpipeError, match="closed before"):
            future.result(60)
    engine.close()
    with pytest.raises(SegpipeError, match="engine is closed"):
        engine.submit(pixels, None, plan)


def test_a_cancelled_block_is_passed_over(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(TILE_PX, TILE_PX)
    plan = grid_of(pixels).block(0).tiles
    release = threading.Event()

    class Slow(CountingPath):
        def start(self) -> None:
            super().start()
            release.wait(60)

    engine = make_engine(unet, make_card(3), Slow)
    cancelled, kept = engine.submit(pixels, None, plan), engine.submit(pixels, None, plan)
    assert cancelled.cancel()
    release.set()
    kept.result(60)
    with pytest.raises(CancelledError):
        cancelled.result(60)
    assert engine._path.sizes == [1]


def test_arguments_that_do_not_fit_are_refused(make_engine: Any, unet: nn.Module) -> None:
    engine = make_engine(unet, make_card(3))
    pixels = make_pixels(100, 100)
    plan = grid_of(pixels).block(0).tiles
    with pytest.raises(ValueError, match="3 bands"):
        engine.submit(pixels[:2], None, plan)
    with pytest.raises(ValueError, match="real numbers"):
        engine.submit(pixels.astype(complex), None, plan)
    with pytest.raises(ValueError, match="valid must be"):
        engine.submit(pixels, np.ones((100, 99), bool), plan)
    with pytest.raises(ValueError, match="reach beyond"):
        engine.submit(pixels[:, :90], None, plan)
    with pytest.raises(ValueError, match="not the engine's"):
        engine.submit(pixels, None, grid_of(pixels, blend="linear").block(0).tiles)
    for wrong in ({"batch_size": 0}, {"precision": "fp8"}, {"precision": "fp16"}):
        with pytest.raises(ConfigError):
            EngineConfig(**{"tile_px": 64, "batch_size": 1, **wrong})


# ---- pieces


@pytest.mark.parametrize("classes", [1, 2, 3, 19])
@pytest.mark.parametrize("low", [(8, 8), (7, 13), (64, 64), (1, 3)])
def test_compiled_upsampling_equals_interpolate_and_argmax(classes: int, low: tuple[int, int]) -> None:
    torch.manual_seed(classes)
    for smooth in (1, 3):
        logits = F.avg_pool2d(torch.randn(1, classes, *low), smooth, 1, smooth // 2)
        expected = (
            F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False).argmax(1)[0].numpy()
        )
        low_logits = logits[0].permute(1, 2, 0).contiguous().numpy()
        mask = np.full((70, 70), 9, np.uint8)
        kernels.classes_from_low(low_logits, 64, (5, 64, 0, 50), mask, 2, 3)
        np.testing.assert_array_equal(mask[2:61, 3:53], expected[5:, :50])
        mask[2:61, 3:53] = 9
        assert (mask == 9).all(), "written outside of the cell"


@pytest.mark.parametrize("classes", [2, 3])
def test_equal_logits_go_to_the_first_class(classes: int) -> None:
    low_logits = np.zeros((4, 4, classes), np.float32)
    low_logits[2:] = np.arange(classes, 0, -1, dtype=np.float32) % classes
    mask = np.full((32, 32), 9, np.uint8)
    kernels.classes_from_low(low_logits, 32, (0, 32, 0, 32), mask, 0, 0)
    logits = torch.from_numpy(low_logits).permute(2, 0, 1)[None]
    expected = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(mask, expected.argmax(1)[0].numpy())
    kernels.classes_from_full(np.zeros((32, 32, classes), np.float32), (0, 32, 0, 32), mask, 0, 0)
    assert (mask == 0).all()


def test_folding_keeps_the_logits_and_leaves_the_model_alone(unet: nn.Module) -> None:
    x = torch.randn(1, 3, TILE_PX, TILE_PX)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    folded = fold_batch_norms(unet)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), unet(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())


def test_a_network_that_cannot_be_traced_runs_unfolded(make_engine: Any, caplog: Any) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(x)
            return y if float(y.sum()) > 1e9 else y + 0.0

    torch.manual_seed(0)
    model, card, pixels = Branching().eval(), make_card(2), make_pixels(100, 100)
    with caplog.at_level("WARNING"):
        mask = segment_scene(make_engine(model, card), pixels, None, grid_of(pixels))
    assert "not folded" in caplog.text
    np.testing.assert_array_equal(mask, naive_scene(model, card, pixels, grid_of(pixels), None))


def test_bf16_classes_stay_close_to_fp32(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(130, 130)
    masks = [
        segment_scene(make_engine(unet, make_card(3), precision=p), pixels, None, grid_of(pixels))
        for p in ("fp32", "bf16")
    ]
    assert 0 < (masks[0] != masks[1]).mean() < 0.05


def test_failing_compilation_says_what_to_install() -> None:
    def no_compiler(x: Tensor) -> Tensor:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    with pytest.raises(ConfigError, match=r"inference\.compile.*No working C\+\+ compiler.*Install"):
        first_call(no_compiler, torch.zeros(1), compile_network=True)
    with pytest.raises(RuntimeError, match="No working"):
        first_call(no_compiler, torch.zeros(1), compile_network=False)


@pytest.mark.slow
def test_compiled_network_gives_the_same_classes(make_engine: Any, unet: nn.Module) -> None:
    pixels, card = make_pixels(150, 150), make_card(3)
    masks = [
        segment_scene(make_engine(unet, card, compile=flag), pixels, None, grid_of(pixels))
        for flag in (False, True)
    ]
    assert (masks[0] != masks[1]).sum() <= 2


def test_device_facts_follow_from_the_hardware(tmp_path: Any, monkeypatch: Any) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu avx2 avx512_bf16 sse\n")
    assert has_bf16_units(cpuinfo)
    cpuinfo.write_text("processor : 0\nflags : fpu avx2 avx512f\n")
    assert not has_bf16_units(cpuinfo)
    assert not has_bf16_units(tmp_path / "absent")
    assert resolve_precision("cpu") == "fp32"
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, s=supported, **__: s)
        assert resolve_precision("cuda:0") == expected
    for available, expected in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda a=available: a)
        assert pick_device() == expected
    assert default_batch_size("cpu", "fp32") < default_batch_size("cuda:0", "bf16")
    with pytest.raises(ConfigError, match="fp8"):
        default_batch_size("cpu", "fp8")


def test_malloc_keeps_pages_with_glibc_and_is_left_alone_elsewhere(monkeypatch: Any) -> None:
    import platform

    assert keep_freed_pages() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_pages() is False


def test_a_block_job_counts_its_reduced_size_up() -> None:
    plan = make_grid(7, 10, tile_px=64, margin_px=8, block_px=99, downsample=4).block(0).tiles
    assert BlockJob(np.zeros((3, 7, 10), np.uint8), None, plan).reduced_shape == (2, 3)
