"""From the command to the first finished unit, against bare scripts that do the same forward pass.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_startup.py
Targets: with Ray <= 1.6 x a script that imports torch and ray, starts Ray without dashboard and runs the
forward; --executor local <= 1.3 x a script without Ray; segpipe --help < 0.5 s. Rounds are interleaved, the
first is not counted (page cache).
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import segpipe

pytestmark = pytest.mark.benchmark

ROUNDS = 10
DATA = Path(segpipe.__file__).parent / "demo" / "data"
SCENE = DATA / "scenes" / "kampala_z19_309614_261632_chips21.tif"
MODEL = DATA / "model.safetensors"

# What segpipe computes for this scene on a CPU: one tile at half resolution, a batch of its own.
SCRIPT = """
import sys
import numpy as np, rasterio, torch
if sys.argv[3] == "ray":
    import ray
    ray.init(include_dashboard=False)
from segpipe.models.file import load_model
model, card = load_model(sys.argv[1])
with rasterio.open(sys.argv[2]) as source:
    pixels = torch.from_numpy(source.read([1, 2, 3])).float()[None]
mean, std = (torch.tensor(v)[:, None, None] for v in (card.mean, card.std))
x = (torch.nn.functional.avg_pool2d(pixels, 2) - mean) / std
with torch.inference_mode():
    mask = model(x).argmax(1).numpy().astype(np.uint8)
print("done", flush=True)
"""


def seconds_until(command: list[str], reached: Callable[[subprocess.Popen[str]], bool]) -> float:
    """Start a command and return the seconds until ``reached``; then let it end."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        while not reached(process):
            assert process.poll() in (None, 0), f"ended with {process.returncode}: {command}"
            time.sleep(0.005)
        seconds = time.perf_counter() - begin
        process.communicate(timeout=120)
        assert process.returncode == 0
        return seconds
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def script_seconds(kind: str) -> float:
    command = [sys.executable, "-c", SCRIPT, str(MODEL), str(SCENE), kind]

    def reached(process: subprocess.Popen[str]) -> bool:
        assert process.stdout is not None
        return process.stdout.readline().startswith("done")

    return seconds_until(command, reached)


def predict_seconds(run: Path, executor: str) -> float:
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "segpipe.cli.main", "predict", str(SCENE), "--model", str(MODEL)]
    unit = run / "masks" / "part-00000" / "unit-0000000.parquet"
    return seconds_until([*command, "-o", str(run), "--executor", executor], lambda process: unit.exists())


def test_first_unit_against_bare_scripts(tmp_path: Path) -> None:
    seconds: dict[str, list[float]] = {"script": [], "local": [], "script+ray": [], "ray": []}
    for _ in range(ROUNDS):
        seconds["script"].append(script_seconds("no"))
        seconds["local"].append(predict_seconds(tmp_path / "local", "local"))
        seconds["script+ray"].append(script_seconds("ray"))
        seconds["ray"].append(predict_seconds(tmp_path / "ray", "ray"))
    middle = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print("\nto the first unit:", ", ".join(f"{name} {value:.2f} s" for name, value in middle.items()))
    for ours, theirs, target in (("local", "script", 1.3), ("ray", "script+ray", 1.6)):
        ratios = [a / b for a, b in zip(seconds[ours][1:], seconds[theirs][1:], strict=True)]
        print(f"{ours}: {statistics.median(ratios):.2f} x (target {target}; rounds {min(ratios):.2f} "
              f"to {max(ratios):.2f})")  # fmt: skip
    assert all(value > 0 for value in middle.values())


def test_help_is_quick_and_imports_neither_torch_nor_ray() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "segpipe.cli.main", "--help"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    names = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert names.isdisjoint({"torch", "ray", "numba", "rasterio", "pyarrow"})
    del command[1:3]
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        seconds.append(time.perf_counter() - begin)
    print(f"\nsegpipe --help: {statistics.median(seconds):.2f} s (target 0.5)")
