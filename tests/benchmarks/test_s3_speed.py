"""Windowed prediction over S3 on loopback against local files, interleaved.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_s3_speed.py
Targets: >= 0.95 of the local rate with LR-ASPP; with a no-op model as a figure. The server shares the
machine's cores with the reader here, which a real object store does not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import archives
import pytest
from test_pipeline_speed import NOOP_SCRIPT, ROUNDS

from segpipe.storage import open_storage

pytestmark = [pytest.mark.benchmark, pytest.mark.s3]

SIDE_PX = 8192


def upload(archive: Path, prefix: str) -> str:
    target = open_storage(f"{prefix}/{archive.name}")
    for path in sorted(archive.iterdir()):
        target.put_file_if_absent(path.name, path)
    return target.root


def seconds_of(kind: str, model: Path, archive: str, output: str) -> float:
    if kind == "no-op":
        command = [sys.executable, "-c", NOOP_SCRIPT, str(model), archive, output]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return archives.run_timed(
        archives.predict_command(archive, model, output, "cluster.executor=local")
    ).seconds


@pytest.mark.parametrize(("kind", "sizes"), [("lraspp", (1, 2)), ("no-op", (1, 4))])
def test_rate_over_s3(tmp_path: Path, s3_prefix: str, kind: str, sizes: tuple[int, int]) -> None:
    scene = archives.write_scene(tmp_path / "scene.tif", SIDE_PX)
    model = archives.write_model(tmp_path / "model.safetensors", "lraspp_mobilenet_v3_large")
    local = [archives.make_archive(tmp_path, scene, copies) for copies in sizes]
    remote = [upload(archive, s3_prefix) for archive in local]
    slopes: dict[str, list[float]] = {"local": [], "s3": []}
    for _ in range(ROUNDS):
        for place, pair in (("local", [str(path) for path in local]), ("s3", remote)):
            times = []
            for archive in pair:
                name = f"run-{uuid.uuid4().hex[:8]}"
                output = str(tmp_path / name) if place == "local" else f"{s3_prefix}/{name}"
                times.append(seconds_of(kind, model, archive, output))
                shutil.rmtree(tmp_path / name, ignore_errors=True)
            slopes[place].append((times[1] - times[0]) / (sizes[1] - sizes[0]))
            print(f"{kind} {place}: {times[0]:.1f} s, {times[1]:.1f} s", flush=True)
    rates = {place: SIDE_PX**2 / 1e6 / archives.median(values) for place, values in slopes.items()}
    print(
        f"{kind}: local {rates['local']:.2f}, S3 {rates['s3']:.2f} Mpx/s, {rates['s3'] / rates['local']:.3f}"
    )
