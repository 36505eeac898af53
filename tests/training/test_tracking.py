from __future__ import annotations

import http.server
import importlib.util
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from runs import Seen, tiny_config, train
from tiny import tiny_dataset

from segpipe.config.train import TrackingConfig
from segpipe.errors import ConfigError
from segpipe.storage import Storage, open_storage
from segpipe.training import tracking
from segpipe.training.history import ScoreRow, StepRow
from segpipe.training.tracking import (
    Ended,
    Trackers,
    check_tracking,
    open_trackers,
    score_metrics,
    step_metrics,
)

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="the tensorboard package is not installed"
)
needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="the mlflow package is not installed"
)


def step_row(step: int, loss: float = 0.5) -> StepRow:
    return StepRow(step, 0, loss, {"dice": loss / 2}, 1e-3, None, 8, 20.0, 4096)


def score_row(step: int) -> ScoreRow:
    return ScoreRow(step, 1.0, 0.5, True, {"miou": 0.5, "kappa": None}, {"Bare Soil": 0.25}, 9, None)


def test_without_tracking_nothing_is_written_or_loaded(tmp_path: Path) -> None:
    trackers = open_trackers(TrackingConfig(), str(tmp_path / "out"), {"train": {"lr": 1}})
    trackers.step(step_row(1))
    trackers.score(score_row(1))
    storage = open_storage(str(tmp_path / "out"))
    trackers.save(storage)
    trackers.close(storage, {"README.md": b"x"})
    assert list(tmp_path.iterdir()) == []


def test_what_is_undefined_is_not_tracked_and_classes_have_plain_names() -> None:
    assert "train/grad_norm" not in step_metrics(step_row(1))
    assert step_metrics(step_row(1, 0.5))["train/loss_dice"] == 0.25
    expected = {"validation/metric": 0.5, "validation/miou": 0.5, "validation/iou_bare_soil": 0.25}
    assert score_metrics(score_row(1)) == expected


@pytest.mark.parametrize(
    ("config", "name"),
    [(TrackingConfig(tensorboard=True), "tensorboard"), (TrackingConfig(mlflow="x"), "mlflow")],
)
def test_a_missing_package_is_named_with_how_to_get_it(
    config: TrackingConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=rf'tracking\.{name} needs {name}\. Install it: pip install "segpipe\[{name}\]"'
    ):
        check_tracking(config)


class FailingTracker:
    """Fails at the methods that are named; counts all calls."""

    def __init__(self, *methods: str) -> None:
        self.name = "failing" if methods else "sound"
        self.methods = set(methods)
        self.calls = 0

    def _call(self, method: str) -> None:
        self.calls += 1
        if method in self.methods:
            raise RuntimeError("no answer from http://me:hunter2@host/x")

    def step(self, row: StepRow) -> None:
        self._call("step")

    def score(self, row: ScoreRow) -> None:
        self._call("score")

    def save(self, storage: Storage) -> None:
        self._call("save")

    def close(self, storage: Storage, artefacts: Mapping[str, bytes], ended: Ended) -> None:
        self._call("close")


def test_a_failing_tracker_is_warned_about_once_and_then_given_up(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    failing, sound = FailingTracker("save", "close"), FailingTracker()
    warnings: list[str] = []
    trackers = Trackers([failing, sound], warnings.append)
    for step in range(1, 11):
        trackers.step(step_row(step))
        trackers.save(storage)
    trackers.close(storage, {})
    assert warnings == [
        "tracking.failing failed (RuntimeError: no answer from http://host/x); the training goes on"
    ]
    assert failing.calls == 6
    assert sound.calls == 21


def test_a_tracker_that_works_again_is_kept(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    tracker = FailingTracker("save")
    trackers = Trackers([tracker], lambda _: None)
    for step in range(10):
        tracker.methods = {"save"} if step % 3 else set()  # two failures, one success, ...
        trackers.save(storage)
    assert tracker.calls == 10


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def event_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "tensorboard").iterdir())


@needs_tensorboard
def test_tensorboard_reads_the_events_while_the_training_goes_on(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    trackers = open_trackers(TrackingConfig(tensorboard=True), str(tmp_path), {"train": {"lr": 0.5}})
    trackers.save(storage)
    assert list(tmp_path.iterdir()) == []
    trackers.step(step_row(1, 0.5))
    trackers.save(storage)
    assert scalars(tmp_path, "train/loss") == [(1, 0.5)]
    trackers.step(step_row(2, 0.25))
    trackers.score(score_row(2))
    trackers.save(storage)
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 0.25)]
    assert scalars(tmp_path, "validation/iou_bare_soil") == [(2, 0.25)]
    trackers.close(storage, {})
    assert event_files(tmp_path) == ["events.out.tfevents.00000.segpipe"]


@needs_tensorboard
def test_a_resumed_training_adds_a_file_that_supersedes_the_steps_after_its_start(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for start, end, loss in ((0, 5, 1.0), (3, 6, 0.5)):
        config = TrackingConfig(tensorboard=True)
        trackers = open_trackers(config, str(tmp_path), {}, start_step=start)
        for step in range(start + 1, end + 1):
            trackers.step(step_row(step, loss))
        trackers.save(storage)
        if end == 6:
            trackers.close(storage, {})
    assert event_files(tmp_path) == [f"events.out.tfevents.{number:05d}.segpipe" for number in (0, 1)]
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 0.5), (5, 0.5), (6, 0.5)]
    assert scalars(tmp_path, "train/loss") == expected


