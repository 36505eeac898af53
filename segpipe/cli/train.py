"""The command that trains a model."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from segpipe.cli import signals
from segpipe.cli.jobs import read_text
from segpipe.cli.output import print_fields, print_json
from segpipe.cli.progress import StderrLines, format_duration
from segpipe.config.train import load_train
from segpipe.training.events import TrainEvents
from segpipe.training.finish import Trained
from segpipe.training.history import ScoreRow, StepRow
from segpipe.training.run import TrainPlan, make_train_job, plan_only, run_training
from segpipe.wording import counted


def train_command(
    config_uri: str | None, flags: dict[str, Any], sets: list[str], *, dry_run: bool, as_json: bool
) -> int:
    """Train and return the exit code."""
    job = make_train_job(load_train(read_text(config_uri), flags, sets, config_uri or "flags"))
    with TrainProgress() as events:
        if dry_run:
            _print_plan(plan_only(job, events), as_json)
            return 0
        trained = run_training(job, events)
    _print_trained(trained, as_json)
    return 0


class TrainProgress(StderrLines, TrainEvents):
    """Shows steps with loss, samples/s and ETA on stderr: a bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self._total = 0
        self._timed_from: int | None = None
        self._started_s = 0.0

    def begun(self, first_step: int, total_steps: int) -> None:
        self._total, self._last_line_s = total_steps, time.monotonic()
        if first_step >= total_steps:
            self._print("all steps are done already; nothing to train")
        else:
            self._open_bar("steps", total_steps, first_step)

    def step(self, row: StepRow) -> None:
        signals.check()
        if self._timed_from is None or row.step < self._timed_from:
            # From the first step that is told of: the start-up before it says nothing of what is left.
            self._timed_from, self._started_s = row.step, time.monotonic()
        text = f"loss {row.loss:.4f}  {row.samples_per_s:.1f} samples/s  lr {row.lr:.2g}{self._eta(row.step)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=row.step, rates=text)
        elif self._due() or row.step == self._total:
            self._print(f"step {row.step} of {self._total}  {text}")

    def score(self, row: ScoreRow) -> None:
        shown = "undefined" if row.metric is None else f"{row.metric:.4f}"
        miou = row.scores.get("miou")
        more = "" if miou is None or miou == row.metric else f"  miou {miou:.4f}"
        best = "  best so far" if row.is_best else ""
        self._print(f"validation at step {row.step} (epoch {row.epoch:.2f}): {shown}{more}{best}")

    def _eta(self, step: int) -> str:
        done = step - (self._timed_from or step)
        if done <= 0 or step >= self._total:
            return ""
        left_s = (time.monotonic() - self._started_s) / done * (self._total - step)
        return f"  ETA {format_duration(left_s)}"


def _print_plan(plan: TrainPlan, as_json: bool) -> None:
    job, pool = plan.job, plan.pool
    config, dataset = job.config, job.dataset
    tree = {
        "family": job.card.family,
        "bands": list(job.card.bands),
        "classes": [info.name for info in job.card.classes],
        "samples": {split: dataset.num_samples([split]) for split in dataset.splits},
        "train_splits": list(config.data.train_splits),
        "validation_splits": list(config.validation.splits),
        "global_batch": config.train.global_batch,
        "steps": job.total_steps,
        "steps_done": plan.done_steps,
        "workers": pool.most if pool.least == pool.most else [pool.least, pool.most],
        "device": pool.device,
        "precision": pool.precision,
        "cpus_per_worker": pool.cpus_per_worker,
        "threads_per_worker": pool.threads_per_worker,
        "loader_threads": pool.loader_threads,
    }
    print_fields(tree, as_json)


def _print_trained(trained: Trained, as_json: bool) -> None:
    if as_json:
        print_json(asdict(trained))
        return
    early = ", stopped early" if trained.stopped_early else ""
    print(f"{counted(trained.steps, 'step')} of {trained.total_steps}{early}")
    score = "" if trained.metric is None else f", score {trained.metric:.4f}"
    print(f"kept: the weights of step {trained.kept_step}{score}")
    for name, value in (trained.scores or {}).items():
        if name.startswith("iou_"):
            print(f"  {name:<24} {'-' if value is None else f'{value:.4f}'}")
    print(f"model:  {trained.output}/model.safetensors\ncurves: {trained.output}/curves.png")
