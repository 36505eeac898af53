"""``segpipe train`` as it is typed: the dry run, and what is told on the way."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import rich.console
from runs import TINY
from tiny import tiny_dataset

from segpipe.cli import progress as progress_module
from segpipe.cli import train as train_module
from segpipe.cli.main import main
from segpipe.cli.train import TrainProgress
from segpipe.training.history import ScoreRow, StepRow


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (progress_module, train_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def words(uri: str, output: Path, *more: str) -> list[str]:
    sets = [word for key, value in TINY.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["train", "--data", uri, "-o", str(output), "--executor", "local", *sets, *more]


def without_pixels(dataset: Path, keep: tuple[int, ...]) -> None:
    """Take the labelled pixels of all classes but ``keep`` out of the split train in dataset.json."""
    tree = json.loads(dataset.read_text())
    counts = tree["splits"]["train"]["class_px"]
    tree["splits"]["train"]["class_px"] = [px if index in keep else 0 for index, px in enumerate(counts)]
    dataset.write_text(json.dumps(tree))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, output = tiny_dataset(tmp_path, samples=12), tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="0"):
        main(words(uri, output, "--set", "train.precision=fp32", "--dry-run", "--json"))
    heard = capsys.readouterr()
    plan = json.loads(heard.out)
    cpus = {name: plan.pop(name) for name in ("device", "cpus_per_worker")}
    assert plan == {
        "schema_version": 1,
        "exit_code": 0,
        "family": "unet",
        "bands": ["red", "green", "blue"],
        "classes": ["ground", "red", "blue"],
        "samples": {"train": 9, "val": 3},
        "train_splits": ["train"],
        "validation_splits": ["val"],
        "global_batch": 4,
        "steps": 12,
        "steps_done": 0,
        "workers": 1,
        "precision": "fp32",
        "threads_per_worker": 1,
        "loader_threads": 1,
    }
    assert cpus["device"] in ("cpu", "cuda")
    assert cpus["cpus_per_worker"] >= 1
    assert heard.err == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_warns_of_classes_that_never_occur_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = tiny_dataset(tmp_path, samples=12)
    without_pixels(tmp_path / "prepared/dataset.json", keep=(0, 1))
    with pytest.raises(SystemExit, match="0"):
        main(words(uri, tmp_path / "run", "--dry-run", "--json"))
    heard = capsys.readouterr()
    assert heard.err == "warning: classes that never occur in the training splits: blue\n"
    assert json.loads(heard.out)["steps"] == 12


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_split_without_labels_is_refused_by_a_dry_run_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: bool
) -> None:
    uri = tiny_dataset(tmp_path, samples=12)
    without_pixels(tmp_path / "prepared/dataset.json", keep=())
    with pytest.raises(SystemExit, match="2"):
        main(words(uri, tmp_path / "run", *(["--dry-run"] if dry_run else [])))
    assert "no pixel of the training splits has a label" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_infinite_number_is_a_fault_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words("nowhere", tmp_path / "run", "--set", "train.lr=.inf"))
    assert "train.lr: must be a finite number (got inf)" in capsys.readouterr().err


def test_a_data_set_without_a_finite_mean_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = tiny_dataset(tmp_path, samples=12)
    dataset = tmp_path / "prepared/dataset.json"
    dataset.write_text(json.dumps(json.loads(dataset.read_text()) | {"mean": [float("nan"), 1.0, 2.0]}))
    with pytest.raises(SystemExit, match="2"):
        main(words(uri, tmp_path / "run", "--dry-run"))
    assert "of the data set is not finite" in capsys.readouterr().err


def step_row(step: int) -> StepRow:
    return StepRow(
        step=step,
        epoch=0,
        loss=2.0 / step,
        parts={},
        lr=0.02,
        grad_norm=None,
        samples=4,
        samples_per_s=12.34,
        valid_px=100,
    )


def test_lines_tell_loss_rate_and_what_is_left_each_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainProgress() as progress:
        progress.begun(0, 100)
        for step in range(1, 9):  # 4 s a step, of which the first says nothing
            clock.now_s += 4
            progress.step(step_row(step))
        progress.step(step_row(100))
    assert capsys.readouterr().err.splitlines() == [
        "step 3 of 100  loss 0.6667  12.3 samples/s  lr 0.02  ETA 6:28",  # 97 steps of 4 s
        "step 6 of 100  loss 0.3333  12.3 samples/s  lr 0.02  ETA 6:16",
        "step 100 of 100  loss 0.0200  12.3 samples/s  lr 0.02",
    ]


def test_a_training_that_goes_on_counts_its_eta_from_its_own_first_step(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainProgress() as progress:
        progress.begun(90, 100)
        progress.step(step_row(91))
        clock.now_s += 30
        progress.step(step_row(94))
    assert capsys.readouterr().err == "step 94 of 100  loss 0.0213  12.3 samples/s  lr 0.02  ETA 1:00\n"


def test_a_terminal_shows_one_bar_and_lines_above_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    console = rich.console.Console(file=terminal, width=120, force_terminal=True, color_system=None)
    monkeypatch.setattr(rich.console, "Console", lambda **_: console)
    with TrainProgress() as progress:
        progress.begun(40, 100)
        progress.step(step_row(41))
        clock.now_s += 5
        progress.step(step_row(46))
        score = ScoreRow(50, 1.25, 0.5, True, {"miou": 0.5}, {}, 100, 1.0)
        progress.score(score)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    lines = [line.strip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert "validation at step 50 (epoch 1.25): 0.5000  best so far" in lines
    assert re.fullmatch(r"steps \S+ +40/100", lines[0])
    assert re.fullmatch(r"steps .* 46/100 loss 0.0435  12.3 samples/s  lr 0.02  ETA 0:54", lines[-1])


def test_nothing_to_train_is_said_without_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with TrainProgress() as progress:
        progress.begun(12, 12)
    assert terminal.getvalue() == "all steps are done already; nothing to train\n"
