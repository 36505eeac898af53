"""The driver's memory does not grow with the number of units, and how many units a second pass through Ray.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_scale.py
Target: peak memory of the driver within 10 % from 1,000 to 100,000 tiny units. One scene is cut into blocks
of one cell of 16 px, each a unit of its own; the model is a 1x1 convolution.
SEGPIPE_BENCH_UNITS sets the larger number.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.models.families import build
from segpipe.models.file import save_model

pytestmark = pytest.mark.benchmark

FEW = 1_000
MANY = int(os.environ.get("SEGPIPE_BENCH_UNITS", "100000"))
TILE_PX, MARGIN_PX = 32, 8
CELL_PX = TILE_PX - 2 * MARGIN_PX


@dataclass(frozen=True, slots=True)
class Measured:
    units: int
    peak_bytes: int
    """Largest resident memory of the driver process."""
    units_per_s: float


def write_scene(path: Path, units: int) -> Path:
    side_px = math.isqrt(units) * CELL_PX + 2 * MARGIN_PX
    pixels = np.random.default_rng(0).integers(1, 255, (3, side_px, side_px), dtype=np.uint8)
    shape = {"height": side_px, "width": side_px, "count": 3, "dtype": "uint8"}
    with rasterio.open(
        path, "w", driver="GTiff", tiled=True, blockxsize=256, blockysize=256, **shape
    ) as file:
        file.write(pixels)
    return path


def write_model(path: Path) -> Path:
    torch.manual_seed(0)
    card = ModelCard(
        family="pixel", options={"width": 0}, bands=("red", "green", "blue"), tile_px=TILE_PX,
        mean=(125.0,) * 3, std=(70.0,) * 3,
        classes=(ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(9, 9, 9))),
    )  # fmt: skip
    save_model(path, build("pixel", bands=3, classes=2, width=0), card)
    return path


def measure(scene: Path, model: Path, run: Path) -> Measured:
    command = [
        sys.executable, "-m", "segpipe.cli.main", "predict", str(scene), "--model", str(model), "--json",
        "-o", str(run), "--set", f"inference.margin_px={MARGIN_PX}", "--set", f"inference.block_px={CELL_PX}",
        "--set", "inference.unit_px=1", "--set", "inference.batch_size=64",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    peak_bytes = 0
    try:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"VmHWM:\s+(\d+) kB", status)
            peak_bytes = max(peak_bytes, int(found[1]) * 1024 if found else 0)
            time.sleep(0.1)
        out, errors = process.communicate()
        assert process.returncode == 0, errors
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    units = json.loads(out)["units"]
    times_s = [path.stat().st_mtime for path in (run / "masks").glob("*/*.parquet")]
    return Measured(units, peak_bytes, units / (max(times_s) - min(times_s)))


def test_driver_memory_is_flat(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.safetensors")
    results = []
    for units in (FEW, MANY):
        scene = write_scene(tmp_path / f"scene-{units}.tif", units)
        results.append(measure(scene, model, tmp_path / f"run-{units}"))
        print(f"\n{results[-1].units} units: driver {results[-1].peak_bytes / 1e6:.0f} MB, "
              f"{results[-1].units_per_s:.0f} units/s")  # fmt: skip
    few, many = results
    assert many.units >= 0.98 * MANY
    print(f"driver memory: {many.peak_bytes / few.peak_bytes:.3f} x (target 0.9 to 1.1)")
