"""Rates of training: shards on S3 against a batch in memory, two workers against one, and the start.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_training_speed.py
Targets: steps/s with shards on S3 >= 0.92 of the same steps on one ready batch; two workers of one thread
>= 0.9 of the samples/s of one worker of two threads on two cores. Figures without a target: milliseconds of
decoding and of augmentation for a sample, and the start of ``segpipe train`` against a bare script. What is
compared runs in turns. The S3 server shares the machine's cores here, which a real object store does not.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from engine_loops import mosaic
from PIL import Image

from segpipe.config.card import ClassInfo
from segpipe.config.prepare import PrepareConfig
from segpipe.config.train import TrainConfig, load_train
from segpipe.datasets.augment import augment, rng_of
from segpipe.datasets.batches import BatchStream, TrainBatch, decode_sample
from segpipe.datasets.groups import GroupReader
from segpipe.datasets.prepared import PreparedDataset, open_dataset
from segpipe.inference.memory import keep_freed_pages
from segpipe.pipelines.events import Events
from segpipe.pipelines.prepare import run_prepare
from segpipe.storage import open_storage
from segpipe.training.comm import Comm
from segpipe.training.losses import make_loss
from segpipe.training.network import Network
from segpipe.training.run import make_recipe, make_train_job
from segpipe.training.run_file import TrainFacts, TrainRun, adopt_or_create
from segpipe.training.steps import Stepper
from segpipe.training.worker import WorkerTask, run_worker

pytestmark = pytest.mark.benchmark

CORES = 2
BATCH, CROP_PX, IMAGE_PX = 8, 256, 384
IMAGES = 1200  # far more than the windows of groups that a worker keeps: steps must read
ROUNDS, STEPS = 5, 16  # a window of 8 groups of 16 samples is 16 steps: a timed round reads a new one
WARM_STEPS = 6  # more than the batches that are made ahead, so that each timed step also makes one
CLASSES = (ClassInfo(name="other", color=(0, 0, 0)), ClassInfo(name="bright", color=(255, 255, 255)))

START_SETS = (
    "train.steps=1",
    "data.augment.crop_px=64",
    "model.options={width: 16, depth: 4}",
    "validation.splits=[]",
)
BARE_SCRIPT = """
import glob, sys
import numpy as np, torch
from PIL import Image
from segpipe.models.families import build
model = build("unet", bands=3, classes=2, width=16, depth=4).train()
optimizer = torch.optim.AdamW(model.parameters())
names = [sorted(glob.glob(f"{sys.argv[1]}/{kind}/*.png"))[:8] for kind in ("images", "labels")]
images, labels = (np.stack([np.asarray(Image.open(name))[:64, :64] for name in part]) for part in names)
x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 110) / 50
loss = torch.nn.functional.cross_entropy(model(x), torch.from_numpy(labels).long())
loss.backward()
optimizer.step()
print(f"step 1 of 1  loss {loss.item():.4f}", file=sys.stderr, flush=True)
"""


def write_images(folder: Path, count: int, side_px: int) -> Path:
    """Write RGB PNG images cut from real drone pixels, and labels: class 1 where they are bright."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    rng = np.random.default_rng(3)
    source = mosaic(3072, 3072)
    for number in range(count):
        row, col = rng.integers(0, 3072 - side_px, 2)
        pixels = source[:, row : row + side_px, col : col + side_px]
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"images/{number:05d}.png")
        label = (pixels.mean(axis=0) > 110).astype(np.uint8)
        Image.fromarray(label).save(folder / f"labels/{number:05d}.png")
    return folder


def prepare(raw: Path, output: str, **options: Any) -> str:
    """The same as ``segpipe prepare folder`` in this process."""
    config = PrepareConfig(
        layout="folder",
        sources=(str(raw / "images"),),
        output=output,
        labels=str(raw / "labels/{stem}.png"),
        classes=CLASSES,
        cluster={"executor": "local"},  # type: ignore[arg-type]
        **options,
    )
    run_prepare(config, Events())
    return output


