"""docs/train.md names what there is, and the README's chapter on training can be typed as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive import ok, run
from PIL import Image
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from segpipe.cli.main import app
from segpipe.config.train import TrainConfig
from segpipe.models.families import FAMILIES
from segpipe.models.file import load_model
from segpipe.training.history import ORDER_SCHEMA, scores_schema, steps_schema

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "docs/train.md").read_text(encoding="utf-8")
FEW_STEPS = {
    "train.epochs": "null",
    "train.steps": 2,
    "train.global_batch": 2,
    "data.augment.crop_px": 64,
    "validation.tile_px": 128,
}


def chapter() -> str:
    """The README's chapter "Train"; the test fails where there is none."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    _, found, rest = readme.partition("\n## Train\n")
    assert found, "README.md has no chapter '## Train'"
    return rest.partition("\n## ")[0]


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return str(found)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def shown(field: FieldInfo) -> str:
    """A default as the table writes it."""
    if field.is_required():
        return "needed"
    value: Any = field.default
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_table_has_every_key_of_the_config_with_its_default_and_no_other() -> None:
    table = TEXT.partition("| key | default | |")[2]
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| (.*?) \| ", table, re.MULTILINE)
    assert dict(rows) == {name: shown(field) for name, field in leaves(TrainConfig)}
    assert len(rows) == len(dict(rows))


def test_columns_of_the_history_are_in_the_docs() -> None:
    names = [*steps_schema().names, *scores_schema().names, *ORDER_SCHEMA.names]
    assert [name for name in names if f"`{name}`" not in TEXT] == []


def test_families_and_options_of_the_command_are_in_the_docs() -> None:
    assert [name for name in FAMILIES if f"`{name}`" not in TEXT] == []
    help_text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"--[a-z-]+", help_text)) - {"--help"}
    assert [option for option in options if option not in TEXT] == []


def test_files_that_the_docs_name_exist() -> None:
    named = re.findall(r"`((?:jobs|docs|segpipe)/[\w./]+)`", TEXT)
    assert named
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_commands_of_the_docs_use_a_recipe_that_is_there() -> None:
    lines = [line for line in block(TEXT, "bash").splitlines() if line.startswith("segpipe ")]
    assert [line.split()[1] for line in lines] == ["prepare", "train", "predict", "evaluate"]
    for line in lines:
        words = shlex.split(line)
        assert (REPOSITORY / words[words.index("--config") + 1]).is_file()


def write_images(folder: Path, count: int) -> None:
    """``count`` squares on grey, and their masks, 80 x 96 px."""
    random = np.random.default_rng(3)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for number in range(count):
        label = np.zeros((80, 96), np.uint8)
        row, col = random.integers(0, 50, 2)
        label[row : row + 25, col : col + 25] = 1
        pixels = np.array([(90, 110, 90), (190, 80, 70)])[label] + random.normal(0, 10, (80, 96, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{number:02d}.png")
        Image.fromarray(label).save(folder / f"labels/{number:02d}.png")


def test_the_readme_s_training_runs_one_command_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, in this process, but with the local executor and two steps of two small crops."""
    monkeypatch.chdir(tmp_path)
    text = chapter()
    write_images(tmp_path, 8)
    (tmp_path / "houses.yaml").write_text(block(text, "yaml"), encoding="utf-8")
    lines = [line.split("  #")[0].strip() for line in block(text, "bash").splitlines()]
    assert [line.split()[:2] for line in lines] == [
        ["segpipe", part] for part in ("prepare", "train", "predict", "evaluate")
    ]
    for line in lines:
        more = ["--executor", "local"]
        if line.split()[1] == "train":
            more += [word for key, value in FEW_STEPS.items() for word in ("--set", f"{key}={value}")]
        ok(run(*shlex.split(line)[1:], *more))
    _, card = load_model("trained/model.safetensors")
    assert [info.name for info in card.classes] == ["ground", "house"]
    scores = json.loads((tmp_path / "scores/reports/summary.json").read_text())
    assert scores["scenes"]["ok"] == 8
    assert scores["compared_px"] == 8 * 80 * 96
