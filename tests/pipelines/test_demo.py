"""``segpipe demo``: what the packaged archive shows, in full, and nothing of it twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from archive import files, objects, ok, run

from segpipe.demo.archive import DemoArchive, demo_archive

LEAST_BUILDING_IOU = 0.62


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects to anything fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the demo must need no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_the_demo_finds_buildings_draws_and_exports_every_scene_and_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    first = ok(run("demo", "--executor", "local", "--output", out))
    stems = {path.stem for path in demo_archive().scenes.iterdir()}
    assert len(stems) == 4
    assert {path.name for path in (out / "pictures").iterdir()} == {f"{stem}.png" for stem in stems}
    assert {path.name for path in (out / "geotiff").glob("*.tif")} == {f"{stem}.tif" for stem in stems}
    classes = pq.read_table(out / "run/reports/classes.parquet").to_pylist()
    iou = {row["class"]: row["iou"] for row in classes}
    assert iou["building"] >= LEAST_BUILDING_IOU
    assert f"{iou['building']:.4f}" in first.out
    assert "nothing to compute" not in first.err
    found, written = objects(out / "run"), files(out)
    # Installed anew: the same files with other times.
    data = shutil.copytree(
        demo_archive().scenes.parent, tmp_path / "installed", copy_function=shutil.copyfile
    )
    packaged = DemoArchive(
        data / "scenes", data / "labels", data / "model.safetensors", data / "ATTRIBUTION.md"
    )
    monkeypatch.setattr("segpipe.cli.demo.demo_archive", lambda: packaged)
    again = ok(run("demo", "--executor", "local", "--output", out))
    assert "nothing to compute" in again.err
    assert objects(out / "run") == found
    assert files(out) == written


def test_a_scene_that_was_touched_is_computed_and_drawn_anew(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    ok(run("demo", "--executor", "local", "--output", out))
    os.utime(sorted((out / "archive" / "scenes").iterdir())[0], (0, 0))
    again = run("demo", "--executor", "local", "--output", out)
    assert "1 unit to compute" in again.err
    assert "pictures  " in again.out
    assert "(4)" in again.out


def test_the_demo_as_it_is_typed_gives_the_same_masks_on_ray(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "segpipe.cli.main", "demo"]
    subprocess.run([*command, "-o", "ray"], cwd=tmp_path, check=True, timeout=300)
    subprocess.run([*command, "-o", "local", "--executor", "local"], cwd=tmp_path, check=True, timeout=300)
    assert json.loads((tmp_path / "ray/run/run.json").read_text())["config"]["cluster"]["executor"] == "ray"
    by_ray = masks(tmp_path / "ray/run")
    assert len(by_ray) == 4
    assert by_ray == masks(tmp_path / "local/run")


def masks(folder: Path) -> dict[str, bytes]:
    """The encoded masks by block; the objects also name their own archive's paths."""
    rows = [
        row for path in sorted(folder.glob("masks/**/*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    return {f"{row['scene_id']} {row['row_off']} {row['col_off']}": row["mask"] for row in rows}
