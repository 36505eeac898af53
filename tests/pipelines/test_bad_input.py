"""Bad input gives one clear line and the right exit code, and never a lost or half-written output."""

from __future__ import annotations

import csv
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from archive import (
    Done,
    failures,
    files,
    make_model,
    ok,
    predict,
    rows,
    run,
    write_scene,
)
from rasters import UTM33, write_tiff

import segpipe.pipelines.predict as driver

KIND_OF = {
    "truncated": "decode",
    "zero": "not_raster",
    "text": "not_raster",
    "vrt": "not_raster",
    "huge": "limit",
    "giant_block": "limit",
    "two_bands": "bands",
    "complex": "dtype",
    "sixteen_bit": "dtype",
    "cut_header": "header",
}


def write_bad_scenes(folder: Path) -> None:
    """One file for each entry of KIND_OF."""
    whole = folder / "truncated.tif"
    write_scene(whole, 300, 300, seed=9)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    (folder / "cut_header.tif").write_bytes(data[:60])
    (folder / "zero.tif").write_bytes(b"")
    (folder / "text.tif").write_text("not an image\n")
    source = f"<SimpleSource><SourceFilename>{folder}/a.tif</SourceFilename></SimpleSource>"
    band = f'<VRTRasterBand dataType="Byte" band="1">{source}</VRTRasterBand>'
    vrt = f'<VRTDataset rasterXSize="70" rasterYSize="90">{band * 3}</VRTDataset>'
    (folder / "vrt.tif").write_text(vrt)
    sparse = {"driver": "GTiff", "dtype": "uint8", "count": 3, "tiled": True, "compress": "deflate"}
    sparse |= UTM33 | {"sparse_ok": True, "BIGTIFF": "YES", "interleave": "pixel"}
    for name, side, block in (("huge", 320_000, 4096), ("giant_block", 16_384, 16_384)):
        layout = {"height": side, "width": side, "blockxsize": block, "blockysize": block}
        with rasterio.open(folder / f"{name}.tif", "w", **sparse, **layout):
            pass
    write_tiff(folder / "two_bands.tif", np.ones((2, 40, 40), np.uint8), **UTM33)
    write_tiff(folder / "complex.tif", np.ones((3, 40, 40), np.complex64), **UTM33)
    write_tiff(folder / "sixteen_bit.tif", np.ones((3, 40, 40), np.uint16), **UTM33)


def test_bad_scenes_are_failed_rows_of_their_kind_and_the_rest_is_done(
    tmp_path: Path, scenes: Path, model: Path
) -> None:
    ok(predict(scenes, model, tmp_path / "good"))
    write_bad_scenes(scenes)
    done = predict(scenes, model, tmp_path / "run")
    assert done.code == 5
    assert "Traceback" not in done.err
    assert "10 of 13 scenes have failed" in done.err
    assert "reports/failures.parquet" in done.err
    said = [line for line in done.err.splitlines() if line.startswith("failed: ")]
    assert said[0].startswith(f"failed: not_raster in 3 scenes, first text: {scenes}/text.tif: ")
    assert len(said) == 6, "five kinds with their first scene, and a line for the others"
    assert said[5] == "failed: header in 1 scene"
    assert "what to do about not_raster, dtype, decode, header: repair the sources and run" in done.err
    assert "or raise input.limits if you trust them, and run the same command again" in done.err
    found = failures(tmp_path / "run")
    assert {name: row["error_kind"] for name, row in found.items()} == KIND_OF
    for name, row in found.items():
        assert row["error"].startswith(f"{scenes}/{name}.tif: ")
        assert "\n" not in row["error"]
        assert re.search(r"\. [A-Z].*\.$", row["error"]), "it says what to do"
    assert {
        row["scene_id"] for row in rows(tmp_path / "run", "scene_id", "status") if row["status"] == "ok"
    } == set("abc")
    masks = {row["scene_id"]: row["mask"] for row in rows(tmp_path / "run", "scene_id", "mask")}
    for row in rows(tmp_path / "good", "scene_id", "mask"):
        assert masks[row["scene_id"]] == row["mask"]
    assert (tmp_path / "run/_SUCCESS").exists()
    assert run("verify", tmp_path / "run").code == 0
    before = files(tmp_path / "run")
    again = predict(scenes, model, tmp_path / "run")
    assert again.code == 5, "running again changes nothing"
    assert files(tmp_path / "run") == before


