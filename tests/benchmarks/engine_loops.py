"""The loops that the speed benchmarks compare, and live processes that run them in turns.

``python engine_loops.py`` is one such process: it reads one JSON command a line and answers with one JSON
line. Each loop lives in a process of its own, because malloc settings cannot be undone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.geometry.grid import TilePlan, make_grid
from segpipe.inference.engine import Engine, EngineConfig
from segpipe.models.families import build

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "hot-fair-buildings"
TILE_PX = 512
MARGIN_PX = 32
MEAN = (110.0, 110.0, 100.0)
STD = (50.0, 50.0, 50.0)

Array = np.ndarray[Any, Any]


def mosaic(height: int, width: int) -> Array:
    """Return (3, height, width) uint8 of real drone scenes side by side, or smooth noise."""
    scenes = sorted(DATA.rglob("*_z1[89]_*.tif")) or sorted(DATA.rglob("*.tif"))
    parts = []
    if scenes:
        import rasterio

        for path in scenes[:9]:
            with rasterio.open(path) as source:
                if source.count >= 3 and min(source.shape) >= 1024:
                    parts.append(source.read((1, 2, 3))[:, :1024, :1024])
    if not parts:
        coarse = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 255
        parts = [torch.nn.functional.interpolate(coarse, size=(1024, 1024), mode="bicubic")[0].byte().numpy()]
    rows, cols = -(-height // 1024), -(-width // 1024)
    order = [[parts[(r * cols + c) % len(parts)] for c in range(cols)] for r in range(rows)]
    image = np.concatenate([np.concatenate(row, axis=2) for row in order], axis=1)
    return np.ascontiguousarray(image[:, :height, :width])


def normalised(tiles: list[Array]) -> torch.Tensor:
    """Return float32 (B, 3, T, T), as the usual script makes it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (torch.from_numpy(np.stack(tiles)).float() - mean) / std


def trained_like(family: str, classes: int, pixels: Array) -> tuple[nn.Module, ModelCard]:
    """Return a random network with batch norm statistics of real tiles and all classes about equally likely.

    Many class borders: a harsh case for loops that skip work between equal neighbours.
    """
    torch.manual_seed(7)
    family, _, width = family.partition(":")
    model = build(family, bands=3, classes=classes, **({"width": int(width)} if width else {}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    side = TILE_PX
    x = normalised([pixels[:, :side, :side], pixels[:, -side:, -side:]])
    with torch.no_grad():
        model.train()
        model(x)
        model.eval()
        shift = model(x).mean((0, 2, 3))
        heads = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == classes]
        heads[-1].bias -= shift
    card = ModelCard(
        family=family,
        options={"width": int(width)} if width else {},
        bands=("red", "green", "blue"),
        mean=MEAN,
        std=STD,
        tile_px=TILE_PX,
        classes=tuple(ClassInfo(name=f"class {i}", color=(i, i, i)) for i in range(classes)),
    )
    return model, card


def one_block(height: int, width: int) -> TilePlan:
    """Return the tiles of an image that is one block."""
    grid = make_grid(
        height, width, tile_px=TILE_PX, margin_px=MARGIN_PX, block_px=max(height, width), blend="crop"
    )
    return grid.block(0).tiles


def naive_loop(model: nn.Module, pixels: Array, plan: TilePlan, batch: int) -> Array:
    """What most scripts do: cut, normalise, ``model(x).argmax(1)`` without gradients, keep the cell."""
    mask = np.empty((plan.out_height, plan.out_width), np.uint8)
    spans = [(row, col) for row in plan.rows for col in plan.cols]
    side = plan.tile_px
    for begin in range(0, len(spans), batch):
        part = spans[begin : begin + batch]
        x = normalised([pixels[:, r.start : r.start + side, c.start : c.start + side] for r, c in part])
        x = x.to(next(model.parameters()).dtype)
        with torch.no_grad():
            classes = model(x).argmax(1).to(torch.uint8).numpy()
        for (row, col), tile in zip(part, classes, strict=True):
            cell = tile[row.cell_start : row.cell_stop, col.cell_start : col.cell_stop]
            mask[row.out_start :, col.out_start :][: cell.shape[0], : cell.shape[1]] = cell
    return mask


def tuned_loop(engine: Engine, pixels: Array, plan: TilePlan, repeats: int = 1) -> Array:
    """The engine alone, pixels in memory: the bar that a whole pipeline is held against."""
    futures = [engine.submit(pixels, None, plan) for _ in range(repeats)]
    return [future.result().mask for future in futures][-1]


class LoopProcess:
    """A live process that runs one loop when told to, so that variants can be timed in turns."""

    def __init__(self, loop: str, family: str, classes: int, batch: int, tiles: tuple[int, int], **more: Any):
        """Start the process and wait until it has warmed up. ``tiles``: rows and columns of the image."""
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        setup = {"loop": loop, "family": family, "classes": classes, "batch": batch, "tiles": tiles, **more}
        self.answer = self._ask(setup)

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the loop process ended with {self._process.wait()}")
        return json.loads(line)

    def time(self) -> float:
        """Run the loop once and return its seconds."""
        return self._ask({"run": "time"})["seconds"]

    def mask(self, path: Path) -> Array:
        """Run the loop once and return its mask by way of ``path``."""
        self._ask({"run": "mask", "path": str(path)})
        return np.load(path)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _serve() -> None:
    setup = json.loads(sys.stdin.readline())
    rows, cols = setup["tiles"]
    step = TILE_PX - 2 * MARGIN_PX
    pixels = mosaic(rows * step + 2 * MARGIN_PX, cols * step + 2 * MARGIN_PX)
    plan = one_block(*pixels.shape[1:])
    model, card = trained_like(setup["family"], setup["classes"], pixels)
    engine = None
    if setup["loop"] == "exact":  # the naive loop in float64: what both others round
        model = model.double()
    if setup["loop"] == "engine":
        config = EngineConfig(
            tile_px=TILE_PX,
            batch_size=setup["batch"],
            threads=torch.get_num_threads(),
            compile=setup.get("compile", False),
            precision=setup.get("precision", "fp32"),
        )
        engine = Engine(model, card, config)
        engine.start().result()

    def run() -> Array:
        if engine is not None:
            return tuned_loop(engine, pixels, plan)
        return naive_loop(model, pixels, plan, setup["batch"])

    mask = run()
    print(json.dumps({"px": plan.num_tiles * TILE_PX**2, "classes": np.unique(mask).tolist()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        begun = time.perf_counter()
        mask = run()
        seconds = time.perf_counter() - begun
        if command["run"] == "mask":
            np.save(command["path"], mask)
        print(json.dumps({"seconds": seconds}), flush=True)
    if engine is not None:
        engine.close()


if __name__ == "__main__":
    _serve()
