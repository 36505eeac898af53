"""Each recipe of jobs/configs runs from its one file through prepare, train, predict and evaluate.

Real images, but few steps of small crops, a random start in place of pretrained weights, one or two scenes.
Where the whole data set is not at hand, samples of it stand in, and a small network for a large one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from archive import ok, run

from segpipe.config.prepare import load_prepare
from segpipe.models.file import load_model
from segpipe.storage import open_storage
from segpipe.training.history import read_steps

CONFIGS = Path(__file__).parents[2] / "jobs/configs"
STEPS = 2
SMALL = {
    "init.weights": "null",
    "init.sha256": "null",
    "train.epochs": "null",
    "train.steps": STEPS,
    "train.global_batch": 2,
    "train.warmup_steps": 0,
    "data.augment.crop_px": 64,
    "validation.every_steps": STEPS,
}
SMALL_UNET = {"model.family": "unet", "model.options": "{width: 4, depth: 2}"}


@pytest.fixture
def folder(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the images in data/, as the recipes want them."""
    (tmp_path / "data").symlink_to(shared_data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(part: str, name: str, sets: dict[str, Any], *more: str) -> None:
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    ok(run(part, "--config", CONFIGS / f"{name}.yaml", "--executor", "local", *words, *more))


def run_recipe(
    name: str,
    include: str | None,
    root: str = ".",
    *,
    train: dict[str, Any] | None = None,
    prepare: dict[str, Any] | None = None,
    predict: dict[str, Any] | None = None,
    evaluate: dict[str, Any] | None = None,
) -> None:
    """The four commands with outputs below ``root``; ``include`` picks the scenes of the last two."""
    at = {part: f"{root}/{name}/{part}" for part in ("prepare", "train", "predict", "evaluate")}
    few = {"model": f"{at['train']}/model.safetensors"}
    if include is not None:
        few["input.include"] = f'["{include}"]'
    command("prepare", name, prepare or {}, "--output", at["prepare"])
    command("train", name, SMALL | (train or {}), "--data", at["prepare"], "--output", at["train"])
    command("predict", name, few | (predict or {}), "--output", at["predict"])
    command("evaluate", name, few | (evaluate or {}), "--output", at["evaluate"])
    check_outputs(name, at)


def check_outputs(name: str, at: dict[str, str]) -> None:
    """Scores came out, the model has the recipe's classes, its card names the licence of the data."""
    config = load_prepare((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"), {}, (), name)
    storage = open_storage(at["train"])
    assert read_steps(storage)["step"].to_pylist() == list(range(1, STEPS + 1))
    assert config.licence is not None
    assert config.licence in storage.read("README.md").decode()
    _, card = load_model(f"{at['train']}/model.safetensors")
    assert card.training["licence"] == config.licence
    masks, scores = (
        json.loads(open_storage(at[part]).read("reports/summary.json")) for part in ("predict", "evaluate")
    )
    for done in (masks, scores):
        assert (done["scenes"]["ok"], done["scenes"]["failed"]) == (done["scenes"]["all"], 0)
    assert scores["compared_px"] > 0
    assert 0 <= scores["scores"]["miou"] <= 1
    assert [row["class"] for row in scores["classes"]] == [info.name for info in card.classes]


def test_camvid(folder: Path) -> None:
    run_recipe("camvid", "0016E5_07959")


def test_camvid_over_s3(folder: Path, s3_prefix: str) -> None:
    run_recipe("camvid", "0016E5_07959", s3_prefix, train=SMALL_UNET)
    assert sorted(path.name for path in folder.iterdir()) == ["data"]


ONE_TILE = "tile4/images/image_part_001"
ONE_TILE_SPLIT = {"split.globs": f"{{val: [{ONE_TILE}], unused: ['tile4/**', 'tile8/**']}}"}


def test_aerial_land_cover(folder: Path) -> None:
    run_recipe("aerial_land_cover", ONE_TILE, prepare=ONE_TILE_SPLIT)


def test_aerial_land_cover_over_s3(folder: Path, s3_prefix: str) -> None:
    run_recipe("aerial_land_cover", ONE_TILE, s3_prefix, prepare=ONE_TILE_SPLIT, train=SMALL_UNET)
    assert sorted(path.name for path in folder.iterdir()) == ["data"]


def test_demo(folder: Path) -> None:
    run_recipe("demo", "banepa_z18_193345_110121_*")


def test_aerial_buildings(folder: Path) -> None:
    few_chips = {"archive.chips_per_mpx": 4}
    run_recipe(
        "aerial_buildings",
        "banepa_z18_193345_110121_*",
        prepare=few_chips,
        evaluate={"input.include": '["*/r*"]', "input.scenes": "[./aerial_buildings/prepare/shards]"},
    )


def test_cityscapes_on_one_image(folder: Path, shared_data: Path) -> None:
    (folder / "data").unlink()
    (folder / "data").mkdir()
    (folder / "data/cityscapes").symlink_to(shared_data / "fixtures/cityscapes")
    own_split = {"data.train_splits": "[val]", "validation.splits": "[]", "train.batch_norm": "train"}
    shards = {"input.scenes": "[./cityscapes/prepare/shards]"}
    run_recipe("cityscapes", None, train=SMALL_UNET | own_split, evaluate=shards)


def test_voc_on_four_images(folder: Path, shared_data: Path) -> None:
    (folder / "data").unlink()
    devkit = folder / "data/VOCdevkit"
    devkit.mkdir(parents=True)
    (devkit / "VOC2012").symlink_to(shared_data / "fixtures/voc/VOC2011")
    names = (devkit / "VOC2012/ImageSets/Segmentation/val.txt").read_text().split()
    lines = [f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg\n" for name in names]
    (folder / "data/voc_val.txt").write_text("".join(lines))
    run_recipe("voc", None, train=SMALL_UNET | {"train.batch_norm": "train"})
