"""Small trainings in this process or in several, without Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from segpipe.config.train import TrainConfig, load_train
from segpipe.storage import open_storage
from segpipe.training.comm import Comm
from segpipe.training.events import TrainEvents
from segpipe.training.finish import Trained, finish
from segpipe.training.history import ScoreRow, StepRow
from segpipe.training.run import TrainJob, make_recipe, make_train_job, run_training
from segpipe.training.run_file import TrainFacts, TrainRun, adopt_or_create
from segpipe.training.worker import WorkerTask, run_worker

TINY = {
    "data.augment.crop_px": 32,
    "model.options": {"width": 4, "depth": 2},
    "train.global_batch": 4,
    "train.lr": 0.02,
    "train.steps": 12,
    "validation.tile_px": 64,
    "validation.margin_px": 8,
    "validation.every_steps": 6,
    "cluster.threads_per_worker": 1,
    "cluster.loader_threads": 1,
}
"""A training of some seconds: dotted keys of its config."""


def tiny_config(data: str, output: Path | str, **sets: Any) -> TrainConfig:
    """The tiny training in this process; ``sets`` are dotted keys with "__" for the dots."""
    overrides = {
        **TINY,
        "data.uri": data,
        "checkpoints.every_steps": 4,
        "cluster.executor": "local",
        "output": str(output),
    }
    overrides |= {name.replace("__", "."): value for name, value in sets.items()}
    return load_train(None, {k: v for k, v in overrides.items() if v != "-"}, (), "test")


class Seen(TrainEvents):
    """Keeps what a training tells; ends it with KeyboardInterrupt after step ``stop_after``."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps: list[StepRow] = []
        self.scores: list[ScoreRow] = []
        self.texts: list[str] = []
        self._stop_after = stop_after

    def step(self, row: StepRow) -> None:
        self.steps.append(row)
        if row.step == self._stop_after:
            raise KeyboardInterrupt

    def score(self, row: ScoreRow) -> None:
        self.scores.append(row)

    def message(self, text: str) -> None:
        self.texts.append(text)

    warning = message


def train(config: TrainConfig, events: TrainEvents | None = None) -> Trained:
    return run_training(make_train_job(config), events or Seen())


def train_in_processes(config: TrainConfig, world: int, stop_after: int | None = None) -> Trained:
    """The same training by ``world`` processes with one thread each, connected by gloo.

    Worker 0 dies after step ``stop_after``; then this raises torch's `ProcessRaisedException`.
    """
    job = make_train_job(config)
    run = started(job)
    task = WorkerTask(job.config, run, job.output)
    meeting = Path(job.output) / ".meeting"
    try:
        mp.spawn(_process, (world, task, str(meeting), stop_after), nprocs=world)
    finally:
        meeting.unlink(missing_ok=True)
    return finish(open_storage(job.output), job.config, run, job.dataset, job.total_steps, Seen().warning)


def started(job: TrainJob) -> TrainRun:
    """run.json as a driver makes it."""
    run = TrainRun(
        recipe=make_recipe(job.config, job.dataset, job.init_sha256),
        facts=TrainFacts(1, "fp32", "cpu"),
        card=job.card,
        config=job.config.model_dump(mode="json"),
        versions={},
    )
    return adopt_or_create(open_storage(job.output), run)


def _process(rank: int, world: int, task: WorkerTask, meeting: str, stop_after: int | None) -> None:
    def tell(what: StepRow | ScoreRow | str) -> None:
        if isinstance(what, StepRow) and what.step == stop_after:
            raise RuntimeError(f"stopped after step {what.step}")

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    run_worker(task, Comm(rank, world), "cpu", 1, tell)
    dist.destroy_process_group()