def train_config(data: str, output: Path | str, **sets: Any) -> TrainConfig:
    """The training that is measured; ``sets`` are dotted keys with "__" for the dots."""
    values = {
        "data.uri": data,
        "data.augment.crop_px": CROP_PX,
        "model.options": {"width": 16, "depth": 4},
        "train.global_batch": BATCH,
        "train.steps": 1000,
        "validation.splits": [],
        "cluster.executor": "local",
        "output": str(output),
    }
    values |= {name.replace("__", "."): value for name, value in sets.items()}
    return load_train(None, values, (), "benchmark")


def make_stepper(config: TrainConfig) -> Stepper:
    job = make_train_job(config)
    loss = make_loss(config.train.loss, job.dataset.split_class_px(config.data.train_splits))
    return Stepper(config, Network(config, job.card, Comm(), "cpu"), loss, Comm(), job.total_steps, "fp32")


def stream_of(config: TrainConfig, dataset: PreparedDataset, first_step: int) -> BatchStream:
    return BatchStream(
        dataset, config.data, seed=0, global_batch=BATCH, rank=0, world=1,
        first_step=first_step, stop_step=1000, threads=CORES,
    )  # fmt: skip


def seconds_a_step(stepper: Stepper, batches: Iterable[TrainBatch]) -> tuple[float, float]:
    """Mean over ``STEPS`` steps that follow ``WARM_STEPS``, and how many cores this process had meanwhile."""
    begin_s = begin_cpu_s = 0.0
    for number, batch in enumerate(itertools.islice(batches, WARM_STEPS + STEPS + 1)):
        if number == WARM_STEPS:  # this batch was waited for before the clock starts, the last one within
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        if number < WARM_STEPS + STEPS:
            float(stepper.run(batch).values[0])
    seconds = time.perf_counter() - begin_s
    return seconds / STEPS, (time.process_time() - begin_cpu_s) / seconds


