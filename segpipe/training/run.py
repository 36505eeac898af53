"""The driver of ``segpipe train``: checks what was asked, starts the workers, finishes what they leave."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from segpipe.config.card import ModelCard
from segpipe.config.train import TrainConfig
from segpipe.datasets.prepared import PreparedDataset, open_dataset
from segpipe.errors import ConfigError, InputError, nothing_written
from segpipe.masks.run import refuse_other_folder
from segpipe.models.families import build_of
from segpipe.models.file import empty_model
from segpipe.pipelines.executor import start_executor
from segpipe.pipelines.local import LocalExecutor
from segpipe.pipelines.resources import Hardware
from segpipe.storage import Storage, open_storage
from segpipe.storage.uris import normalize_root
from segpipe.training.checkpoint import list_checkpoints
from segpipe.training.comm import Comm
from segpipe.training.events import TrainEvents
from segpipe.training.finish import Trained, finish
from segpipe.training.history import ScoreRow, StepRow
from segpipe.training.model_card import without_credentials
from segpipe.training.network import check_hardware
from segpipe.training.passes import check_passes
from segpipe.training.resources import TrainPool, idle_gpus, plan_training
from segpipe.training.run_file import (
    TrainFacts,
    TrainRun,
    adopt,
    adopt_or_create,
    make_recipe,
    read_train_run,
)
from segpipe.training.tracking import check_tracking
from segpipe.training.worker import WorkerTask, run_worker, total_steps
from segpipe.versions import versions_of
from segpipe.wording import few

_PACKAGES: Final = ("segpipe", "torch", "torchvision", "ray", "numpy")
_IMAGENET: Final = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What was asked, checked and read, before anything is started or written."""

    config: TrainConfig
    dataset: PreparedDataset
    card: ModelCard
    init_sha256: str | None

    @property
    def output(self) -> str:
        assert self.config.output is not None
        return self.config.output

    @property
    def total_steps(self) -> int:
        return total_steps(self.config, self.dataset)


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a training would do."""

    job: TrainJob
    pool: TrainPool
    done_steps: int


def make_train_job(config: TrainConfig) -> TrainJob:
    """Read the data set's description and hold the config against it. Writes nothing.

    Raises `ConfigError` or `InputError`.
    """
    if config.output is None:
        raise ConfigError("no output", "output", "Give --output URI.")
    config = _absolute(config)
    with nothing_written():
        dataset = open_dataset(config.data.uri)
        _check_splits(config, dataset)
        _check_warmup(config, total_steps(config, dataset))
        check_tracking(config.tracking)
        card = make_card(config, dataset)
        return TrainJob(config, dataset, card, _try_network(config, card))


def _try_network(config: TrainConfig, card: ModelCard) -> str | None:
    """Build and start the network once, so that what is wrong shows now; the digest of its weights file."""
    empty_model(card, "model")
    if config.init.weights is None:
        return None
    from segpipe.models.pretrained import load_start

    model = build_of(card)
    return load_start(model, card, config.init).sha256


def make_card(config: TrainConfig, dataset: PreparedDataset) -> ModelCard:
    """The model card that the training's network will carry.

    Raises `ConfigError`, and `InputError` for a data set whose mean, spread or pixel size is not finite.
    """
    model = config.model
    bands = model.bands or _band_names(dataset.bands)
    if len(bands) != dataset.bands:
        raise ConfigError(
            f"{len(bands)} bands are named, the data set has {dataset.bands}",
            "model.bands",
            "Name each band, or leave it out.",
        )
    mean, std = dataset.mean, tuple(value if value > 0 else 1.0 for value in dataset.std)
    if model.normalise == "imagenet":
        if dataset.bands != 3 or dataset.dtype != "uint8":
            raise ConfigError(
                f"imagenet fits 8-bit RGB, the data set has {dataset.bands} bands of {dataset.dtype}",
                "model.normalise",
                "Use dataset.",
            )
        mean, std = _IMAGENET
    if not all(math.isfinite(number) for number in (*mean, *std, dataset.pixel_m or 1.0)):
        raise InputError(
            "mean, spread or pixel size of the data set is not finite",
            dataset.uri,
            "Run `segpipe prepare` again without the samples that hold infinite values.",
        )
    metric, _, name = config.validation.metric.partition(":")
    names = [info.name for info in dataset.classes]
    if metric == "iou" and name not in names:
        raise ConfigError(
            f"no class {name!r} in the data set", "validation.metric", f"There are: {', '.join(names)}."
        )
    samples = {split: dataset.num_samples([split]) for split in dataset.splits}
    return ModelCard(
        family=model.family,
        options=model.options,
        bands=bands,
        dtype=dataset.dtype,
        mean=mean,
        std=std,
        pixel_m=dataset.pixel_m,
        tile_px=config.validation.tile_px,
        classes=dataset.classes,
        training={"data_key": dataset.key, "samples": samples, "licence": dataset.licence},
    )


def plan_only(job: TrainJob, events: TrainEvents) -> TrainPlan:
    """What a training would do; Ray is started only to ask a cluster that is named. Writes nothing.

    Refuses and warns of what `run_training` would before its first step.
    """
    config = job.config
    _check_classes(job, events)
    named = config.cluster.address or os.environ.get("RAY_ADDRESS")
    executor = start_executor(config.cluster, events.warning) if named else LocalExecutor()
    try:
        pool = _planned(job, executor.hardware, events)
    finally:
        executor.close()
    storage = open_storage(job.output)
    with nothing_written():
        if (there := read_train_run(storage)) is not None:
            adopt(there, make_recipe(config, job.dataset, job.init_sha256), storage.root)
        else:
            refuse_other_folder(storage)
        steps = list_checkpoints(storage)
    return TrainPlan(job, pool, steps[-1] if steps else 0)


def run_training(job: TrainJob, events: TrainEvents) -> Trained:
    """Train to the end and write the model. The same call goes on where a killed one stopped.

    Raises `InputError` before anything is written; later `CheckError` for a loss that is not finite,
    `StorageError`, and `IncompleteError` where workers were lost too often.
    """
    config = job.config
    storage = open_storage(job.output)
    _check_classes(job, events)
    executor = start_executor(config.cluster, events.warning)
    try:
        pool = _planned(job, executor.hardware, events)
        run = _adopted(job, pool, storage, events)
        steps = list_checkpoints(storage)
        events.begun(steps[-1] if steps else 0, job.total_steps)
        if not steps or steps[-1] < job.total_steps:  # else only the artefacts are made again
            if line := executor.busy(pool.least, pool.cpus_per_worker, int(pool.device == "cuda")):
                events.warning(line)
            _train(job, run, pool, events)
    finally:
        executor.close()
    return finish(storage, config, run, job.dataset, job.total_steps, events.warning)


def _planned(job: TrainJob, hardware: Hardware, events: TrainEvents) -> TrainPool:
    """The workers on this hardware, held against the config. Raises `ConfigError`."""
    pool = plan_training(hardware, job.config)
    check_hardware(job.config, pool.device)
    check_passes(job.config, job.card, pool.least, pool.most)
    if line := idle_gpus(hardware, job.config, pool):
        events.warning(line)
    return pool


def _train(job: TrainJob, run: TrainRun, pool: TrainPool, events: TrainEvents) -> None:
    task = WorkerTask(job.config, run, job.output)
    if job.config.cluster.executor == "local":
        device = "cuda:0" if pool.device == "cuda" else "cpu"
        run_worker(task, Comm(), device, pool.loader_threads, _teller(events))
        return
    from segpipe.training.ray_workers import train_on_ray

    train_on_ray(task, pool, _teller(events))


def _absolute(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths: Ray's workers have another working directory."""
    weights = config.init.weights
    changes: dict[str, object] = {
        "output": None if config.output is None else normalize_root(config.output),
        "data": config.data.model_copy(update={"uri": normalize_root(config.data.uri)}),
    }
    if weights is not None:
        changes["init"] = config.init.model_copy(update={"weights": normalize_root(weights)})
    return config.model_copy(update=changes)


