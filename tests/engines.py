"""Small networks, scenes and the plain script that the engine is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.geometry.grid import SceneGrid, Window, make_grid
from segpipe.inference.cpu_path import CpuPath
from segpipe.inference.engine import Engine
from segpipe.inference.jobs import Done, TileRef
from segpipe.inference.torch_path import TorchPath
from segpipe.models.families import build

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
