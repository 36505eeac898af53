"""One worker of a training, from its newest checkpoint to the end. Knows no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from segpipe.config.train import TrainConfig
from segpipe.datasets.batches import BatchStream, TrainBatch
from segpipe.datasets.prepared import PreparedDataset, open_dataset
from segpipe.errors import CheckError, ConfigError, StorageRefused
from segpipe.inference.memory import keep_freed_pages
from segpipe.metrics import Scores
from segpipe.storage import Storage, open_storage
from segpipe.training.checkpoint import (
    Checkpoint,
    Progress,
    checkpoint_key,
    encode_checkpoint,
    list_checkpoints,
    prune,
    put_checkpoint,
    read_checkpoint,
)
from segpipe.training.comm import Comm
from segpipe.training.history import History, OrderLog, ScoreRow, StepRow
from segpipe.training.losses import make_loss
from segpipe.training.network import Network
from segpipe.training.run_file import TrainRun
from segpipe.training.steps import StepOutcome, Stepper
from segpipe.training.tracking import Ended, Trackers, open_trackers
from segpipe.training.validate import count_images, metric_of
from segpipe.wording import few

Tell = Callable[[StepRow | ScoreRow | str], None]
"""Called by worker 0 for each step and validation, and with lines of text."""

_NAMED_IDS: Final = 8


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """All that a worker must know; it pickles."""

    config: TrainConfig
    run: TrainRun
    output: str


def total_steps(config: TrainConfig, dataset: PreparedDataset) -> int:
    """Length of the whole training."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return config.train.epochs * steps_per_epoch(config, dataset)


def steps_per_epoch(config: TrainConfig, dataset: PreparedDataset) -> int:
    return -(-dataset.num_samples(config.data.train_splits) // config.train.global_batch)


def run_worker(task: WorkerTask, comm: Comm, device: str, loader_threads: int, tell: Tell) -> None:
    """Train to the end. The same call again goes on; on a CPU it ends with the same weights.

    Raises `CheckError` for a loss that is not finite, `InputError` for shards that cannot be used, and what
    storage raises; checkpoints stay whole.
    """
    keep_freed_pages()
    torch.set_num_threads(task.run.facts.threads_per_worker)
    try:
        training = _Training(task, comm, device, tell)
        ended: Ended = "KILLED"
        try:
            training.run(loader_threads)
            ended = "FINISHED"
        except Exception:
            ended = "FAILED"
            raise
        finally:
            training.close(ended)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the memory of {device} is too small", "train.micro_batch", "Lower it, or data.augment.crop_px."
        ) from error


