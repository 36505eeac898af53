"""Pixels without data in training and validation: the band mean, as in ``predict``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rasters import UTM33, write_tiff
from torch import nn

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.config.model import LimitsConfig
from segpipe.config.prepare import PrepareConfig
from segpipe.config.train import AugmentConfig, DataConfig, ValidationConfig
from segpipe.datasets.batches import BatchStream, ImageSlice
from segpipe.datasets.images import decode_image, encode_image
from segpipe.datasets.prepared import open_dataset
from segpipe.models.families import build
from segpipe.models.file import save_model
from segpipe.pipelines.events import Events
from segpipe.pipelines.prepare import run_prepare
from segpipe.training.comm import Comm
from segpipe.training.validate import count_images

SIDE_PX = 80
HOLE = np.s_[10:40, 25:60]
CLASSES = (ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(9, 9, 9)))


def write_scene(path: Path, kind: str) -> None:
    """A scene whose hole holds values far from all others."""
    dtype, bands = {"nan": ("float32", 4), "alpha": ("uint8", 3), "nodata": ("uint16", 4)}[kind]
    pixels = np.random.default_rng(3).integers(90, 120, (bands, SIDE_PX, SIDE_PX)).astype(dtype)
    more: dict[str, Any] = {}
    if kind == "nan":
        pixels[(slice(None), *HOLE)] = np.nan
    elif kind == "alpha":
        pixels[(slice(None), *HOLE)] = 255
        alpha = np.full((1, SIDE_PX, SIDE_PX), 255, np.uint8)
        alpha[(0, *HOLE)] = 0
        pixels, more = np.concatenate([pixels, alpha]), {"alpha": 4, "photometric": "RGB"}
    else:
        pixels[(slice(None), *HOLE)] = 60_000
        more = {"nodata": 60_000}
    path.parent.mkdir(parents=True)
    write_tiff(path, pixels, **UTM33, **more)


@pytest.fixture(params=["nan", "alpha", "nodata"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with one scene, its label (a class for every pixel) and the data set of both."""
    write_scene(tmp_path / "scenes/a.tif", request.param)
    (tmp_path / "labels").mkdir()
    label = np.random.default_rng(4).integers(0, 2, (1, SIDE_PX, SIDE_PX), dtype=np.uint8)
    write_tiff(tmp_path / "labels/a.tif", label, **UTM33)
    config = PrepareConfig(
        layout="archive",
        sources=(str(tmp_path / "scenes"),),
        labels=str(tmp_path / "labels/{stem}.tif"),
        classes=CLASSES,
        output=str(tmp_path / "prepared"),
        cluster={"executor": "local"},  # type: ignore[arg-type]
    )
    run_prepare(config, Events())
    return tmp_path


def test_samples_hold_the_band_mean_where_there_is_no_data(archive: Path) -> None:
    dataset = open_dataset(str(archive / "prepared"))
    assert all(90 < mean < 120 for mean in dataset.mean)
    config = DataConfig(
        uri=str(archive / "prepared"),
        train_splits=tuple(dataset.splits),
        augment=AugmentConfig(preset="none", crop_px=SIDE_PX),
    )
    places = {"seed": 1, "global_batch": 1, "rank": 0, "world": 1, "first_step": 0, "stop_step": 1}
    with BatchStream(dataset, config, threads=1, **places) as stream:
        (batch,) = list(stream)
    image, label = batch.images[0].numpy(), batch.labels[0].numpy()
    hole = label == 255
    assert hole.sum() == 30 * 35
    assert np.abs(image[:, hole]).max() < 0.1
    assert np.isfinite(image).all()
    assert np.abs(image[:, ~hole]).max() < 3


def test_validation_counts_what_evaluate_counts(archive: Path) -> None:
    dataset = open_dataset(str(archive / "prepared"))
    torch.manual_seed(0)
    model = build("unet", bands=dataset.bands, classes=2, width=4, depth=2).eval()
    heads = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    card = ModelCard(
        family="unet",
        options={"width": 4, "depth": 2},
        bands=tuple(f"band{number}" for number in range(dataset.bands)),
        dtype=dataset.dtype,
        mean=dataset.mean,
        std=dataset.std,
        tile_px=64,
        classes=CLASSES,
    )
    with torch.no_grad():  # so that both classes occur
        _, sample = next(iter(ImageSlice(dataset, tuple(dataset.splits), 0, 1)))
        mean, std = (np.asarray(each, np.float32)[:, None, None] for each in (card.mean, card.std))
        x = torch.from_numpy((sample.filled(card.mean).astype(np.float32) - mean) / std)[None, :, :64, :64]
        heads[-1].bias -= model(x).mean((0, 2, 3))
    save_model(archive / "model.safetensors", model, card)
    config = ValidationConfig(splits=tuple(dataset.splits), tile_px=64, margin_px=8)
    counts = count_images(model, card, dataset, config, Comm(), "cpu", 1)
    command = [
        sys.executable, "-m", "segpipe.cli.main", "evaluate", str(archive / "scenes"), "--json",
        "--labels", str(archive / "labels/{stem}.tif"), "--model", str(archive / "model.safetensors"),
        "--output", str(archive / "scores"), "--executor", "local",
        "--set", "inference.margin_px=8", "--set", "cluster.threads_per_worker=1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["summary"]
    assert (counts > 0).sum() == 4
    assert counts.sum() == summary["compared_px"] == SIDE_PX**2 - 30 * 35
    assert summary["scores"]["accuracy"] == pytest.approx(np.trace(counts) / counts.sum(), abs=1e-12)


@pytest.mark.parametrize(
    ("dtype", "bands", "suffix"),
    [
        ("uint8", 1, "png"),
        ("uint8", 3, "png"),
        ("uint8", 2, "tif"),
        ("uint16", 4, "tif"),
        ("float32", 3, "tif"),
    ],
)
def test_encoded_images_keep_what_is_no_data(dtype: str, bands: int, suffix: str) -> None:
    pixels = np.random.default_rng(6).integers(0, 250, (bands, 33, 47)).astype(dtype)
    valid = np.ones((33, 47), bool)
    data, found = encode_image(pixels, valid)
    assert found == suffix
    assert data == encode_image(pixels, None)[0]
    assert decode_image(data, "x", LimitsConfig()).valid is None
    valid[4:9, 7:30] = False
    image = decode_image(encode_image(pixels, valid)[0], "x", LimitsConfig())
    assert image.valid is not None
    np.testing.assert_array_equal(image.valid, valid)
    np.testing.assert_array_equal(image.pixels[:, valid], pixels[:, valid])
