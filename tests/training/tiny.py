"""A tiny prepared data set: coloured blobs on grey, made by our own prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segpipe.config.card import ClassInfo
from segpipe.config.prepare import PrepareConfig
from segpipe.pipelines.events import Events
from segpipe.pipelines.prepare import run_prepare

CLASSES = tuple(
    ClassInfo(name=name, color=color)
    for name, color in (("ground", (0, 0, 0)), ("red", (255, 0, 0)), ("blue", (0, 0, 255)))
)
COLOURS = np.array([(110, 120, 100), (200, 60, 50), (50, 70, 190)])


def tiny_dataset(
    folder: Path, *, samples: int = 24, px: int = 64, form: str = "parquet", **options: Any
) -> str:
    """Write ``samples`` images, a quarter of them in the split val, and prepare them; its folder."""
    rng = np.random.default_rng(5)
    for kind in ("images", "labels"):
        (folder / "raw" / kind).mkdir(parents=True)
    for number in range(samples):
        label = np.zeros((px, px + number % 3), np.uint8)
        for index in (1, 2):
            row, col = rng.integers(0, px - 20, 2)
            label[row : row + 20, col : col + 20] = index
        label[0, :] = 255
        shown = COLOURS[np.where(label == 255, 0, label)] + rng.normal(0, 12, (*label.shape, 3))
        Image.fromarray(shown.clip(0, 255).astype(np.uint8)).save(folder / f"raw/images/{number:03d}.png")
        Image.fromarray(label).save(folder / f"raw/labels/{number:03d}.png")
    config = PrepareConfig(
        layout="folder",
        sources=(str(folder / "raw/images"),),
        output=str(folder / "prepared"),
        labels=str(folder / "raw/labels/{stem}.png"),
        classes=CLASSES,
        split={"globs": {"val": tuple(f"{n:03d}" for n in range(0, samples, 4))}},  # type: ignore[arg-type]
        format=form,  # type: ignore[arg-type]
        cluster={"executor": "local"},  # type: ignore[arg-type]
        **options,
    )
    run_prepare(config, Events())
    return str(folder / "prepared")
