"""The engine on a GPU against the usual loop on it and the bare forward pass, pixels in memory.

Run: python -m pytest --noconftest -m "benchmark and gpu" -s tests/benchmarks/test_gpu_speed.py
Variants take turns in one process; ratios are of medians; no time is asserted. All compute in the same
number format, fp32 without TF32. The loop cuts its tiles on the host, sends them as uint8, normalises on the
device and brings its classes back by ``.cpu()``. ``forward`` is the folded network alone on pixels that are
on the device already: the most that any pipeline around it can reach.
SEGPIPE_BENCH_SCENE_PX sets the scene's side, SEGPIPE_TEST_DEVICE=cpu tries the loops where no GPU is.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import numpy as np
import pytest
import torch
from engine_loops import MARGIN_PX, MEAN, STD, TILE_PX, trained_like
from torch import nn

from segpipe.geometry.grid import SceneGrid, TilePlan, Window, make_grid
from segpipe.inference.device import DTYPES
from segpipe.inference.engine import Engine, EngineConfig
from segpipe.inference.network import prepare_network
from segpipe.inference.torch_path import TorchPath

DEVICE: Final = torch.device(os.environ.get("SEGPIPE_TEST_DEVICE", "cuda:0"))
ON_GPU: Final = DEVICE.type == "cuda"

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.gpu,
    pytest.mark.skipif(
        ON_GPU and not torch.cuda.is_available(), reason="torch.cuda.is_available() is false on this machine"
    ),
]

SCENE_PX: Final = int(os.environ.get("SEGPIPE_BENCH_SCENE_PX", "8192"))
BLOCK_PX: Final = SCENE_PX // 2
BATCH: Final = 32 if ON_GPU else 2
CLASSES: Final = 2
ROUNDS: Final = 3
ENGINE_PASSES: Final = 4 if ON_GPU else 1
"""Times that the engine goes over the scene in one round: one pass is over too soon."""
FORWARD_BATCHES: Final = 32 if ON_GPU else 2

Array = np.ndarray[Any, Any]


def scene_blocks() -> tuple[list[tuple[Array, TilePlan, Window]], SceneGrid]:
    """Return the scene, smooth noise, as pixels (3, h, w) uint8, tile plan and place of each block."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((1, 3, 96, 96), np.float32)) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(1024, 1024), mode="bilinear")[0].byte().numpy()
    repeats = -(-SCENE_PX // 1024)
    pixels = np.tile(smooth, (1, repeats, repeats))[:, :SCENE_PX, :SCENE_PX]
    grid = make_grid(SCENE_PX, SCENE_PX, tile_px=TILE_PX, margin_px=MARGIN_PX, block_px=BLOCK_PX)
    scene = Window(0, 0, SCENE_PX, SCENE_PX)
    blocks = [
        (np.ascontiguousarray(pixels[(slice(None), *block.read.slices_in(scene))]), block.tiles, block.window)
        for block in grid.blocks()
    ]
    return blocks, grid


def wait_for_device() -> None:
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)


