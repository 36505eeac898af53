"""What the README says can be typed as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from archive import make_model, ok, run, scene_pixels, write_label, write_scene

from segpipe.cli.main import app
from segpipe.config.load import load_config

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """All but those of the chapter "Train", which test_train_docs.py runs."""
    before, _, train_on = README.partition("\n## Train\n")
    text = f"{before}\n{train_on.partition('## ')[2]}"
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def usage_lines() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("segpipe ")]


def test_the_commands_of_the_readme_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        write_scene(tmp_path / f"archive/scene{seed}.tif", 70, 90, seed=seed)
        label = scene_pixels(1, 70, 90, seed)[0] % 2
        write_label(tmp_path / f"labels/scene{seed}.tif", label)
    make_model(tmp_path / "model.safetensors")
    lines = usage_lines()
    assert [line.split()[1] for line in lines] == ["predict", "evaluate", "verify", "export"]
    for line in lines:
        more = ["--executor", "local"] if line.split()[1] in ("predict", "evaluate") else []
        if line.split()[1] == "predict":
            more += ["--set", "inference.margin_px=8"]
        ok(run(*shlex.split(line)[1:], *more))
    assert sorted(path.name for path in (tmp_path / "geotiff").glob("*.tif")) == ["scene0.tif", "scene1.tif"]


def test_the_readme_s_filter_keeps_labels_out_of_the_scenes(tmp_path: Path) -> None:
    """As the README says: without it the labels are scenes too."""
    write_scene(tmp_path / "archive/scenes/a.tif", 70, 90)
    write_label(tmp_path / "archive/labels/a.tif", scene_pixels(1, 70, 90)[0] % 2)
    model = make_model(tmp_path / "model.safetensors")
    words = ["predict", tmp_path / "archive", "--model", model, "-o", tmp_path / "run", "--dry-run", "--json"]
    words += ["--executor", "local", "--set", "inference.margin_px=8"]
    (setting,) = re.findall(r"`--set '(input\.include=.+?)'`", README)
    assert ok(run(*words)).tree["scenes"] == 2
    assert ok(run(*words, "--set", setting)).tree["scenes"] == 1
    named = ("--labels", "{parent}/../labels/{stem}.tif")
    assert ok(run(*words, *named)).tree["scenes"] == 1


def test_the_readme_s_config_is_valid() -> None:
    (text,) = blocks("yaml")
    config = load_config(text, {}, [], "README.md")
    assert config.output == "s3://masks/2026-buildings"


def test_the_readme_has_one_line_to_run_it_and_one_to_test_it() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if "pip install" in line]
    assert len(lines) == 2
    assert lines[0].endswith(".venv/bin/segpipe demo")
    assert lines[1].endswith(".venv/bin/python -m pytest")


def test_ci_runs_the_readme_s_test_line() -> None:
    script = (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    (expression,) = re.findall(r"sed -n '([^']+)' README.md", script)
    command = ["sed", "-n", expression, str(REPOSITORY / "README.md")]
    (line,) = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    assert line.endswith(".venv/bin/python -m pytest")


def test_files_and_modules_that_the_readme_names_exist() -> None:
    named = re.findall(r"`((?:segpipe|jobs|docs)/[\w./]+)`", README) + re.findall(r"\]\(([\w./-]+)\)", README)
    assert named
    missing = [name for name in named if not (REPOSITORY / name).exists()]
    assert not missing


def test_every_command_has_a_help_text() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {"predict", "evaluate", "verify", "report", "export", "demo"} <= names
    for command in app.registered_commands:
        assert command.callback.__doc__


FORMAT_PAGE = (REPOSITORY / "docs" / "format.md").read_text(encoding="utf-8")


def columns_of_chapter(title: str) -> dict[str, str]:
    """Column -> type as the table of a chapter of the format page has them."""
    _, found, rest = FORMAT_PAGE.partition(f"\n## {title}\n")
    assert found, f"docs/format.md has no chapter '## {title}'"
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", rest.partition("\n## ")[0], re.MULTILINE)
    names = [(name, kind) for cell, kind in rows[1:] for name in cell.split(", ")]
    assert len(dict(names)) == len(names), "a column stands there twice"
    return dict(names)


def in_words(kind: Any) -> str:
    """A type as the format page writes it."""
    if pa.types.is_list(kind):
        return f"list of {in_words(kind.value_type)}"
    return "struct" if pa.types.is_struct(kind) else str(kind)


@pytest.mark.parametrize(("title", "schema"), [("Plan rows", "PLAN_SCHEMA"), ("Mask rows", "MASK_SCHEMA")])
def test_the_format_page_has_every_column_with_its_type_and_no_other(title: str, schema: str) -> None:
    from segpipe.masks import schema as stored

    fields = {field.name: in_words(field.type) for field in getattr(stored, schema)}
    assert columns_of_chapter(title) == fields


def test_the_format_page_names_every_error_kind() -> None:
    from segpipe.errors import ERROR_KINDS

    _, _, kinds = FORMAT_PAGE.partition("\n## Error kinds\n")
    assert re.findall(r"\b[a-z]+(?:_[a-z]+)*(?=[,.])", kinds.partition(" The list")[0]) == list(ERROR_KINDS)
