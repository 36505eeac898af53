"""The history of a training in TensorBoard and MLflow, for those who watch many trainings side by side.

The Parquet tables are the record; what is here is a copy. So a tracker that fails is warned about once, and
the training goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from segpipe.config.train import TrackingConfig
from segpipe.errors import ConfigError
from segpipe.storage import Storage
from segpipe.training.history import ScoreRow, StepRow, iou_columns
from segpipe.training.model_card import without_credentials

TENSORBOARD_PREFIX: Final = "tensorboard/events.out.tfevents."
OUTPUT_TAG: Final = "segpipe.output"
"""MLflow tag that holds the URI of the training's folder, by which a training that goes on finds its run."""

# An event file is put whole each time: a long one would be moved again and again.
_ROTATE_BYTES: Final = 4 << 20
_MAX_FAILURES: Final = 3  # in a row; each may take the server's time limit
_MAX_WAITING: Final = 200_000  # metrics kept while a server does not answer; the oldest go first
_BATCH_METRICS: Final = 1000  # MLflow's limits of one request
_BATCH_PARAMS: Final = 100
_PARAM_CHARS: Final = 6000
_MLFLOW_ENVIRONMENT: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own 7 and 120 s hold a training up for a quarter of an hour
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_./ -]")  # what MLflow takes in no name

Ended = Literal["FINISHED", "FAILED", "KILLED"]
"""How an attempt ended, in MLflow's words: at its end, by a fault, by whoever stopped it."""

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One place where the history goes. Methods may raise anything; `Trackers` catches it."""

    name: str

    def step(self, row: StepRow) -> None:
        """Take one step; quick, asks no server."""

    def score(self, row: ScoreRow) -> None:
        """Take one validation; quick, asks no server."""

    def save(self, storage: Storage) -> None:
        """Make what was taken readable by others; ``storage`` is the training's folder."""

    def close(self, storage: Storage, artefacts: Mapping[str, bytes], ended: Ended) -> None:
        """Save, add the finished files by name, and let go of all resources."""


