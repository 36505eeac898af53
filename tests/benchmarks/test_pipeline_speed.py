"""Steady state of ``segpipe predict`` against its own engine, and against a usual script.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_pipeline_speed.py
Targets: slope / tuned loop >= 0.90 (U-Net 16) and >= 0.85 (LR-ASPP); >= 2.8 x MONAI's
sliding_window_inference; no-op model >= 85 Mpx/s on 2 cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import archives
import numpy as np
import pytest
import steady
from engine_loops import LoopProcess

from segpipe.inference.defaults import CPU_BATCH

pytestmark = pytest.mark.benchmark

SIDE_PX = 8192
TILES = 19  # a side of 8192 px has 19 tiles of 512 px with 32 px of margin
ROUNDS = int(os.environ.get("BENCHMARK_ROUNDS", "2"))

MONAI_SCRIPT = """
import sys, time
import numpy as np, rasterio, torch
from monai.inferers import sliding_window_inference
from segpipe.models.file import load_model

model, card = load_model(sys.argv[1])
mean, std = (torch.tensor(v)[:, None, None] for v in (card.mean, card.std))
begun = time.perf_counter()
with rasterio.open(sys.argv[2]) as source:
    image = torch.from_numpy(source.read())
    profile = source.profile
x = ((image.float() - mean) / std)[None]
with torch.no_grad():
    logits = sliding_window_inference(x, 512, 4, model, overlap=0.125, mode="constant")
profile.update(count=1, compress="deflate")
with rasterio.open(sys.argv[3], "w", **profile) as target:
    target.write(logits.argmax(1).to(torch.uint8).numpy())
print(time.perf_counter() - begun)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


def predict_seconds(archive: Path, model: Path, output: Path, *sets: str) -> float:
    shutil.rmtree(output, ignore_errors=True)
    return archives.run_timed(archives.predict_command(archive, model, output, *sets)).seconds


@pytest.mark.parametrize("executor", ["ray", "local"])
@pytest.mark.parametrize("family", ["unet:16", "lraspp_mobilenet_v3_large"])
def test_steady_state_against_the_engine(folder: Path, family: str, executor: str) -> None:
    scene = archives.write_scene(folder / "scene.tif", SIDE_PX)
    model = archives.write_model(folder / f"{family.partition(':')[0]}.safetensors", family)
    one, two = (archives.make_archive(folder, scene, copies) for copies in (1, 2))
    loop = LoopProcess("engine", family, 2, CPU_BATCH, (TILES, TILES))
    engine_s: list[float] = []
    slopes: list[float] = []
    for _ in range(ROUNDS):
        engine_s.append(loop.time())
        short, long = (
            predict_seconds(archive, model, folder / "run", f"cluster.executor={executor}")
            for archive in (one, two)
        )
        slopes.append(long - short)
        print(f"{family} {executor}: {short:.1f} s, {long:.1f} s; engine {engine_s[-1]:.1f} s", flush=True)
    loop.close()
    base, slope = archives.median(engine_s), archives.median(slopes)
    print(
        f"{family} {executor}: {TILES**2 / slope:.2f} tiles/s, {SIDE_PX**2 / 1e6 / slope:.2f} Mpx/s, "
        f"{base / slope:.3f} of the engine loop ({TILES**2 / base:.2f} tiles/s)"
    )


def test_whole_run_against_monai(folder: Path) -> None:
    pytest.importorskip("monai", reason="pip install monai to compare with it")
    scene = archives.write_scene(folder / "scene.tif", SIDE_PX)
    model = archives.write_model(folder / "lraspp.safetensors", "lraspp_mobilenet_v3_large")
    one, two = (archives.make_archive(folder, scene, copies) for copies in (1, 2))
    ratios = []
    for _ in range(ROUNDS):
        script = [sys.executable, "-c", MONAI_SCRIPT, str(model), str(scene), str(folder / "monai.tif")]
        monai_s = float(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
        short = predict_seconds(one, model, folder / "run")
        long = predict_seconds(two, model, folder / "run")
        ratios.append(monai_s / (long - short))
        print(f"monai {monai_s:.1f} s; segpipe {short:.1f} s, slope {long - short:.1f} s", flush=True)
    print(f"steady state {archives.median(ratios):.2f} x MONAI sliding_window_inference (constant)")


def test_no_op_model_throughput(folder: Path) -> None:
    scene = archives.write_scene(folder / "scene.tif", SIDE_PX)
    model = archives.write_model(folder / "unet.safetensors", "unet:16")
    archive = archives.make_archive(folder, scene, 8)
    rates = []
    for _ in range(3):
        shutil.rmtree(folder / "run", ignore_errors=True)
        rates.append(steady.rate(steady.NOOP_MODEL, model, str(archive), str(folder / "run")))
        print(f"no-op: {rates[-1]:.1f} Mpx/s", flush=True)
    print(f"no-op model: {archives.median(rates):.1f} Mpx/s (target 85)")


def test_tiles_computed_are_the_fewest(folder: Path) -> None:
    """Not a timing: with ``blend: crop`` every necessary tile is computed once."""
    from segpipe.config.card import ClassInfo, ModelCard
    from segpipe.geometry.grid import make_grid
    from segpipe.inference.engine import Engine, EngineConfig
    from segpipe.models.families import build

    card = ModelCard(
        family="unet",
        options={"width": 4, "depth": 2},
        bands=("red", "green", "blue"),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        tile_px=64,
        classes=(ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(1, 1, 1))),
    )
    model = build("unet", bands=3, classes=2, width=4, depth=2).eval()
    engine = Engine(model, card, EngineConfig(tile_px=64, batch_size=4))
    engine.start()
    grid = make_grid(700, 500, tile_px=64, margin_px=8, block_px=128)
    image = np.zeros((3, 700, 500), np.uint8)
    computed = 0
    begun = time.perf_counter()
    for block in grid.blocks():
        rows, cols = block.read.slices_in(block.read.__class__(0, 0, 700, 500))
        computed += engine.segment(
            np.ascontiguousarray(image[:, rows, cols]), None, block.tiles
        ).tiles_computed
    engine.close()
    print(
        f"tiles computed / necessary = {computed / grid.num_tiles:.2f} ({time.perf_counter() - begun:.1f} s)"
    )
    assert computed == grid.num_tiles