def _adopted(job: TrainJob, pool: TrainPool, storage: Storage, events: TrainEvents) -> TrainRun:
    """run.json as it is there now; a flag that contradicts its facts is refused."""
    facts = TrainFacts(pool.threads_per_worker, pool.precision, pool.device)
    run = TrainRun(
        recipe=make_recipe(job.config, job.dataset, job.init_sha256),
        facts=facts,
        card=job.card,
        config=_shown(job.config),
        versions=versions_of(_PACKAGES),
    )
    with nothing_written():
        adopted = adopt_or_create(storage, run)
    asked = job.config.cluster.threads_per_worker
    if asked not in ("auto", adopted.facts.threads_per_worker):
        raise ConfigError(
            f"threads_per_worker is {asked} here, but the training was started with "
            f"{adopted.facts.threads_per_worker}",
            storage.root,
            "Leave it out to go on with the training, or choose another --output.",
        )
    if adopted.facts.device != facts.device:
        events.warning(
            f"the training was started on {adopted.facts.device} and goes on on {facts.device}: "
            "its weights will not be the same bit for bit"
        )
        precision = facts.precision if job.config.train.precision == "auto" else adopted.facts.precision
        adopted = replace(adopted, facts=replace(facts, precision=precision))
    return adopted


def _shown(config: TrainConfig) -> dict[str, Any]:
    """The config as run.json and the model card tell it: a tracking URI may carry a password."""
    tree = config.model_dump(mode="json")
    if config.tracking.mlflow is not None:
        tree["tracking"]["mlflow"] = without_credentials(config.tracking.mlflow)
    return tree


