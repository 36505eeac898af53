"""Plain images and image shards give the same masks and scores as the same pixels in files of their own."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive import local, make_model, ok, predict, rows, run, scene_pixels, tell_changed
from PIL import Image

NUM_IMAGES = 30


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images() -> dict[str, tuple[bytes, bytes]]:
    """Name to (PNG, PNG of the label)."""
    made = {}
    for number in range(NUM_IMAGES):
        pixels = scene_pixels(3, 30 + number, 40, seed=number)
        label = np.roll(pixels.argmax(axis=0).astype(np.uint8), 1)
        made[f"n{number:02d}"] = (png(np.moveaxis(pixels, 0, -1)), png(label))
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model.safetensors", "pixel")


def write_files(folder: Path, images: dict[str, tuple[bytes, bytes]]) -> None:
    for name, (image, label) in images.items():
        for path, data in ((folder / f"s/{name}.png", image), (folder / f"labels/{name}.png", label)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def write_tar(folder: Path, images: dict[str, tuple[bytes, bytes]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name, pair in images.items():
            for suffix, data in zip((".png", ".label.png"), pair, strict=True):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(folder: Path, images: dict[str, tuple[bytes, bytes]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "sample_id": list(images),
        "image": [image for image, _ in images.values()],
        "label": [label for _, label in images.values()],
    }
    pq.write_table(pa.table(columns), folder / "s.parquet", row_group_size=8)


def evaluated(folder: Path, scenes: Path, model: Path, *more: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return (scene id to its row's mask and counts, the confusion table) of a run."""
    cut = {"unit_px": 10 * 32**2}
    ok(run("evaluate", scenes, "--model", model, "--output", folder / "run", *more, *local(**cut)))
    columns = ("scene_id", "mask", "class_px", "label_px", "confusion")
    found = {row.pop("scene_id"): row for row in rows(folder / "run", *columns)}
    return found, pq.read_table(folder / "run/reports/confusion.parquet").to_pylist()


def test_shards_give_the_masks_and_scores_of_the_same_files(
    tmp_path: Path, model: Path, images: dict[str, tuple[bytes, bytes]]
) -> None:
    write_files(tmp_path / "files", images)
    write_tar(tmp_path / "tar", images)
    write_parquet(tmp_path / "parquet", images)
    labels = ("--labels", "{parent}/../labels/{stem}.png", "--set", "input.exclude=[labels/*]")
    expected = evaluated(tmp_path / "files", tmp_path / "files", model, *labels)
    assert set(expected[0]) == {f"s/{name}" for name in images}
    for kind, suffix in (("tar", "tar"), ("parquet", "parquet")):
        found = evaluated(tmp_path / kind, tmp_path / kind / f"s.{suffix}", model)
        assert found == expected, kind
        plan = pq.read_table(tmp_path / kind / "run/plan/part-00000.parquet").to_pylist()
        assert {row["shard_members"] for row in plan} == {NUM_IMAGES}
        assert plan[-1]["first_unit"] > 2, "a unit is a range of members"
        assert run("verify", tmp_path / kind / "run").code == 0


def test_a_shard_that_changes_after_planning_fails_its_rows_and_is_planned_anew(
    tmp_path: Path, model: Path, images: dict[str, tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import segpipe.pipelines.predict as driver

    write_tar(tmp_path, images)
    real = driver.make_plan

    def make_plan(*args: Any) -> Any:
        totals = real(*args)
        write_tar(tmp_path, dict(list(images.items())[:-5]))
        tell_changed(tmp_path / "s.tar")
        return totals

    with monkeypatch.context() as patch:
        patch.setattr(driver, "make_plan", make_plan)
        assert predict(tmp_path / "s.tar", model, tmp_path / "run").code == 5
    assert {row["error_kind"] for row in rows(tmp_path / "run", "error_kind")} <= {
        "scene_changed", "shard_count",
    }  # fmt: skip
    done = predict(tmp_path / "s.tar", model, tmp_path / "run", "--json").tree
    assert done["summary"]["scenes"]["ok"] == NUM_IMAGES - 5
