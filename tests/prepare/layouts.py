"""Tiny data sets of each layout, and readers of what prepare wrote."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from segpipe.config.prepare import PrepareConfig
from segpipe.pipelines.events import Events
from segpipe.pipelines.prepare import Prepared, run_prepare

Array = np.ndarray[Any, Any]
LOCAL = {"executor": "local"}


class Heard(Events):
    """Keeps what the driver says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def config_of(layout: str, source: Path, output: Path, **options: Any) -> PrepareConfig:
    options.setdefault("cluster", LOCAL)
    return PrepareConfig(layout=layout, sources=(str(source),), output=str(output), **options)  # type: ignore[arg-type]


def prepared(layout: str, source: Path, output: Path, **options: Any) -> Prepared:
    return run_prepare(config_of(layout, source, output, **options), Heard())


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    """All Parquet rows by sample id, in the order of the shards."""
    tree = json.loads((output / "dataset.json").read_text())
    rows = [row for shard in tree["shards"] for row in pq.read_table(output / shard["key"]).to_pylist()]
    return {row["sample_id"]: row for row in rows}


def pixels_of(data: bytes) -> Array:
    return np.array(Image.open(io.BytesIO(data)))


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def tar_names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def save(path: Path, array: Array, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image = Image.fromarray(array, "P")
        image.putpalette(palette)
    image.save(path, lossless=True) if path.suffix == ".webp" else image.save(path)


def write_camvid(root: Path, count: int = 7, size: tuple[int, int] = (12, 16)) -> dict[str, Array]:
    """``count`` samples, the last two of them in val; returns the labels by sample id."""
    random = np.random.default_rng(5)
    labels, lines = {}, []
    for number in range(count):
        split = "val" if number >= count - 2 else "train"
        labels[f"{split}/im{number}"] = label = random.integers(0, 12, size, dtype=np.uint8)
        save(root / split / f"im{number}.png", random.integers(0, 256, (*size, 3), dtype=np.uint8))
        save(root / f"{split}annot" / f"im{number}.png", label)
        lines.append(
            (split, f"/SegNet/CamVid/{split}/im{number}.png /SegNet/CamVid/{split}annot/im{number}.png")
        )
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("".join(f"{line}\n" for name, line in lines if name == split))
    return labels
