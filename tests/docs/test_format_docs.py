"""What docs/format.md shows runs, and does what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive import (
    CLASSES,
    local,
    make_model,
    ok,
    predict,
    run,
    scene_pixels,
    tell_changed,
    whole_masks,
    write_label,
    write_scene,
)

from segpipe.training.finish import Trained

TEXT = (Path(__file__).parents[2] / "docs/format.md").read_text(encoding="utf-8")


def test_the_python_example_reads_the_newest_mask_of_a_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model.safetensors", "pixel")
    write_scene(tmp_path / "in/other.tif", 50, 60)
    found = []
    for seed, width in ((1, 150), (2, 130)):
        write_scene(tmp_path / "in/scene0.tif", 110, width, seed=seed)
        tell_changed(tmp_path / "in/scene0.tif")
        ok(predict("in", model, "run", block_px=64, unit_px=8000))
        names: dict[str, Any] = {}
        exec(compile(code, "docs/format.md", "exec"), names)
        assert np.array_equal(names["mask"], whole_masks("run")["scene0"])
        assert len(names["rows"]) > 1
        found.append((names["newest"], names["mask"].shape))
    assert found == [(0, (110, 150)), (1, (110, 130))]


def documented() -> dict[str, set[str]]:
    """Command -> keys, as the table of JSON results has them."""
    _, found, rest = TEXT.partition("\n## What `--json` prints\n")
    assert found
    keys: dict[str, set[str]] = {}
    command = ""
    for name, cell in re.findall(r"^\| (.*?) ?\| (.*) \|$", rest.partition("\n## ")[0], re.MULTILINE)[1:]:
        command = name or command
        keys.setdefault(command, set()).update(re.findall(r"`(\w+)`", cell))
    return keys


def printed(folder: Path) -> Iterator[tuple[str, set[str]]]:
    """(Command as the table has it, keys of what it prints), of all but a training."""
    model = make_model(folder / "model.safetensors", "pixel")
    for number in range(2):
        write_scene(folder / f"in/s{number}.tif", 64, 64, seed=number)
        write_label(folder / f"labels/s{number}.tif", scene_pixels(1, 64, 64, number)[0] % 3)
    labels = ("--labels", folder / "labels/{stem}.tif")
    asked = (folder / "in", *labels, "--model", model, "--json", *local())
    for command in ("predict", "evaluate"):
        for more in (("--dry-run",), ()):
            done = ok(run(command, *asked, "-o", folder / command, *more))
            yield f"predict, evaluate{': dry run' if more else ''}", set(done.tree)
    yield "verify", set(ok(run("verify", folder / "predict", "--json")).tree)
    yield "report", set(ok(run("report", folder / "predict", "--json")).tree)
    yield "export", set(ok(run("export", folder / "predict", "-o", folder / "tif", "--json")).tree)
    classes = json.dumps([info.model_dump(mode="json") for info in CLASSES])
    words = (
        "prepare",
        "folder",
        folder / "in",
        *labels,
        "--set",
        f"classes={classes}",
        "--executor",
        "local",
    )
    words += ("-o", folder / "data", "--json")
    yield "prepare: dry run", set(ok(run(*words, "--dry-run")).tree)
    made = set(ok(run(*words)).tree)
    yield "prepare", made - set(json.loads((folder / "data/dataset.json").read_text()))
    words = ("train", "--data", folder / "data", "-o", folder / "trained", "--executor", "local", "--json")
    words += ("--set", "train.steps=2", "--set", "train.global_batch=2", "--set", "validation.splits=[]")
    words += ("--set", "model.family=pixel", "--set", "data.augment.crop_px=32", "--dry-run")
    yield "train: dry run", set(ok(run(*words)).tree)


def test_the_table_of_json_results_has_every_key_and_no_other(tmp_path: Path) -> None:
    table = documented()
    always = table.pop("each")
    assert table.pop("train") == {field.name for field in fields(Trained)}
    checked = set()
    for command, keys in printed(tmp_path):
        assert keys >= always, command
        assert keys - always == table[command], command
        checked.add(command)
    assert checked == table.keys()


def test_an_error_prints_nothing_on_stdout(tmp_path: Path) -> None:
    for words in (
        ("predict", tmp_path / "none", "--model", tmp_path / "none", "-o", tmp_path / "run"),
        ("predict", tmp_path / "none", "-o", tmp_path / "run", "--dry-run"),
        ("verify", tmp_path),
        ("export", tmp_path, "-o", tmp_path / "out"),
        ("prepare", "folder", tmp_path / "none", "--dry-run"),
        ("train", "--data", tmp_path, "-o", tmp_path / "out"),
    ):
        done = run(*words, "--json").refused(2)
        assert done.out == ""