def test_a_repaired_scene_is_computed_alone_and_ends_the_failure(
    tmp_path: Path, scenes: Path, model: Path
) -> None:
    (scenes / "d.tif").write_bytes(b"")
    assert predict(scenes, model, tmp_path / "run").code == 5
    write_scene(scenes / "d.tif", 40, 50, seed=5)
    done = ok(predict(scenes, model, tmp_path / "run", "--json"))
    assert (done.tree["computed"], done.tree["summary"]["scenes"]["failed"]) == (1, 0)
    assert failures(tmp_path / "run") == {}


@pytest.mark.parametrize(("allowed", "code"), [(0.0, 5), (0.24, 5), (0.25, 0), (1.0, 0)])
def test_the_budget_of_failed_scenes_decides_between_0_and_5(
    tmp_path: Path, scenes: Path, model: Path, allowed: float, code: int
) -> None:
    (scenes / "d.tif").write_bytes(b"")
    done = predict(scenes, model, tmp_path / "run", "--set", f"failures.max_fraction={allowed}")
    assert done.code == code
    assert ("1 of 4 scenes has failed, more than failures.max_fraction" in done.err) == (code == 5)


def test_a_budget_that_is_just_met_is_met_whatever_the_fraction() -> None:
    for scenes in (7, 29, 100, 1000):
        for failed in range(1, scenes, 1 + scenes // 50):
            fraction = float(f"{failed / scenes!r}")
            assert (
                driver.Outcome("x", failed_scenes=failed, scenes=scenes, max_fraction=fraction).exit_code == 0
            )
    assert driver.Outcome("x", failed_scenes=29, scenes=100, max_fraction=0.29).exit_code == 0
    assert driver.Outcome("x", failed_scenes=30, scenes=100, max_fraction=0.29).exit_code == 5


def refused(done: Done, output: Path, *words: str) -> None:
    """Exit 2, one line that says what, where and what to do, and nothing written."""
    done.refused(2, *words)
    line = next(line for line in done.err.splitlines() if line.startswith("error: "))
    assert re.search(r"\. [A-Z`]", line), f"it does not say what to do: {line}"
    assert not output.exists()


def test_missing_things_are_refused_by_name(tmp_path: Path, scenes: Path, model: Path) -> None:
    out = tmp_path / "run"
    refused(predict(tmp_path / "nowhere.tif", model, out), out, f"{tmp_path}/nowhere.tif")
    refused(predict(f"{tmp_path}/in/*.jp2", model, out), out, f"{tmp_path}/in/*.jp2", "no scene")
    refused(predict(scenes, tmp_path / "no.safetensors", out), out, f"{tmp_path}/no.safetensors")
    (tmp_path / "list.txt").write_text("in/a.tif\nin/gone.tif\n")
    refused(predict(tmp_path / "list.txt", model, out), out, f"{tmp_path}/in/gone.tif")
    refused(run("predict", "--config", tmp_path / "no.yaml", "--output", out), out, f"{tmp_path}/no.yaml")
    (tmp_path / "empty").mkdir()
    refused(predict(tmp_path / "empty", model, out), out, f"{tmp_path}/empty")
    refused(run("predict", scenes, "--output", out), out, "--model")
    refused(run("predict", "--model", model, "--output", out), out, "input.scenes")


def test_model_files_that_are_no_model_are_refused_and_nothing_is_unpickled(
    tmp_path: Path, scenes: Path, model: Path
) -> None:
    out = tmp_path / "run"

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "evil"),)

    (tmp_path / "model.pth").write_bytes(pickle.dumps(Evil()))
    refused(predict(scenes, tmp_path / "model.pth", out), out, f"{tmp_path}/model.pth", "pickle")
    assert not (tmp_path / "evil").exists()
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:-7])
    refused(predict(scenes, tmp_path / "cut.safetensors", out), out, "cut off")