class _Training:
    def __init__(self, task: WorkerTask, comm: Comm, device: str, tell: Tell) -> None:
        config, run = task.config, task.run
        self._config, self._run, self._comm, self._device = config, run, comm, device
        self._tell = tell if comm.leads else _silent
        self._storage: Storage = open_storage(task.output)
        card = run.card
        self._dataset = replace(open_dataset(config.data.uri), mean=card.mean, std=card.std)
        self._steps_per_epoch = steps_per_epoch(config, self._dataset)
        self._total = total_steps(config, self._dataset)
        self._network = Network(config, card, comm, device)
        lines = self._network.start_lines
        splits = config.data.train_splits
        loss = make_loss(
            config.train.loss, self._dataset.split_class_px(splits), self._dataset.split_present_px(splits)
        )
        self._stepper = Stepper(config, self._network, loss, comm, self._total, run.facts.precision)
        self._progress = Progress(step=0, recipe_key=run.key, start_lines=lines)
        self._history = History(self._storage, [info.name for info in card.classes])
        self._order = OrderLog(self._storage) if config.train.log_order else None
        self._trackers = Trackers((), self._tell)
        self._pending: tuple[StepOutcome, float] | None = None
        self._last_s = 0.0
        self._keeps_all = False

    def run(self, loader_threads: int) -> None:
        self._resume()
        first = self._progress.step
        if self._progress.stopped or first >= self._total:
            return
        if self._comm.leads:
            params = self._config.model_dump(mode="json")
            root = self._storage.root
            self._trackers = open_trackers(self._config.tracking, root, params, first, self._tell)
        with BatchStream(
            self._dataset,
            self._config.data,
            seed=self._config.train.seed,
            global_batch=self._config.train.global_batch,
            rank=self._comm.rank,
            world=self._comm.world,
            first_step=first,
            stop_step=self._total,
            threads=loader_threads,
        ) as stream:
            self._last_s = time.monotonic()
            for batch in stream:
                self._step(batch)
                self._after_step(batch.step + 1)
                if self._progress.stopped:
                    break

    def close(self, ended: Ended) -> None:
        self._trackers.close(self._storage, {}, ended)

    def _resume(self) -> None:
        """Take the newest checkpoint that is there; worker 0 chooses, for another driver may write too."""
        steps = list_checkpoints(self._storage)
        chosen = torch.tensor(steps[-1] if steps else -1)
        self._comm.broadcast([chosen])
        newest = int(chosen)
        if newest < 0:
            for line in self._progress.start_lines:
                self._tell(line)
            return
        checkpoint = read_checkpoint(self._storage, newest, self._run.key)
        self._network.load(checkpoint, self._storage.uri(checkpoint_key(newest)))
        self._progress = checkpoint.progress
        if self._progress.scaler is not None:
            self._stepper.restore_scale(self._progress.scaler)
        if self._progress.step < self._total and not self._progress.stopped:
            self._tell(f"goes on after step {self._progress.step} of {self._total}")

    def _step(self, batch: TrainBatch) -> None:
        if self._order is not None:
            real = [number for number, is_real in enumerate(batch.real.tolist()) if is_real]
            lanes, ids = [batch.lanes[n] for n in real], [batch.sample_ids[n] for n in real]
            self._order.add(batch.step + 1, lanes, ids)
        outcome = self._stepper.run(batch)
        # The step before is looked at only now, so that a GPU has this one to do meanwhile.
        self._settle()
        now_s = time.monotonic()
        self._pending = (outcome, now_s - self._last_s)
        self._last_s = now_s

    def _settle(self) -> None:
        """Look at the loss of the last step, and write it down."""
        if self._pending is None:
            return
        (outcome, seconds), self._pending = self._pending, None
        loss, *parts = outcome.values.tolist()
        grad_norm = float(outcome.grad_norm)
        if not math.isfinite(loss):
            self._refuse(outcome, f"the loss of step {outcome.step} is {loss}")
        # fp16 meets infinite gradients now and then, leaves them out and lowers its scale.
        if self._stepper.scaler is None and not math.isfinite(grad_norm):
            self._refuse(outcome, f"the gradients of step {outcome.step} have the norm {grad_norm}")
        progress = self._progress
        self._progress = replace(
            progress, loss_sum=progress.loss_sum + loss, loss_steps=progress.loss_steps + 1
        )
        if not self._comm.leads:
            return
        samples = self._samples(outcome.step - 1)
        row = StepRow(
            step=outcome.step,
            epoch=outcome.epoch,
            loss=loss,
            parts=dict(zip(outcome.names[1:], parts, strict=True)),
            lr=outcome.lr,
            grad_norm=grad_norm,
            samples=samples,
            samples_per_s=samples / max(seconds, 1e-9),
            valid_px=outcome.valid_px,
        )
        self._history.add_step(row)
        self._trackers.step(row)
        self._tell(row)

    def _samples(self, step: int) -> int:
        """Samples of a step's global batch, without the fill of an epoch's last one."""
        batch = self._config.train.global_batch
        left = self._dataset.num_samples(self._config.data.train_splits)
        return min(batch, left - step % self._steps_per_epoch * batch)

    def _refuse(self, outcome: StepOutcome, what: str) -> None:
        ids = self._comm.gather_texts(list(outcome.sample_ids))
        raise CheckError(
            f"{what}; its samples: {few(ids, _NAMED_IDS)}; newest checkpoint: {self._newest()}",
            self._storage.root,
            "Look at these samples; a lower train.lr, a train.clip_norm or precision fp32 often helps (with "
            "another --output).",
        )

    def _newest(self) -> str:
        steps = list_checkpoints(self._storage)
        return self._storage.uri(checkpoint_key(steps[-1])) if steps else "none was written yet"

    def _after_step(self, step: int) -> None:
        """Between two steps: validate and write a checkpoint where the config says so."""
        validates = self._validates_at(step)
        if not validates and step % self._config.checkpoints.every_steps and step != self._total:
            return
        self._settle()
        self._progress = replace(self._progress, step=step, workers=self._comm.world)
        if validates:
            self._validate(step)
        self._write(step)
        self._last_s = time.monotonic()

    def _validates_at(self, step: int) -> bool:
        config = self._config.validation
        if not config.splits:
            return False
        every = config.every_steps or config.every_epochs * self._steps_per_epoch
        return step == self._total or step % every == 0

    def _validate(self, step: int) -> None:
        model, config, card = self._network.network_to_score(), self._config.validation, self._run.card
        threads = self._run.facts.threads_per_worker
        counts = count_images(model, card, self._dataset, config, self._comm, self._device, threads)
        self._network.train_mode()
        scores = Scores.from_confusion(counts)
        metric = metric_of(scores, config.metric, card)
        progress = self._progress
        best = progress.best_metric
        is_best = progress.best_step is None or (metric is not None and (best is None or metric > best))
        train_loss = progress.loss_sum / progress.loss_steps if progress.loss_steps else None
        without_gain = 0 if is_best else progress.without_gain + 1
        self._progress = replace(
            progress,
            best_step=step if is_best else progress.best_step,
            best_metric=metric if is_best else best,
            without_gain=without_gain,
            stopped=config.patience is not None and without_gain >= config.patience,
            loss_sum=0.0,
            loss_steps=0,
        )
        if not self._comm.leads:
            return
        row = ScoreRow(
            step=step,
            epoch=step / self._steps_per_epoch,
            metric=metric,
            is_best=is_best,
            scores=scores.overall(),
            class_iou={info.name: iou for info, iou in zip(card.classes, scores.iou, strict=True)},
            compared_px=scores.compared_px,
            train_loss=train_loss,
        )
        self._history.add_score(row)
        self._trackers.score(row)
        self._tell(row)

    def _write(self, step: int) -> None:
        """History first, so that a training that goes on from the checkpoint lacks no row."""
        if self._order is not None:
            self._order.flush(self._comm.rank)
            self._comm.barrier()  # the checkpoint speaks for the rows of all workers
        scaler = self._stepper.scaler
        self._progress = replace(self._progress, scaler=None if scaler is None else scaler.get_scale())
        tensors = self._network.tensors()
        if not all(
            bool(value.isfinite().all()) for name, value in tensors.items() if name.startswith("model/")
        ):
            # Loss and gradients were finite: the optimiser or batch norm went beyond what float32 holds.
            raise CheckError(
                f"the weights after step {step} are not finite; newest checkpoint: {self._newest()}",
                self._storage.root,
                "Set a lower train.lr, or train.clip_norm (with another --output).",
            )
        if self._comm.leads:
            self._history.flush(step)
            put_checkpoint(self._storage, step, encode_checkpoint(Checkpoint(self._progress, tensors)))
            self._prune()
            self._trackers.save(self._storage)
        self._comm.barrier()

    def _prune(self) -> None:
        if self._keeps_all:
            return
        try:
            prune(self._storage, self._config.checkpoints.keep_last, [self._progress.best_step])
        except StorageRefused as error:
            self._keeps_all = True
            self._tell(f"old checkpoints stay: {error}")


def _silent(_: StepRow | ScoreRow | str) -> None:
    return
