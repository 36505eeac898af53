"""Folders of one command given to another, places that cannot be written, flags that contradict a config."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive import make_model, ok, predict, run, write_label, write_scene

CLASSES = [{"name": "ground", "color": [0, 0, 0]}, {"name": "roof", "color": [200, 30, 40]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with labels, a model, a finished run, a prepared data set and a training."""
    root = tmp_path_factory.mktemp("places")
    model = make_model(root / "model.safetensors", "pixel")
    for number in range(4):
        write_scene(root / f"in/s{number}.tif", 64, 64, seed=number)
        write_label(root / f"labels/s{number}.tif", np.full((64, 64), number % 2, np.uint8))
    ok(predict(root / "in", model, root / "run"))
    ok(prepare(root, root / "data", "--split", "val=s0"))
    ok(train(root, root / "trained"))
    return root


def prepare(root: Path, output: Path, *more: Any, labels: str = "labels/{stem}.tif") -> Any:
    sets = ["--set", f"classes={json.dumps(CLASSES)}", "--set", "cluster.executor=local"]
    return run("prepare", "folder", root / "in", "-o", output, "--labels", f"{root}/{labels}", *sets, *more)


def train(root: Path, output: Path, *more: Any) -> Any:
    sets = {
        "train.steps": 2,
        "train.global_batch": 2,
        "model.family": "pixel",
        "data.augment.crop_px": 32,
        "validation.tile_px": 32,
        "validation.margin_px": 8,
    }
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    return run("train", "--data", root / "data", "-o", output, "--executor", "local", *words, *more)


def test_the_folder_of_a_training_is_no_run(folder: Path) -> None:
    for command in (("verify", folder / "trained"), ("export", folder / "trained", "-o", folder / "x")):
        run(*command).refused(2, "run.json", "holds a training, and no masks or scores")
    done = predict(folder / "in", folder / "model.safetensors", folder / "trained")
    done.refused(2, "holds a training", "an --output of its own")


def test_a_data_set_is_no_output_of_predict_and_train(folder: Path) -> None:
    before = sorted((folder / "data").rglob("*"))
    predict(folder / "in", folder / "model.safetensors", folder / "data").refused(2, "a prepared data set")
    train(folder, folder / "data").refused(2, "a prepared data set")
    assert sorted((folder / "data").rglob("*")) == before


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_folder_of_images_is_no_output_of_predict_and_train(
    folder: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    write_scene(tmp_path / "images/deep/a.tif", 32, 32)
    done = predict(folder / "in", folder / "model.safetensors", tmp_path / "images", *more)
    done.refused(2, f"{tmp_path}/images", "images that are no run's, such as deep/a.tif")
    train(folder, tmp_path / "images", *more).refused(2, "images that are no run's, such as deep/a.tif")
    assert [path.name for path in (tmp_path / "images").rglob("*.*")] == ["a.tif"]


def test_an_export_into_the_run_or_over_foreign_files_is_refused_and_leaves_them(
    folder: Path, tmp_path: Path
) -> None:
    run("export", folder / "run", "-o", folder / "run/masks").refused(2, "lies in the run itself")
    write_scene(tmp_path / "s1.tif", 32, 32)
    scene = (tmp_path / "s1.tif").read_bytes()
    done = run("export", folder / "run", "-o", tmp_path)
    assert done.code == 4
    assert "conflict: s1: the file that is there is no export of segpipe" in done.err
    assert (tmp_path / "s1.tif").read_bytes() == scene
    assert len(list(tmp_path.glob("*.tif"))) == 4


def test_scores_are_no_part_of_the_run_that_they_score(folder: Path) -> None:
    words = ("--labels", f"{folder}/labels/{{stem}}.tif", "--masks", folder / "run", "-o", folder / "run")
    run("evaluate", folder / "in", *words).refused(2, "the output is the run of --masks itself")


@pytest.mark.parametrize("name", ["run", "trained"])
def test_a_run_is_no_output_of_prepare(folder: Path, name: str) -> None:
    prepare(folder, folder / name).refused(2, "the output holds a run")
    assert not (folder / name / "dataset.json").exists()


def test_an_executor_that_is_none_is_refused_by_report_as_by_predict(folder: Path) -> None:
    run("report", folder / "run", "--executor", "locl").refused(2, "cluster.executor", "locl")


def test_an_export_to_where_nothing_can_be_written_is_no_success(folder: Path) -> None:
    run("export", folder / "run", "-o", "/proc/nothing").refused(3, "/proc/nothing", "--output")


def test_a_dry_run_of_a_training_refuses_what_its_start_would(folder: Path) -> None:
    ok(train(folder, folder / "trained", "--dry-run"))
    changed = train(folder, folder / "trained", "--dry-run", "--set", "train.lr=0.5")
    changed.refused(2, "a training by another recipe", "train.lr: 0.5 here")


def test_a_split_on_the_command_line_is_the_whole_split(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("split: {fractions: {val: 0.99}}\n")
    more = ("--config", tmp_path / "config.yaml", "--split", "test=s3", "--dry-run", "--json")
    assert ok(prepare(folder, tmp_path / "out", *more)).tree["splits"] == {"test": 1, "train": 3}


def test_a_training_without_length_says_how_to_give_one(folder: Path, tmp_path: Path) -> None:
    done = run("train", "--data", folder / "data", "-o", tmp_path / "out", "--executor", "local")
    done.refused(2, "give epochs or steps")


def test_a_split_name_that_cannot_be_tells_its_form(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", "--split", "Val=0.5").refused(2, "Val", "of the form ^[a-z]")


def test_a_folder_that_may_not_be_written_is_named_by_every_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, mkdir = str(tmp_path / "locked"), os.mkdir

    def denied(path: Any, *more: Any, **named: Any) -> None:
        """As for a user without the right to write; root always has it."""
        if str(path).startswith(locked):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *more, **named)

    monkeypatch.setattr(os, "mkdir", denied)
    words = (locked, "permission denied", "Check the permissions")
    predict(folder / "in", folder / "model.safetensors", locked).refused(2, *words)
    done = prepare(folder, Path(locked))
    assert done.code == 3
    assert all(word in done.err.splitlines()[-1] for word in words)
    train(folder, Path(locked)).refused(2, *words)
    run("export", folder / "run", "-o", locked).refused(3, *words)
    assert not Path(locked).exists()