def test_config_faults_name_the_nearest_key(tmp_path: Path, scenes: Path, model: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "job.yaml").write_text("inference: {tile_pixels: 64}\n")
    done = predict(scenes, model, out, "--config", tmp_path / "job.yaml")
    refused(done, out, f"{tmp_path}/job.yaml", "inference.tile_pixels", "did you mean inference.tile_px?")
    refused(predict(scenes, model, out, blok_px=64), out, "did you mean inference.block_px?")
    refused(predict(scenes, model, out, margin_px=20), out, "inference.margin_px", "at most 8")
    for bands in ("[1,2]", "[1,2,3,1]"):
        refused(predict(scenes, model, out, "--set", f"input.bands={bands}"), out, "input.bands", "takes 3")
    refused(predict(scenes, model, out, precision="fp16"), out, "inference.precision", "GPU")
    (tmp_path / "twice.yaml").write_text("model: a\nmodel: b\n")
    refused(predict(scenes, model, out, "--config", tmp_path / "twice.yaml"), out, "twice.yaml", "model")


def test_two_scenes_of_one_id_are_refused_with_both_names(tmp_path: Path, scenes: Path, model: Path) -> None:
    write_scene(tmp_path / "other/a.tif", 40, 50)
    done = predict([scenes, tmp_path / "other"], model, tmp_path / "run")
    refused(done, tmp_path / "run", "'a'", f"{scenes}/a.tif", f"{tmp_path}/other/a.tif")


@pytest.mark.parametrize("scene_id", ["../a", "x/../../a", "/etc/a", "a\nb"])
def test_a_scene_id_that_climbs_out_is_refused(
    tmp_path: Path, scenes: Path, model: Path, scene_id: str
) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["scene_id", "uri"], [scene_id, str(scenes / "a.tif")]])
    refused(predict(tmp_path / "list.csv", model, tmp_path / "run"), tmp_path / "run", "list.csv", "row 1")


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path, scenes: Path, model: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "run"
    refused(predict(scenes, model, out), out, f"{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_of_another_recipe_is_refused_and_stays_as_it_is(
    tmp_path: Path, scenes: Path, model: Path
) -> None:
    ok(predict(scenes, model, tmp_path / "run"))
    before = files(tmp_path / "run")
    other = make_model(tmp_path / "other.safetensors", "pixel", classes=2)
    cases: list[tuple[Done, tuple[str, ...]]] = [
        (predict(scenes, other, tmp_path / "run"), ("another recipe", "weights_sha256", "classes")),
        (predict(scenes, model, tmp_path / "run", blend="linear"), ("another recipe", "inference.blend")),
        (predict(scenes, model, tmp_path / "run", batch_size=8), ("inference.batch_size", "8")),
        (
            predict(scenes, model, tmp_path / "run", "--set", "cluster.threads_per_worker=2"),
            ("threads_per_worker is 2 here", "started with 1"),
        ),
        (predict(scenes, model, tmp_path / "run", "--dry-run", blend="linear"), ("inference.blend",)),
        (
            predict(scenes, model, tmp_path / "run", "--dry-run", "--set", "cluster.threads_per_worker=2"),
            ("threads_per_worker",),
        ),
    ]
    for done, words in cases:
        done.refused(2, str(tmp_path / "run"), "--output", *words)
    assert files(tmp_path / "run") == before


def test_a_folder_with_a_foreign_run_json_is_refused(tmp_path: Path, scenes: Path, model: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"name": "someone else\'s"}')
    predict(scenes, model, tmp_path / "run").refused(2, f"{tmp_path}/run/run.json")
    assert list(files(tmp_path / "run")) == ["run.json"]


@pytest.mark.s3
def test_storage_that_refuses_is_exit_2_before_anything_is_written(
    tmp_path: Path, scenes: Path, model: Path, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = "s3://no-such-bucket-here"
    predict(scenes, model, f"{bucket}/run").refused(2, f"{bucket}/run", "bucket")
    predict(f"{bucket}/in/", model, tmp_path / "run").refused(2, bucket)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    done = predict(scenes, model, f"{s3_prefix}/run").refused(2, f"{s3_prefix}/run")
    assert "wrong-secret" not in done.err
    assert not (tmp_path / "run").exists()
