"""Peak memory of a training does not grow with the number of shards.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_training_memory.py
Target: the largest resident memory of the worker process with 1,000 shards within 10 % of that with 10. Both
trainings take as many steps as it takes to read each of the 1,000 shards once. Images and crops are tiny, so
that what is kept for a shard shows. SEGPIPE_BENCH_SHARDS sets the larger number.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
from pathlib import Path

import pytest
from test_training_speed import BATCH, prepare, train_config, write_images

from segpipe.config.train import TrainConfig
from segpipe.training.events import TrainEvents
from segpipe.training.run import make_train_job, run_training

pytestmark = pytest.mark.benchmark

FEW = 10
MANY = int(os.environ.get("SEGPIPE_BENCH_SHARDS", "1000"))
SHARD_SAMPLES, IMAGE_PX, CROP_PX = 4, 40, 32
STEPS = -(-MANY * SHARD_SAMPLES // BATCH)  # one epoch of the many shards


def test_peak_memory_is_flat_in_the_number_of_shards(tmp_path: Path) -> None:
    configs = {}
    for shards in (FEW, MANY):
        raw = write_images(tmp_path / f"raw-{shards}", shards * SHARD_SAMPLES, IMAGE_PX)
        data = prepare(raw, str(tmp_path / f"data-{shards}"), shard_samples=SHARD_SAMPLES)
        assert len(list(Path(data).rglob("part-*.parquet"))) == shards
        configs[shards] = data
    peaks: dict[int, list[float]] = {FEW: [], MANY: []}
    for number in range(3):
        for shards, data in configs.items():
            output = tmp_path / f"out-{shards}-{number}"
            config = train_config(data, output, data__augment__crop_px=CROP_PX, train__steps=STEPS)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                before, peak = pool.apply(memory_of, (config,))
            peaks[shards].append(peak)
            print(f"\n{shards} shards: {before:.0f} MiB with all modules, peak {peak:.0f} MiB", end="")
    few, many = (statistics.median(values) for values in peaks.values())
    print(f"\npeak with {MANY} shards / with {FEW}: {many / few:.3f} (target 0.9 to 1.1)")


def memory_of(config: TrainConfig) -> tuple[float, float]:
    """Resident memory before a training in this process, and the largest during it, MiB."""
    before = status_mib("VmRSS")
    run_training(make_train_job(config), TrainEvents())
    return before, status_mib("VmHWM")


def status_mib(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
