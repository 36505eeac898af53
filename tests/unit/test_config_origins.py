"""Messages about a config name the source of the fault: the file, the flags or ``--set``."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from segpipe.cli.main import app
from segpipe.config.load import load_config
from segpipe.config.prepare import load_prepare
from segpipe.config.schema import config_schema
from segpipe.config.train import load_train
from segpipe.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "sets", "flags", "words"),
    [
        ("model: a", [], {"cluster.executor": "locl"}, "flags: cluster.executor: must be 'ray' or 'local'"),
        ("inference: {tile_px: 8}", ["inference.tile_px=9"], {}, "--set: inference.tile_px: must be"),
        ("inference: {tile_px: 8}", ["inference.batch_size=9"], {}, "job.yaml: inference.tile_px: must be"),
        ("cluster: {executor: x}", [], {"cluster.executor": "locl"}, "flags: cluster.executor: must be"),
        ("model: a", ["cluster.executor=x"], {"cluster.executor": "locl"}, "--set: cluster.executor: must"),
        ("model: a", ["cluster=4"], {"cluster.executor": "ray"}, "--set: cluster: must be a mapping"),
        ("model: a", ["input.scenes=[a, 3]"], {}, "--set: input.scenes[1]: must be text (got 3)"),
        ("model: a", ["inferense.tile_px=64"], {}, "--set: unknown key inferense (did you"),
        ("inferense: {}", ["inferense.tile_px=64"], {}, "job.yaml and --set: unknown key inferense"),
        ("inference: {tilepx: 8}", ["inference.tile_px=64"], {}, "job.yaml: unknown key inference.tilepx"),
        (
            "modl: a",
            ["outputt=b"],
            {},
            "job.yaml: unknown key modl (did you mean model?); --set: unknown key",
        ),
        ("input: {label_map: {7: 900}}", ["output=x"], {}, "job.yaml: input.label_map: class indices"),
        ("model: a", ["input.label_map.7=900"], {}, "--set: input.label_map: class indices"),
    ],
)
def test_a_fault_is_told_where_it_came_from(
    text: str, sets: list[str], flags: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(text, flags, sets, "job.yaml")
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("text", "sets", "words"),
    [
        ("{data: {uri: a}, train: {epochs: 2}}", ["train.steps=5"], "t.yaml and --set: train.epochs: give"),
        ("{data: {uri: a}}", ["train.lr=0.1"], "t.yaml: train.epochs: give epochs or steps, one of them"),
        ("{train: {epochs: 2}}", ["data.augment.crop_px=64"], "t.yaml: data.uri: is needed"),
    ],
)
def test_a_rule_across_keys_names_the_sources_of_all_of_them(text: str, sets: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_train(text, {}, sets, "t.yaml")
    assert str(caught.value).startswith(words)


def test_a_layout_of_a_flag_is_not_told_as_the_file_s() -> None:
    text = "{sources: [a], classes: [{name: a, color: [0, 0, 0]}]}"
    with pytest.raises(ConfigError, match=r"^job\.yaml and flags: classes: the layout voc brings its own"):
        load_prepare(text, {"layout": "voc"}, [], "job.yaml")
    with pytest.raises(ConfigError, match=r"^flags: format: must be 'parquet' or 'tar' \(got 'tarr'\)"):
        load_prepare(text, {"layout": "folder", "format": "tarr"}, [], "job.yaml")


@pytest.mark.parametrize(("command", "load"), [("prepare", load_prepare), ("train", load_train)])
def test_the_advice_names_a_command_that_is_installed_and_shows_the_keys(
    command: str, load: Callable[..., object]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load("{}", {}, [], "job.yaml")
    (line,) = re.findall(r"See `segpipe (.*?)` for all keys\.$", str(caught.value))
    shown = CliRunner().invoke(app, shlex.split(line))
    assert json.loads(shown.output) == config_schema(command)