class NaiveLoop:
    """What most scripts do on a GPU, in batches of the engine's size."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self._model = model.to(DEVICE)
        self._mean, self._std = (torch.tensor(v, device=DEVICE)[:, None, None] for v in (MEAN, STD))
        self._precision = precision

    def _number_format(self) -> AbstractContextManager[Any]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(DEVICE.type, dtype=DTYPES[self._precision])

    def classes(self, tiles: list[Array]) -> Array:
        """Return the classes of up to a batch of tiles, uint8 (B, T, T)."""
        x = (torch.from_numpy(np.stack(tiles)).to(DEVICE).float() - self._mean) / self._std
        with torch.no_grad(), self._number_format():
            return self._model(x).argmax(1).to(torch.uint8).cpu().numpy()

    def mask(self, pixels: Array, plan: TilePlan) -> Array:
        """Return the mask of one block."""
        out = np.empty((plan.out_height, plan.out_width), np.uint8)
        spans = [(row, col) for row in plan.rows for col in plan.cols]
        for begin in range(0, len(spans), BATCH):
            part = spans[begin : begin + BATCH]
            tiles = [pixels[:, r.start : r.start + TILE_PX, c.start : c.start + TILE_PX] for r, c in part]
            for (row, col), tile in zip(part, self.classes(tiles), strict=True):
                cell = tile[row.cell_start : row.cell_stop, col.cell_start : col.cell_stop]
                out[row.out_start :, col.out_start :][: cell.shape[0], : cell.shape[1]] = cell
        return out


def run_engine(engine: Engine, blocks: list[tuple[Array, TilePlan, Window]], passes: int) -> list[Array]:
    """Return the masks of the last pass; all passes are queued at once."""
    futures = [engine.submit(pixels, None, plan) for _ in range(passes) for pixels, plan, _ in blocks]
    return [future.result().mask for future in futures][-len(blocks) :]


def seconds(work: Callable[[], object]) -> float:
    wait_for_device()
    begun = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - begun


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["lraspp_mobilenet_v3_large", "unet:16"])
def test_gpu_engine_against_the_naive_loop(family: str, precision: str) -> None:
    if family.startswith("lraspp"):
        pytest.importorskip("torchvision", reason="LR-ASPP is made by torchvision, which is not installed")
    blocks, grid = scene_blocks()
    model, card = trained_like(family, CLASSES, blocks[0][0])
    config = EngineConfig(
        tile_px=TILE_PX,
        batch_size=BATCH,
        threads=os.cpu_count() or 1,
        precision=precision,
        device=str(DEVICE),
    )
    engine = Engine(model, card, config, path=TorchPath(model, card, config))
    try:
        engine.start().result()
        forward = prepare_network(model, device=str(DEVICE), precision=precision, compile_network=False)
        naive = NaiveLoop(model, precision)  # last: it moves the model
        x = torch.zeros((BATCH, 3, TILE_PX, TILE_PX), device=DEVICE)
        x = x.contiguous(memory_format=torch.channels_last)

        def run_forward() -> None:
            with torch.inference_mode():
                for _ in range(FORWARD_BATCHES):
                    forward(x)

        variants: dict[str, tuple[Callable[[], object], int]] = {
            "naive": (lambda: [naive.mask(pixels, plan) for pixels, plan, _ in blocks], grid.num_tiles),
            "engine": (lambda: run_engine(engine, blocks, ENGINE_PASSES), ENGINE_PASSES * grid.num_tiles),
            "forward": (run_forward, FORWARD_BATCHES * BATCH),
        }
        masks = run_engine(engine, blocks, 1)
        expected = [naive.mask(pixels, plan) for pixels, plan, _ in blocks]
        times_s: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(ROUNDS):
            for name, (work, _) in variants.items():
                times_s[name].append(seconds(work))
    finally:
        engine.close()
    rate = {
        name: tiles * TILE_PX**2 / 1e6 / statistics.median(times_s[name])
        for name, (_, tiles) in variants.items()
    }
    agree = 1 - np.mean([(a != b).mean() for a, b in zip(masks, expected, strict=True)])
    device = torch.cuda.get_device_name(DEVICE) if ON_GPU else "CPU"
    print(f"\n{family} {precision}, {TILE_PX} px, batch {BATCH}, {SCENE_PX} px scene on {device}, torch "
          f"{torch.__version__}; Mpx/s of tiles, median of {ROUNDS} rounds in turns")  # fmt: skip
    for name in variants:
        spread = f"{min(times_s[name]):.3f}-{max(times_s[name]):.3f} s"
        print(f"  {name:8} {rate[name]:9.1f} Mpx/s ({spread})")
    print(f"  engine {rate['engine'] / rate['naive']:.2f} x naive, {rate['engine'] / rate['forward']:.2f} of "
          f"forward; {agree:.4%} of pixels as the naive loop's")  # fmt: skip
    assert agree >= (0.9999 if precision == "fp32" else 0.9)
    assert set(np.unique(np.concatenate([mask.ravel() for mask in masks]))) == set(range(CLASSES))
