"""Loading the config, and the recipe key that follows from it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.config.load import MAX_TEXT_BYTES, load_config
from segpipe.config.model import SegpipeConfig
from segpipe.config.prepare import load_prepare
from segpipe.config.recipe import differences, masks_recipe, recipe, recipe_key
from segpipe.config.schema import CONFIGS, config_schema
from segpipe.config.train import load_train
from segpipe.errors import ConfigError


def load(text: str | None = None, *sets: str, **overrides: Any) -> SegpipeConfig:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(text, dotted, sets, "job.yaml")


def fault(text: str | None = None, *sets: str, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *sets, **overrides)
    return str(caught.value)


def test_no_text_and_an_empty_text_give_the_defaults() -> None:
    assert load() == load("") == load("# nothing\n") == SegpipeConfig()


def test_flags_override_the_text_and_sets_override_flags() -> None:
    text = "inference: {tile_px: 128, margin_px: 8, block_px: 1000}\nmodel: a\n"
    config = load(text, "inference.tile_px=512", inference__tile_px=256, inference__margin_px=16, model=None)
    inference = config.inference
    assert (inference.tile_px, inference.margin_px, inference.block_px) == (512, 16, 1000)
    assert config.model == "a"


def test_a_section_without_value_is_left_out() -> None:
    assert load("inference:\ncluster: {}\n") == SegpipeConfig()


@pytest.mark.parametrize("number", ["1e-3", "0.001", "1.0e-3", "1E-3"])
def test_numbers_with_exponent_are_numbers(number: str) -> None:
    assert load(f"failures: {{max_fraction: {number}}}").failures.max_fraction == 0.001
    assert load(None, f"failures.max_fraction={number}").failures.max_fraction == 0.001


def test_sets_take_lists_and_text() -> None:
    config = load(None, "input.scenes=[a, 'b c']", "input.labels={parent}/{stem}.png", "output=s3://b/x=y")
    assert config.input.scenes == ("a", "b c")
    assert config.output == "s3://b/x=y"


def test_a_template_that_begins_with_a_brace_needs_no_quotes_in_a_set() -> None:
    assert load(None, "input.labels={stem}_mask.tif").input.labels == "{stem}_mask.tif"


def test_label_values_may_be_plain_numbers() -> None:
    config = load("input: {label_map: {7: 1, '#ff0000': 2}}", "input.label_map.9=255")
    assert config.input.label_map == {"7": 1, "#ff0000": 2, "9": 255}


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("inference: {tile_pxx: 4}", "inference.tile_pxx", "inference.tile_px"),
        ("tile_px: 4", "tile_px", "inference.tile_px"),
        ("inferense: {tile_px: 4}", "inferense", "inference"),
        ("input: {limits: {scene_pixels: 4}}", "input.limits.scene_pixels", "input.limits.scene_px"),
        ("labels: x", "labels", "input.labels"),
        ("cluster: {max_fraction: 1}", "cluster.max_fraction", "failures.max_fraction"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(text: str, key: str, nearest: str) -> None:
    assert f"unknown key {key} (did you mean {nearest}?)" in fault(text)


def test_a_key_like_no_other_still_gets_the_nearest() -> None:
    assert "unknown key qqqq (the nearest key is " in fault("qqqq: 1")


def test_an_unknown_key_in_a_set_is_refused() -> None:
    assert "did you mean inference.tile_px?" in fault(None, "inference.tilepx=5")


def test_all_faults_are_reported_in_one_error_one_line_a_key() -> None:
    text = "inference: {tile_px: 8, precision: fp8, compile: maybe, batch_size: x}\ncluster: 4\n"
    message = fault(text, "failures.max_fraction=2")
    assert "inference.tile_px: must be 'auto' or at least 32 (got 8)" in message
    assert "inference.precision: must be 'auto', 'fp32', 'bf16' or 'fp16' (got 'fp8')" in message
    assert "inference.compile: must be true or false (got 'maybe')" in message
    assert "inference.batch_size: must be 'auto' or a whole number (got 'x')" in message
    assert "cluster: must be a mapping (got 4)" in message
    assert "; --set: failures.max_fraction: must be at most 1.0 (got 2)" in message
    assert message.startswith("job.yaml: ")


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.lr", "a finite number"),
        ("train.steps", "a finite number"),
        ("train.loss.dice", "a finite number"),
        ("data.augment.noise", "a finite number"),
        ("cluster.workers", "'auto' or a finite number or a list"),
    ],
)
def test_infinite_numbers_and_nan_are_refused(key: str, words: str, number: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_train("data: {uri: a}\ntrain: {epochs: 1}\n", {}, [f"{key}={number}"], "job.yaml")
    got = number.replace(".", "")
    assert str(caught.value).startswith(f"--set: {key}: must be {words} (got {got})")


@pytest.mark.parametrize(
    "key", ["archive.pixel_m", "archive.chips_per_mpx", "split.grid_m", "limits.scene_px"]
)
def test_infinite_numbers_are_refused_by_prepare(key: str) -> None:
    text = "{layout: folder, sources: [a], classes: [{name: a, color: [0, 0, 0]}]}"
    with pytest.raises(ConfigError, match=re.escape(f"{key}: must be a finite number (got inf)")):
        load_prepare(text, {}, [f"{key}=.inf"], "job.yaml")


def test_infinite_numbers_are_refused_by_predict() -> None:
    assert "failures.max_fraction: must be a finite number (got nan)" in fault(
        None, "failures.max_fraction=.nan"
    )
    assert "input.limits.scene_px: must be a finite number (got inf)" in fault(
        "input: {limits: {scene_px: .inf}}"
    )


def test_rules_across_keys_name_their_key() -> None:
    assert "input.valid: must be auto, none, nodata, alpha or a template" in fault("input: {valid: foo}")
    assert "input.label_map: class indices" in fault("input: {label_map: {7: 900}}")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("label_map.7=2", "label_map: class indices lie between 0 and 1, or are 255 (ignore)"),
        ("label_map.7=-1", "label_map: class indices lie between 0 and 1"),
        ("split.fractions={val: 0.7, test: 0.4}", "split.fractions: add up to more than 1"),
    ],
)
def test_rules_across_keys_of_prepare_name_their_key(setting: str, words: str) -> None:
    text = (
        "{layout: folder, sources: [a], classes: [{name: a, color: [0, 0, 0]}, {name: b, color: [9, 9, 9]}]}"
    )
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_prepare(text, {}, [setting], "job.yaml")


def test_items_of_lists_are_named_by_place() -> None:
    assert "input.scenes[1]: must be text (got 3)" in fault("input: {scenes: [a, 3]}")
    assert "input.bands[0]: must be at least 1 (got 0)" in fault("input: {bands: [0, 1]}")
    assert "input.scenes: must be a list (got 'a')" in fault("input: {scenes: a}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: a\nmodel: b\n", "duplicate key"),
        ("inference: {tile_px: 32, tile_px: 64}", "duplicate key"),
        ("input: {label_map: {7: 1, '7': 2}}", "twice"),
        ("model: &m a\noutput: *m\n", "anchor or alias in line 1"),
        (
            "model: !!python/object/apply:os.system [true]",
            "a tag (tag:yaml.org,2002:python/object/apply:os.system)",
        ),
        ("model: !!binary aGk=", "a tag"),
        ("- model", "is a list, not a mapping"),
        ("just text", "of type str, not a mapping"),
        ("model: [", "no valid YAML in line 1"),
        ("model: a\n---\nmodel: b\n", "another document"),
        ("model: \x00", "no valid YAML"),
        ("[" * 5000, "nested deeper"),
        ("true: 1", "the key True is of type bool"),
        ("#" * (MAX_TEXT_BYTES + 1), "larger than"),
    ],
)
def test_hostile_and_broken_yaml_is_refused(text: str, reason: str) -> None:
    assert reason in fault(text)


def test_an_alias_bomb_is_refused_before_it_is_built() -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
    assert "anchor or alias" in fault(f"a0: &a0 [x, x]\n{levels}\n")


@pytest.mark.parametrize("item", ["inference.tile_px", "=5", " =5"])
def test_a_set_without_key_or_value_is_refused(item: str) -> None:
    assert "is no setting" in fault(None, item)


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=8), max_size=4))
def test_whatever_the_mapping_it_is_a_config_or_a_config_error(tree: dict[str, Any]) -> None:
    with suppress(ConfigError):
        assert isinstance(load(json.dumps(tree)), SegpipeConfig)


def test_a_config_survives_being_written_and_read() -> None:
    config = load("input: {scenes: [a], bands: [3, 2, 1], label_map: {7: 1}}\ninference: {tile_px: 64}")
    assert load(json.dumps(config.model_dump(mode="json"))) == config


def test_the_schema_accepts_the_defaults_and_refuses_unknown_keys() -> None:
    schema = config_schema("predict")
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(SegpipeConfig().model_dump(mode="json"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"inference": {"tile": 4}}, schema)
    assert "Side of the square" in json.dumps(schema)


def card(**changes: Any) -> ModelCard:
    classes = (ClassInfo(name="ground", color=(0, 0, 0)), ClassInfo(name="roof", color=(255, 0, 0)))
    values = {"family": "unet", "bands": ("r",), "mean": (0.0,), "std": (1.0,), "classes": classes}
    return ModelCard(**(values | changes))


def key(*sets: str, weights: str = "ab" * 32, model: ModelCard | None = None) -> str:
    return recipe_key(recipe(load(None, *sets), model or card(), weights))


def test_the_recipe_key_is_stable_over_releases() -> None:
    """A changed key orphans every run that users have: change this value only with ENGINE_VERSION."""
    assert recipe(load(), card(), "00")["inference"]["tile_px"] == "auto"
    assert key() == "b94b1ecb33ab240494356866055fdba766a6142bd18c1fbeae17aba301859cb0"


@pytest.mark.parametrize(
    "setting",
    [
        "input.scenes=[b]",
        "input.include=[b]",
        "input.labels={stem}.png",
        "input.label_map.7=1",
        "input.limits.scene_px=5",
        "output=elsewhere",
        "model=other/name.safetensors",
        "cluster.workers=3",
        "failures.max_fraction=0.5",
    ],
)
def test_where_and_how_widely_a_run_works_is_not_in_the_key(setting: str) -> None:
    assert key(setting) == key()


@pytest.mark.parametrize(
    "setting",
    [
        "inference.tile_px=512",
        "inference.margin_px=31",
        "inference.batch_size=2",
        "inference.precision=fp32",
        "inference.compile=true",
        "input.bands=[1]",
        "input.valid=none",
    ],
)
def test_what_decides_mask_bytes_is_in_the_key(setting: str) -> None:
    assert key(setting) != key()


def test_weights_and_class_map_are_in_the_key() -> None:
    renamed = card(
        classes=(ClassInfo(name="ground", color=(0, 0, 0)), ClassInfo(name="road", color=(255, 0, 0)))
    )
    recoloured = card(
        classes=(ClassInfo(name="ground", color=(0, 0, 1)), ClassInfo(name="roof", color=(255, 0, 0)))
    )
    assert len({key(), key(weights="cd" * 32), key(model=renamed), key(model=recoloured)}) == 4


def test_the_key_does_not_depend_on_the_order_of_names() -> None:
    whole = recipe(load(), card(), "00")
    assert recipe_key(dict(reversed(list(whole.items())))) == recipe_key(whole)
    assert recipe_key(json.loads(json.dumps(whole))) == recipe_key(whole)


def test_scores_of_masks_depend_on_the_masks_and_the_label_map() -> None:
    keys = {recipe_key(masks_recipe(*args)) for args in (("a", {}), ("b", {}), ("a", {"7": 1}))}
    assert len(keys) == 3
    assert recipe_key(masks_recipe("a", {"1": 0, "2": 1})) == recipe_key(masks_recipe("a", {"2": 1, "1": 0}))


def test_differences_name_each_key_with_both_values() -> None:
    here = recipe(load(None, "inference.tile_px=512"), card(), "ab" * 32)
    there = recipe(load(None, "inference.tile_px=1024", "input.bands=[1]"), card(), "cd" * 32)
    assert differences(here, there) == [
        "bands: auto here, [1] there",
        "inference.tile_px: 512 here, 1024 there",
        "weights_sha256: abababababab here, cdcdcdcdcdcd there",
    ]
    assert differences(here, here) == []


def test_differences_show_classes_and_keys_that_one_side_lacks() -> None:
    here = recipe(load(), card(), "00")
    there = json.loads(json.dumps(here))
    there["classes"][1]["name"] = "road"
    del there["inference"]["blend"]
    assert differences(here, there) == [
        "classes[1].name: roof here, road there",
        "inference.blend: crop here, nothing there",
    ]


RECIPE = "recipe: {predict: {model: a}, evaluate: {model: b}, train: {data: {uri: c}, train: {steps: 1}}}"


def test_a_recipe_holds_a_config_for_each_command() -> None:
    assert load_config(RECIPE, {}, (), "r.yaml").model == "a"
    assert load_config(RECIPE, {"output": "o"}, ["model=z"], "r.yaml", "evaluate").model == "z"
    with pytest.raises(ConfigError, match=r"the recipe has no config of prepare\. Add recipe\.prepare"):
        load_config(RECIPE, {}, (), "r.yaml", "prepare")
    with pytest.raises(ConfigError, match="a recipe holds the configs of prepare, train, predict, evaluate"):
        load_config("recipe: {predict: {}, trian: {}}", {}, (), "r.yaml")
    with pytest.raises(ConfigError, match=r"the key model stands beside recipe\. All settings go into"):
        load_config("recipe: {predict: {}}\nmodel: a", {}, (), "r.yaml")


def test_every_config_has_a_schema() -> None:
    for command in CONFIGS:
        jsonschema.Draft202012Validator.check_schema(config_schema(command))
    with pytest.raises(ConfigError, match="no config of 'export'"):
        config_schema("export")


def test_text_of_digits_is_text_where_text_is_asked_for() -> None:
    text = "data: {uri: a}\ntrain: {steps: 1}"
    sets = ["init.sha256=12345678", "data.uri=42", "output=7"]
    config = load_train(text, {}, sets, "t.yaml")
    assert (config.init.sha256, config.data.uri, config.output) == ("12345678", "42", "7")
    assert load_train(text, {}, ["init.sha256=null"], "t.yaml").init.sha256 is None
