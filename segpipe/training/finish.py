"""What a finished training leaves behind: the model file, its card for people, the curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from segpipe.config.train import TrainConfig
from segpipe.datasets.prepared import PreparedDataset
from segpipe.errors import IncompleteError, ObjectMissing
from segpipe.models.file import encode_model
from segpipe.storage import Storage
from segpipe.training.checkpoint import Checkpoint, Progress, list_checkpoints, read_checkpoint
from segpipe.training.curves import draw_curves
from segpipe.training.history import read_scores, read_steps
from segpipe.training.model_card import card_text
from segpipe.training.network import evaluation_copy
from segpipe.training.run_file import MODEL_KEY, TrainRun
from segpipe.training.tracking import open_trackers
from segpipe.training.worker import steps_per_epoch

CARD_KEY: Final = "README.md"
CURVES_KEY: Final = "curves.png"


@dataclass(frozen=True, slots=True)
class Trained:
    """How a training ended."""

    output: str
    steps: int
    total_steps: int
    kept_step: int
    metric: float | None
    """Score of the kept weights, where they were validated."""
    stopped_early: bool
    scores: dict[str, Any] | None
    """The kept weights' row of history/epochs, where they were validated."""


def finish(
    storage: Storage,
    config: TrainConfig,
    run: TrainRun,
    dataset: PreparedDataset,
    total: int,
    warn: Callable[[str], None],
) -> Trained:
    """Write model.safetensors, README.md and curves.png from checkpoints and history; repeatable.

    Where the best checkpoint was deleted the newest one's weights are kept, and ``warn`` is told so. Raises
    `IncompleteError` where the training is not at its end.
    """
    newest = _ended(storage, run, total)
    progress = newest.progress
    checkpoint, lost = _kept(storage, config, run, newest)
    kept_step = checkpoint.progress.step
    for line in lost:
        warn(line)
    model = evaluation_copy(run.card, checkpoint.part("average") or checkpoint.part("model"))
    steps, scores = read_steps(storage), read_scores(storage)
    kept = next((row for row in reversed(scores.to_pylist()) if row["step"] == kept_step), None)
    facts = {
        "config": run.config,
        "steps": progress.step,
        "epochs": progress.step / steps_per_epoch(config, dataset),
        "kept_step": kept_step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": run.facts.device,
        "workers": progress.workers,
        "metric": config.validation.metric,
    }
    card = run.card.model_copy(
        update={"training": {**run.card.training, **_facts(progress, kept_step, kept)}}
    )
    title = f"{card.family}: {progress.step} steps"
    names = [info.name for info in card.classes]
    artefacts = {
        CARD_KEY: card_text(card, facts, scores, dataset, [*progress.start_lines, *lost]).encode(),
        CURVES_KEY: draw_curves(steps, scores, names, title),
        MODEL_KEY: encode_model(model, card, storage.uri(MODEL_KEY)),
    }
    for key, data in artefacts.items():  # the model comes last: where it is, all is there
        storage.put(key, data)
    open_trackers(config.tracking, storage.root, run.config, progress.step).close(storage, artefacts)
    return Trained(
        output=storage.root,
        steps=progress.step,
        total_steps=total,
        kept_step=kept_step,
        metric=None if kept is None else kept["metric"],
        stopped_early=progress.stopped,
        scores=kept,
    )


def _ended(storage: Storage, run: TrainRun, total: int) -> Checkpoint:
    steps = list_checkpoints(storage)
    newest = read_checkpoint(storage, steps[-1], run.key) if steps else None
    if newest is None or (newest.progress.step < total and not newest.progress.stopped):
        done = newest.progress.step if newest else 0
        raise IncompleteError(
            f"the training ended after step {done} of {total}", storage.root, "The same command goes on."
        )
    return newest


def _kept(
    storage: Storage, config: TrainConfig, run: TrainRun, newest: Checkpoint
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint whose weights become the model, and a line where that is not the one asked for."""
    best_step = newest.progress.best_step
    if config.validation.keep == "last" or best_step is None or best_step == newest.progress.step:
        return newest, []
    try:
        return read_checkpoint(storage, best_step, run.key), []
    except ObjectMissing:
        # Somebody deleted it, or the newer best one that it had made way for: no repeat would bring it back.
        line = (
            f"the checkpoint of the best score, that of step {best_step}, is not there: the newest weights "
            f"are kept, those of step {newest.progress.step}"
        )
        return newest, [line]


def _facts(progress: Progress, kept_step: int, kept: dict[str, Any] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"steps": progress.step, "kept_step": kept_step}
    if kept is not None:
        facts["validation"] = {name: value for name, value in kept.items() if name not in ("step", "is_best")}
    return facts