def _check_splits(config: TrainConfig, dataset: PreparedDataset) -> None:
    for key, names in (
        ("data.train_splits", config.data.train_splits),
        ("validation.splits", config.validation.splits),
    ):
        absent = [name for name in names if name not in dataset.splits]
        if absent:
            raise ConfigError(
                f"the data set has no split {absent[0]!r}",
                key,
                f"There are: {', '.join(dataset.splits)}."
                + (" Without validation: validation.splits=[]." if key == "validation.splits" else ""),
            )
    both = sorted(set(config.data.train_splits) & set(config.validation.splits))
    if both:
        raise ConfigError(
            f"the split {both[0]!r} is used for both training and validation",
            "validation.splits",
            "Choose another.",
        )


def _check_warmup(config: TrainConfig, steps: int) -> None:
    warmup = config.train.warmup_steps
    if warmup >= steps:
        raise ConfigError(
            f"the rate rises for {warmup} steps, the training has {steps}: it would never reach train.lr",
            "train.warmup_steps",
            f"Set it to {steps - 1} at most, or train for longer (train.steps, train.epochs).",
        )


def _check_classes(job: TrainJob, events: TrainEvents) -> None:
    """Refuse training splits without any label; warn of classes that never occur in them."""
    counts = job.dataset.split_class_px(job.config.data.train_splits)
    absent = [info.name for info, px in zip(job.dataset.classes, counts, strict=True) if not px]
    if len(absent) == len(counts):
        raise InputError("no pixel of the training splits has a label", job.config.data.uri, "Check labels.")
    if absent:
        events.warning(f"classes that never occur in the training splits: {few(absent)}")


def _teller(events: TrainEvents) -> Callable[[StepRow | ScoreRow | str], None]:
    def tell(what: StepRow | ScoreRow | str) -> None:
        if isinstance(what, StepRow):
            events.step(what)
        elif isinstance(what, ScoreRow):
            events.score(what)
        else:
            events.message(what)

    return tell


def _band_names(bands: int) -> tuple[str, ...]:
    if bands == 3:
        return ("red", "green", "blue")
    return tuple(f"band_{number}" for number in range(1, bands + 1))
