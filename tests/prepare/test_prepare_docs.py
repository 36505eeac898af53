"""docs/prepare.md names what there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from typer.testing import CliRunner

from segpipe.cli.main import app
from segpipe.config.prepare import LAYOUTS, PrepareConfig
from segpipe.datasets import layouts

TEXT = (Path(__file__).parents[2] / "docs/prepare.md").read_text(encoding="utf-8")


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_of_the_config_is_in_the_table_and_no_other() -> None:
    table = TEXT.partition("| key | default | |")[2]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in row.split(", ")}
    assert {name.strip("`") for name in named} == set(leaves(PrepareConfig))


def test_every_layout_is_in_the_docs_in_the_help_and_registered() -> None:
    shown = " ".join(CliRunner().invoke(app, ["prepare", "--help"]).output.split())
    assert tuple(sorted(layouts.LAYOUTS)) == LAYOUTS
    assert ", ".join(LAYOUTS) in re.sub(r"[\s|]+", " ", shown)
    for name in LAYOUTS:
        assert f"| `{name}` |" in TEXT
        assert f"segpipe prepare {name} " in TEXT


def test_options_in_the_docs_are_those_of_the_command() -> None:
    shown = CliRunner().invoke(app, ["prepare", "--help"], env={"COLUMNS": "200"}).output
    block = TEXT.split("```")[1].replace("\\\n", " ")
    words = [word for line in block.strip().splitlines() for word in shlex.split(line)]
    options = {word for word in words if word.startswith("--")} | {
        "--set",
        "--dry-run",
        "--executor",
        "--format",
    }
    assert options >= {"--output", "--split", "--labels", "--config"}
    assert all(option in shown for option in options)