@pytest.mark.s3
def test_steps_from_s3_against_steps_from_memory(tmp_path: Path, s3_prefix: str) -> None:
    keep_freed_pages()
    torch.set_num_threads(CORES)
    config = train_config(
        prepare(write_images(tmp_path, IMAGES, IMAGE_PX), f"{s3_prefix}/data"), tmp_path / "out"
    )
    dataset, stepper = open_dataset(config.data.uri), make_stepper(config)
    with stream_of(config, dataset, 0) as stream:
        ready = next(iter(stream))
    ratios = []
    before_s, _ = seconds_a_step(stepper, itertools.repeat(ready))
    for number in range(ROUNDS):
        with stream_of(config, dataset, 30 * number) as stream:
            from_s3_s, s3_cores = seconds_a_step(stepper, stream)
        after_s, memory_cores = seconds_a_step(stepper, itertools.repeat(ready))
        # Of the rounds from memory on both sides: a machine that becomes slower or faster favours neither.
        ratios.append((before_s + after_s) / 2 / from_s3_s)
        # Fewer than two cores: other programs took part of them, and the round says little.
        print(f"\nstep from S3 {from_s3_s:.3f} s ({s3_cores:.2f} cores), from memory {before_s:.3f}, "
              f"{after_s:.3f} ({memory_cores:.2f}), ratio {ratios[-1]:.3f}", end="", flush=True)  # fmt: skip
        before_s = after_s
    print(f"\nsteps/s from S3 / from memory: {statistics.median(ratios):.3f} (target 0.92; rounds "
          f"{min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip


def test_cost_of_a_sample(tmp_path: Path) -> None:
    dataset = open_dataset(prepare(write_images(tmp_path, 64, IMAGE_PX), str(tmp_path / "data")))
    config = train_config(dataset.uri, tmp_path / "out").data.augment
    reader = GroupReader(dataset)
    encoded = [sample for group in dataset.groups(("train",)) for sample in reader.read(group)]
    decoded = [decode_sample(sample, dataset, "") for sample in encoded]

    def augmented(number: int) -> None:
        rng = rng_of(0, 0, encoded[number].sample_id)
        augment(decoded[number].pixels, decoded[number].label, config, dataset.mean, dataset.std, rng)

    decode_ms = median_cpu_ms(lambda number: decode_sample(encoded[number], dataset, ""), len(encoded))
    augment_ms = median_cpu_ms(augmented, len(encoded))
    print(
        f"\na sample of {IMAGE_PX} px: decoding {decode_ms:.2f} ms, augmentation {augment_ms:.2f} ms of CPU"
    )


def median_cpu_ms(work: Callable[[int], object], count: int) -> float:
    """Median of five rounds' mean CPU time of this thread for one item; the first item compiles."""
    work(0)
    rounds = []
    for _ in range(5):
        begin = time.thread_time()
        for number in range(count):
            work(number)
        rounds.append((time.thread_time() - begin) / count * 1e3)
    return statistics.median(rounds)


def test_two_workers_against_one(tmp_path: Path) -> None:
    data = prepare(write_images(tmp_path, IMAGES, IMAGE_PX), str(tmp_path / "data"))
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(2):
        for world in rates:
            config = train_config(data, tmp_path / f"out-{world}-{number}", train__steps=3 + STEPS)
            rates[world].append(samples_per_s(config, world))
            print(f"\n{world} worker(s): {rates[world][-1]:.2f} samples/s", end="", flush=True)
    ratio = statistics.median([two / one for one, two in zip(rates[1], rates[2], strict=True)])
    print(f"\nsamples/s of two workers / of one: {ratio:.3f} (target 0.9)")


def samples_per_s(config: TrainConfig, world: int) -> float:
    """Median rate of the steps but the first three, of ``world`` processes that share the cores."""
    job = make_train_job(config)
    storage = open_storage(job.output)
    run = TrainRun(
        recipe=make_recipe(job.config, job.dataset, None),
        facts=TrainFacts(CORES // world, "fp32", "cpu"),
        card=job.card,
        config={},
        versions={},
    )
    task = WorkerTask(job.config, adopt_or_create(storage, run), job.output)
    meeting = Path(job.output) / ".meeting"
    mp.spawn(worker_process, (world, task, str(meeting)), nprocs=world)
    rates = [
        rate
        for path in sorted((Path(job.output) / "history").glob("steps-*.parquet"))
        for rate in pq.read_table(path).column("samples_per_s").to_pylist()
    ]
    return statistics.median(rates[3:])


def worker_process(rank: int, world: int, task: WorkerTask, meeting: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    run_worker(task, Comm(rank, world), "cpu", CORES // world, lambda _: None)
    if world > 1:
        dist.destroy_process_group()


def test_first_step_against_a_bare_script(tmp_path: Path) -> None:
    raw = write_images(tmp_path, 16, 96)
    data = prepare(raw, str(tmp_path / "data"))
    seconds: dict[str, list[float]] = {"script": [], "segpipe": []}
    for number in range(6):
        seconds["script"].append(seconds_to_step([sys.executable, "-c", BARE_SCRIPT, str(raw)]))
        command = [sys.executable, "-m", "segpipe.cli.main", "train", "--executor", "local", "--data", data]
        command += ["-o", str(tmp_path / f"out-{number}")]
        command += [word for value in START_SETS for word in ("--set", value)]
        seconds["segpipe"].append(seconds_to_step(command))
    ratios = [a / b for a, b in zip(seconds["segpipe"][1:], seconds["script"][1:], strict=True)]
    middle = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print("\nto the first step:", ", ".join(f"{name} {value:.2f} s" for name, value in middle.items()))
    print(f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}; no target)")


def seconds_to_step(command: list[str]) -> float:
    """Seconds from the start of a command to its line of step 1; then it ends by itself."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    seconds = None
    for line in process.stderr:
        lines.append(line)
        if seconds is None and line.startswith("step 1 of 1"):
            seconds = time.perf_counter() - begin
    assert process.wait() == 0, "".join(lines)
    assert seconds is not None, "".join(lines)
    return seconds