@needs_tensorboard
def test_a_long_training_spreads_its_events_over_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_ROTATE_BYTES", 2000)
    storage = open_storage(str(tmp_path))
    trackers = open_trackers(TrackingConfig(tensorboard=True), str(tmp_path), {})
    for step in range(1, 31):
        trackers.step(step_row(step))
        trackers.save(storage)
    trackers.close(storage, {})
    assert len(event_files(tmp_path)) > 2
    assert max(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir()) < 3000
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == list(range(1, 31))


def mlflow_client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in tracking._MLFLOW_ENVIRONMENT:  # set by the tracker; taken back after the test
        monkeypatch.setenv(name, tracking._MLFLOW_ENVIRONMENT[name])
    return (tmp_path / "mlruns").as_uri()


@needs_mlflow
def test_mlflow_holds_parameters_metrics_and_files_of_a_finished_training(
    tmp_path: Path, mlflow_uri: str
) -> None:
    storage = open_storage(str(tmp_path))
    config = TrackingConfig(mlflow=mlflow_uri, experiment="roofs")
    params = {
        "train": {"lr": 0.5, "loss": {"dice": 1.0}},
        "model": {"options": {"a:b": [1, 2]}},
        "output": None,
    }
    warnings: list[str] = []
    trackers = open_trackers(config, "s3://bucket/it's/first", params, warn=warnings.append)
    for step in range(1, 4):
        trackers.step(step_row(step, step / 4))
    trackers.score(score_row(3))
    trackers.save(storage)
    trackers.close(storage, {"README.md": b"card", "curves.png": b"png"})
    assert warnings == []
    client = mlflow_client(mlflow_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("roofs").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.tags["segpipe.output"] == "s3://bucket/it's/first"
    expected = {"train.lr": "0.5", "train.loss.dice": "1.0", "model.options.a_b": "[1, 2]", "output": "null"}
    assert run.data.params == expected
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(item.step, item.value) for item in losses] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert run.data.metrics["validation/iou_bare_soil"] == 0.25
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["README.md", "curves.png"]


@needs_mlflow
@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), "KILLED"), (OSError("gone"), "FAILED")])
def test_mlflow_tells_a_stopped_and_a_failed_training_from_a_finished_one(
    tmp_path: Path, mlflow_uri: str, stop: BaseException, status: str
) -> None:
    class Stopping(Seen):
        def step(self, row: StepRow) -> None:
            if row.step == 5:
                raise stop

    uri = tiny_dataset(tmp_path, samples=8)
    config = tiny_config(uri, tmp_path / "run", tracking__mlflow=mlflow_uri, tracking__experiment="roofs")
    client = mlflow_client(mlflow_uri)

    def shown() -> str:
        (run,) = client.search_runs([client.get_experiment_by_name("roofs").experiment_id])
        return str(run.info.status)

    with pytest.raises(type(stop)):
        train(config, Stopping())
    assert shown() == status
    train(config)
    assert shown() == "FINISHED"


@needs_mlflow
def test_a_resumed_training_goes_on_in_the_same_mlflow_run(tmp_path: Path, mlflow_uri: str) -> None:
    storage = open_storage(str(tmp_path))
    config = TrackingConfig(mlflow=mlflow_uri)
    warnings: list[str] = []
    for attempt in (1, 2):
        params = {"train": {"lr": 0.5}, "cluster": {"workers": attempt}}
        trackers = open_trackers(config, "s3://bucket/first", params, attempt - 1, warnings.append)
        trackers.step(step_row(attempt))
        trackers.save(storage)
    other = open_trackers(config, "s3://bucket/second", {}, warn=warnings.append)
    other.save(storage)
    assert warnings == []
    client = mlflow_client(mlflow_uri)
    runs = client.search_runs([client.get_experiment_by_name("segpipe").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["first", "second"]
    first = next(run for run in runs if run.info.run_name == "first")
    assert first.data.params["cluster.workers"] == "1"
    history = client.get_metric_history(first.info.run_id, "train/loss")
    assert [item.step for item in history] == [1, 2]


class _Broken(http.server.BaseHTTPRequestHandler):
    def _refuse(self) -> None:
        self.send_response(400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = _refuse  # noqa: N815

    def log_message(self, *args: Any) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def broken_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@needs_mlflow
@pytest.mark.usefixtures("mlflow_uri")
def test_a_server_that_refuses_ends_no_training_and_loses_no_metric_meanwhile(
    tmp_path: Path, broken_server: str
) -> None:
    storage = open_storage(str(tmp_path))
    warnings: list[str] = []
    tracker = tracking.MlflowTracker(broken_server, "segpipe", "s3://bucket/first", {})
    trackers = Trackers([tracker], warnings.append)
    for step in (1, 2):
        trackers.step(step_row(step))
        trackers.save(storage)
    assert len(warnings) == 1
    assert warnings[0].startswith("tracking.mlflow failed (")
    tracker._uri = (tmp_path / "mlruns").as_uri()
    trackers.save(storage)
    client = mlflow_client(tracker._uri)
    (run,) = client.search_runs([client.get_experiment_by_name("segpipe").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [item.step for item in history] == [1, 2]