class Trackers:
    """All trackers of a training; none is fine. No method raises for a tracker that fails."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        self._active = list(trackers)
        self._warn = warn
        self._failures: dict[str, int] = {}
        self._warned: set[str] = set()

    def step(self, row: StepRow) -> None:
        self._each(lambda tracker: tracker.step(row))

    def score(self, row: ScoreRow) -> None:
        self._each(lambda tracker: tracker.score(row))

    def save(self, storage: Storage) -> None:
        """Make what was taken readable by others; to be called at checkpoints."""
        for tracker in self._each(lambda tracker: tracker.save(storage)):
            self._failures.pop(tracker.name, None)

    def close(self, storage: Storage, artefacts: Mapping[str, bytes], ended: Ended = "FINISHED") -> None:
        """End the tracking of an attempt; ``artefacts`` are the files of a finished training by name."""
        self._each(lambda tracker: tracker.close(storage, artefacts, ended))
        self._active = []

    def _each(self, call: Callable[[Tracker], None]) -> list[Tracker]:
        """Call each tracker; the ones that did not fail."""
        done = []
        for tracker in tuple(self._active):
            try:
                call(tracker)
            except Exception as error:  # whatever a client library raises: the training matters more
                self._failed(tracker, error)
            else:
                done.append(tracker)
        return done

    def _failed(self, tracker: Tracker, error: Exception) -> None:
        name = tracker.name
        self._failures[name] = self._failures.get(name, 0) + 1
        if self._failures[name] >= _MAX_FAILURES:
            self._active.remove(tracker)
        if name not in self._warned:
            self._warned.add(name)
            reason = without_credentials(" ".join(str(error).split()))[:300]
            self._warn(f"tracking.{name} failed ({type(error).__name__}: {reason}); the training goes on")


def check_tracking(config: TrackingConfig) -> None:
    """Raise `ConfigError` where a package that the config needs is not installed; asks no server."""
    wanted = {"tensorboard": config.tensorboard, "mlflow": config.mlflow is not None}
    for name, asked in wanted.items():
        if asked and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name} needs {name}", "", f'Install it: pip install "segpipe[{name}]".'
            )


def open_trackers(
    config: TrackingConfig,
    output: str,
    params: Mapping[str, Any],
    start_step: int = 0,
    warn: Callable[[str], None] = _log.warning,
) -> Trackers:
    """Make the trackers that a config asks for; of one process of a training only. No server is asked yet.

    Args:
        config: What is tracked where.
        output: URI of the training's folder; its last part names the MLflow run.
        params: The config as a tree; logged as "section.key".
        start_step: Steps that were done before: what an earlier attempt tracked after them is superseded.
        warn: Called once for each tracker that fails.

    Raises `ConfigError` for a missing package.
    """
    check_tracking(config)
    flat = dict(_flattened(params))
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoardTracker(flat, start_step))
    if config.mlflow is not None:
        trackers.append(MlflowTracker(config.mlflow, config.experiment, output, flat))
    return Trackers(trackers, warn)


def step_metrics(row: StepRow) -> dict[str, float]:
    """Return what is tracked of a step, by name; what is None is left out."""
    values = {
        "train/loss": row.loss,
        **{f"train/loss_{name}": value for name, value in row.parts.items()},
        "train/lr": row.lr,
        "train/grad_norm": row.grad_norm,
        "train/samples_per_s": row.samples_per_s,
        "train/epoch": float(row.epoch),
    }
    return {name: value for name, value in values.items() if value is not None}


def score_metrics(row: ScoreRow) -> dict[str, float]:
    """Return what is tracked of a validation, by name; what is undefined is left out."""
    columns = zip(iou_columns(list(row.class_iou)), row.class_iou.values(), strict=True)
    values = {
        "validation/metric": row.metric,
        **{f"validation/{name}": value for name, value in row.scores.items()},
        **{f"validation/{name}": value for name, value in columns},
        "validation/train_loss": row.train_loss,
    }
    return {name: value for name, value in values.items() if value is not None}


class TensorBoardTracker:
    """Event files in a temporary folder, copied to ``tensorboard/`` of the training's folder by ``save``.

    Each attempt writes files of its own, numbered in order, which TensorBoard reads one after the other.
    """

    name = "tensorboard"

    def __init__(self, params: Mapping[str, str], start_step: int) -> None:
        self._params = params
        self._purge_step: int | None = start_step + 1
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._writer: Any = None
        self._key: str | None = None
        self._files = 0

    def step(self, row: StepRow) -> None:
        self._add(step_metrics(row), row.step)

    def score(self, row: ScoreRow) -> None:
        self._add(score_metrics(row), row.step)

    def save(self, storage: Storage) -> None:
        if self._writer is None:
            return
        self._writer.flush()
        data = b"".join(path.read_bytes() for path in sorted(self._file_folder().iterdir()))
        if self._key is None:
            self._key = _claimed(storage, data)
        else:
            storage.put(self._key, data)
        if len(data) >= _ROTATE_BYTES:
            self._close_file()

    def close(self, storage: Storage, artefacts: Mapping[str, bytes], ended: Ended) -> None:
        try:
            self.save(storage)
        finally:
            self._close_file()
            if self._folder is not None:
                self._folder.cleanup()

    def _add(self, metrics: Mapping[str, float], step: int) -> None:
        writer = self._open_file() if self._writer is None else self._writer
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def _open_file(self) -> Any:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(
                prefix="segpipe-tensorboard-", ignore_cleanup_errors=True
            )
        summary_writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = summary_writer(str(self._file_folder()), purge_step=self._purge_step)
        if self._files == 0:
            lines = [f"    {name}: {value}" for name, value in self._params.items()]  # indented: code
            self._writer.add_text("config", "\n".join(lines), (self._purge_step or 1) - 1)
        self._purge_step = None  # a later file of this attempt supersedes nothing
        return self._writer

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._files += 1
        self._writer, self._key = None, None

    def _file_folder(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{self._files:05d}"


class MlflowTracker:
    """A run of an MLflow server (or folder), found again by OUTPUT_TAG; asked at checkpoints only."""

    name = "mlflow"

    def __init__(self, uri: str, experiment: str, output: str, params: Mapping[str, str]) -> None:
        self._uri = uri
        self._experiment = experiment
        self._output = without_credentials(output)
        self._params = params
        self._waiting: deque[tuple[str, float, int, int]] = deque(maxlen=_MAX_WAITING)
        self._client: Any = None
        self._run_id = ""

    def step(self, row: StepRow) -> None:
        self._take(step_metrics(row), row.step)

    def score(self, row: ScoreRow) -> None:
        self._take(score_metrics(row), row.step)

    def save(self, storage: Storage) -> None:
        self._open()
        metric = importlib.import_module("mlflow.entities").Metric
        while self._waiting:
            batch = [self._waiting[place] for place in range(min(_BATCH_METRICS, len(self._waiting)))]
            self._client.log_batch(self._run_id, metrics=[metric(*item) for item in batch])
            for _ in batch:  # only now: a batch that failed is sent again
                self._waiting.popleft()

    def close(self, storage: Storage, artefacts: Mapping[str, bytes], ended: Ended) -> None:
        self.save(storage)
        try:
            with tempfile.TemporaryDirectory(prefix="segpipe-mlflow-") as folder:
                for name, data in artefacts.items():
                    path = Path(folder) / name
                    path.write_bytes(data)
                    self._client.log_artifact(self._run_id, str(path))
        finally:
            self._client.set_terminated(self._run_id, ended)

    def _take(self, metrics: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        self._waiting.extend((name, value, now_ms, step) for name, value in metrics.items())

    def _open(self) -> None:
        """Find or make the run. Whatever fails here is tried again at the next save."""
        if self._run_id:
            return
        for name, value in _MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._client = importlib.import_module("mlflow.tracking").MlflowClient(self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(self._experiment)
        run = self._earlier_run(experiment_id)
        if run is None:
            name = self._output.rstrip("/").rpartition("/")[2]
            run = self._client.create_run(experiment_id, tags={OUTPUT_TAG: self._output}, run_name=name)
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._log_params(run)
        self._run_id = run.info.run_id

    def _earlier_run(self, experiment_id: str) -> Any:
        quote = '"' if "'" in self._output else "'"
        query = f"tags.`{OUTPUT_TAG}` = {quote}{self._output}{quote}"
        runs = self._client.search_runs([experiment_id], query, max_results=1)
        return runs[0] if runs else None

    def _log_params(self, run: Any) -> None:
        """Log what the run lacks: MLflow refuses to change a parameter, such as a new number of workers."""
        param = importlib.import_module("mlflow.entities").Param
        new = [param(*item) for item in self._params.items() if item[0] not in run.data.params]
        for start in range(0, len(new), _BATCH_PARAMS):
            self._client.log_batch(run.info.run_id, params=new[start : start + _BATCH_PARAMS])


def _claimed(storage: Storage, data: bytes) -> str:
    """Put an event file under the first number after all that are there, and return its key."""
    keys = [info.key for page in storage.list(TENSORBOARD_PREFIX) for info in page]
    taken = [key.removeprefix(TENSORBOARD_PREFIX).partition(".")[0] for key in keys]
    number = max((int(text) for text in taken if text.isdecimal()), default=-1) + 1
    while not storage.put_if_absent(key := f"{TENSORBOARD_PREFIX}{number:05d}.segpipe", data):
        number += 1
    return key


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a tree as ("section.key", text), without credentials."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            key = _NO_NAME.sub("_", f"{prefix}{name}")
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield key, without_credentials(text)[:_PARAM_CHARS]
