"""The recipes of jobs/configs: each is whole, and its four parts fit together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from segpipe.config.card import IGNORE
from segpipe.config.load import load_config
from segpipe.config.model import SegpipeConfig
from segpipe.config.prepare import PrepareConfig, load_prepare
from segpipe.config.train import TrainConfig, load_train
from segpipe.datasets.coco_maps import map_categories
from segpipe.datasets.layouts import make_layout
from segpipe.errors import ConfigError
from segpipe.models.families import build

FOLDER = Path(__file__).parents[2] / "jobs/configs"
FILES = sorted(FOLDER.glob("*.yaml"))


@dataclass(frozen=True, slots=True)
class Recipe:
    text: str
    prepare: PrepareConfig
    train: TrainConfig
    predict: SegpipeConfig
    evaluate: SegpipeConfig

    @property
    def class_names(self) -> list[str]:
        """Of the data set, as its layout makes them without looking at files."""
        layout = self.prepare.layout
        if layout == "coco":
            return [name for _, name in map_categories(self.prepare.coco.map_values).values()]
        if layout in ("folder", "archive"):
            return [info.name for info in self.prepare.classes]
        return [info.name for info in make_layout(self.prepare).classes]

    @property
    def splits(self) -> set[str]:
        config = self.prepare
        if config.layout in ("folder", "archive"):
            return {"train", *config.split.fractions, *config.split.globs}
        return set(config.coco.maps or config.coco.annotations) or {"train", "val"}


@pytest.fixture(params=FILES, ids=[path.stem for path in FILES])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    text = request.param.read_text(encoding="utf-8")
    where = request.param.name
    return Recipe(
        text,
        load_prepare(text, {}, (), where),
        load_train(text, {}, (), where),
        load_config(text, {}, (), where, "predict"),
        load_config(text, {}, (), where, "evaluate"),
    )


def test_there_is_a_recipe_for_each_known_data_set() -> None:
    assert {path.stem for path in FILES} >= {
        "aerial_buildings",
        "aerial_land_cover",
        "camvid",
        "cityscapes",
        "coco",
        "demo",
        "voc",
    }


def test_the_four_parts_hand_their_outputs_on(recipe: Recipe) -> None:
    assert recipe.train.data.uri == recipe.prepare.output
    assert recipe.predict.model == f"{recipe.train.output}/model.safetensors"
    assert recipe.evaluate.model == recipe.predict.model
    shards = f"{recipe.prepare.output}/shards"
    for config in (recipe.predict, recipe.evaluate):
        assert all(scene.startswith("data/") or scene == shards for scene in config.input.scenes)
    assert all(source.startswith("data/") for source in recipe.prepare.sources)


def test_no_two_commands_write_into_one_folder() -> None:
    outputs = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        outputs += [load_prepare(text, {}, (), path.name).output, load_train(text, {}, (), path.name).output]
        outputs += [load_config(text, {}, (), path.name, part).output for part in ("predict", "evaluate")]
    assert None not in outputs
    assert len(set(outputs)) == len(outputs)


def test_a_wrong_class_index_of_a_label_map_is_named_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"label_map\.b: must be a whole number \(got 'x'\)"):
        load_prepare("{layout: folder, label_map: {a: 1, b: x}}", {}, (), "job.yaml")


def test_splits_are_those_that_prepare_makes(recipe: Recipe) -> None:
    assert set(recipe.train.data.train_splits) <= recipe.splits
    assert set(recipe.train.validation.splits) <= recipe.splits
    assert not set(recipe.train.data.train_splits) & set(recipe.train.validation.splits)


def test_labels_are_scored_by_the_classes_that_were_trained(recipe: Recipe) -> None:
    wanted, top = recipe.evaluate.input, len(recipe.class_names)
    assert all(index < top or index == IGNORE for index in wanted.label_map.values())
    assert set(wanted.label_map.values()) - {IGNORE} in (set(), set(range(top)))
    if recipe.prepare.labels and wanted.labels:
        assert (wanted.labels, wanted.label_map) == (recipe.prepare.labels, recipe.prepare.label_map)
    own_labels = wanted.scenes == (f"{recipe.prepare.output}/shards",)  # shards hold class indices
    assert (wanted.labels is None) == own_labels
    assert not (own_labels and wanted.label_map)


def test_a_metric_of_one_class_names_a_class(recipe: Recipe) -> None:
    kind, _, name = recipe.train.validation.metric.partition(":")
    assert kind != "iou" or name in recipe.class_names


def test_the_best_weights_are_chosen_by_the_tiles_that_predict_uses(recipe: Recipe) -> None:
    chosen_by = recipe.train.validation
    for config in (recipe.predict, recipe.evaluate):
        assert config.inference.margin_px == chosen_by.margin_px
        assert config.inference.tile_px in ("auto", chosen_by.tile_px)  # auto: the model card's, validation's


def test_the_network_can_be_built(recipe: Recipe) -> None:
    model = recipe.train.model
    with torch.device("meta"):
        build(model.family, bands=3, classes=len(recipe.class_names), **model.options)


def test_pretrained_weights_are_local_files_with_the_digest_in_their_name(recipe: Recipe) -> None:
    init = recipe.train.init
    if init.weights is not None:
        assert init.weights.startswith("data/")
        assert init.weights.removesuffix(".pth").endswith(f"-{init.sha256}")
        assert recipe.train.model.normalise == "imagenet"


def test_crops_fit_into_chips(recipe: Recipe) -> None:
    if recipe.prepare.layout == "archive":
        assert recipe.train.data.augment.crop_px <= recipe.prepare.archive.chip_px


def test_a_recipe_says_what_it_needs(recipe: Recipe) -> None:
    head = recipe.text.partition("recipe:")[0]
    assert head.startswith("# ")
    assert "data/" in head
    assert recipe.prepare.licence


def test_labels_of_coco_s_maps_are_scored_as_they_were_prepared() -> None:
    text = (FOLDER / "coco.yaml").read_text(encoding="utf-8")
    categories = enumerate(map_categories("stuff_thing"))
    label_map = load_config(text, {}, (), "coco.yaml", "evaluate").input.label_map
    assert label_map == {str(value): index for index, value in categories}
