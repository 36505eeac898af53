"""Peak memory (PSS of the whole process tree) of ``segpipe predict`` does not grow with the scene.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_memory.py
Targets: 8192 px and 32768 px within 10 %; below 3 GiB on 2 cores with the default config and 19 classes.
LR-ASPP, so that a gigapixel ends in minutes: the pipeline's memory is what is measured.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import archives
import pytest

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_peak_memory_is_flat_in_the_scene_size(tmp_path: Path, executor: str) -> None:
    model = archives.write_model(tmp_path / "model.safetensors", "lraspp_mobilenet_v3_large", classes=19)
    peaks: dict[int, float] = {}
    for side_px in (8192, 32768):
        scene = archives.write_scene(tmp_path / f"scene-{side_px}.tif", side_px)
        archive = archives.make_archive(tmp_path, scene, 1)
        output = tmp_path / "run"
        shutil.rmtree(output, ignore_errors=True)
        command = archives.predict_command(archive, model, output, f"cluster.executor={executor}")
        timed = archives.run_timed(command, watch_memory=True)
        peaks[side_px] = timed.peak_pss_bytes / 2**20
        print(f"{executor} {side_px} px: {timed.seconds:.0f} s, peak {peaks[side_px]:.0f} MiB", flush=True)
    print(f"{executor}: 32768 px / 8192 px = {peaks[32768] / peaks[8192]:.3f} (target 0.90 to 1.10)")
