"""Dry runs, reports, configs and what the command prints."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from archive import (
    Done,
    files,
    local,
    make_model,
    objects,
    ok,
    predict,
    rows,
    run,
    whole_masks,
    write_label,
    write_scene,
)
from rasterio.enums import ColorInterp

from segpipe.masks.run import require_run
from segpipe.storage import open_object, open_storage

CUT = {"block_px": 64, "unit_px": 8000}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model.safetensors", "pixel", pixel_m=0.5)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    for number, name in enumerate(("a", "b")):
        write_scene(tmp_path / f"in/{name}.tif", 110, 150, seed=number, strips=name == "b")
    return tmp_path / "in"


def test_a_dry_run_writes_nothing_and_says_what_the_run_then_makes(
    tmp_path: Path, scenes: Path, model: Path
) -> None:
    (scenes / "bad.tif").write_bytes(b"")
    before = files(tmp_path)
    plan = ok(predict(scenes, model, tmp_path / "run", "--dry-run", "--json", **CUT)).tree
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()
    done = predict(scenes, model, tmp_path / "run", "--json", **CUT).tree
    found = rows(tmp_path / "run", "unit", "scene_id", "height", "width")
    assert plan["scenes"] == done["summary"]["scenes"]["all"] == 3
    assert plan["units"] == done["units"] == len({row["unit"] for row in found})
    assert plan["blocks"] == len(found)
    assert plan["mpx"] == pytest.approx(sum(row["height"] * row["width"] for row in found) / 1e6, abs=0.001)
    assert plan["km2"] == pytest.approx(2 * 110 * 150 * 0.25e-6, rel=0.002)
    assert plan["failed_headers"] == {"not_raster": 1}
    assert plan["validity"] == {"none": 2}
    assert plan["source_bytes"] == sum(path.stat().st_size for path in scenes.iterdir())
    facts = require_run(open_storage(str(tmp_path / "run"))).facts
    for name in ("threads_per_worker", "device", "precision", "tile_px", "batch_size", "unit_px"):
        assert plan[name] == getattr(facts, name)


@pytest.mark.parametrize("blend", ["crop", "linear"])
def test_a_dry_run_counts_the_tiles_that_the_engine_then_computes(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch, blend: str
) -> None:
    import segpipe.inference.engine as module

    made: list[Any] = []

    class Watched(module.Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(module, "Engine", Watched)
    cut = {**CUT, "blend": blend}
    plan = ok(predict(scenes, model, tmp_path / "run", "--dry-run", "--json", **cut)).tree
    assert made == [], "a dry run loads no model"
    ok(predict(scenes, model, tmp_path / "run", **cut))
    assert plan["tiles"] == made[0].stats.tiles_computed > 40


def test_a_dry_run_on_a_run_names_only_what_is_new(tmp_path: Path, scenes: Path, model: Path) -> None:
    ok(predict(scenes, model, tmp_path / "run", **CUT))
    before = files(tmp_path / "run")
    write_scene(scenes / "c.tif", 40, 50)
    done = ok(predict(scenes, model, tmp_path / "run", "--dry-run", "--json", **CUT))
    assert (done.tree["scenes"], done.tree["scenes_planned_already"], done.tree["units"]) == (1, 2, 1)
    assert "2 scenes planned already, 1 new or changed" in done.err
    assert files(tmp_path / "run") == before
    shown = ok(predict(scenes, model, tmp_path / "run", "--dry-run", **CUT)).out
    assert re.search(r"scenes_planned_already +2\n", shown)


def test_results_stand_on_stdout_and_progress_on_stderr(tmp_path: Path, scenes: Path, model: Path) -> None:
    done = ok(predict(scenes, model, tmp_path / "run", **CUT))
    assert done.out.splitlines()[0] == "2 scenes (2 ok), 6 units, 6 computed now"
    assert f"{tmp_path}/run/reports/report.html" in done.out
    page = (tmp_path / "run/reports/report.html").read_text()
    key = require_run(open_storage(str(tmp_path / "run"))).recipe_key
    assert "<title>Segmentation report: model pixel, sha256 " in page
    assert f", recipe {key[:12]}</title>" in page
    assert str(tmp_path) not in page, "the same run elsewhere has the same bytes"
    assert "planned 2 scenes" in done.err
    assert "6 units to compute" in done.err
    assert "Mpx/s" in done.err
    assert "km2/h" in done.err
    again = ok(predict(scenes, model, tmp_path / "run", **CUT))
    assert "2 scenes planned already, 0 new or changed" in again.err
    assert "nothing to compute" in again.err


@pytest.mark.parametrize("command", [["--help"], ["predict", "--help"], ["--version"], ["config", "schema"]])
def test_help_imports_neither_torch_nor_ray(command: list[str]) -> None:
    code = (
        "import sys\nfrom segpipe.cli.main import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'pyarrow', 'rasterio', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(ok(run("config", "schema")).out)
    assert {"input", "model", "output", "inference", "failures", "cluster"} == set(schema["properties"])


def test_report_makes_index_and_reports_again_byte_for_byte(
    tmp_path: Path, scenes: Path, model: Path
) -> None:
    for name in "ab":
        write_label(tmp_path / f"labels/{name}.tif", np.zeros((110, 150), np.uint8))
    ok(predict(scenes, model, tmp_path / "run", "--labels", f"{tmp_path}/labels/{{stem}}.tif", **CUT))
    whole = files(tmp_path / "run")
    for path in [*(tmp_path / "run/reports").iterdir(), *(tmp_path / "run/index").iterdir()]:
        path.unlink()
    (tmp_path / "run/_SUCCESS").unlink()
    tree = ok(run("report", tmp_path / "run", "--json")).tree
    assert (tree["missing"], tree["summary"]["scenes"]["ok"]) == (0, 2)
    assert files(tmp_path / "run") == whole


def test_report_tells_what_an_unfinished_run_has(tmp_path: Path, scenes: Path, model: Path) -> None:
    ok(predict(scenes, model, tmp_path / "run", **CUT))
    lost = sorted(objects(tmp_path / "run"))[1]
    for key in (lost, "_SUCCESS"):
        (tmp_path / "run" / key).unlink()
    done = ok(run("report", tmp_path / "run"))
    assert "1 of 6 units missing" in done.err
    assert not (tmp_path / "run/_SUCCESS").exists()
    index = pq.read_table(tmp_path / "run/index/part-00000.parquet").to_pylist()
    assert len({row["object"] for row in index}) == 5
    assert lost not in {row["object"] for row in index}
    summary = json.loads((tmp_path / "run/reports/summary.json").read_text())
    assert (summary["scenes"]["all"], summary["scenes"]["partial"]) == (2, 1)
    states = {
        row["scene_id"]: row for row in pq.read_table(tmp_path / "run/reports/scenes.parquet").to_pylist()
    }
    assert states["a"]["missing_px"] > 0
    assert states["b"]["missing_px"] == 0
    verified = run("verify", tmp_path / "run", "--json")
    assert (verified.code, verified.tree["missing"]["count"]) == (3, 1)


def test_report_names_a_damaged_object(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(predict(scenes, model, tmp_path / "run", **CUT))
    path = tmp_path / "run" / sorted(objects(tmp_path / "run"))[1]
    path.write_bytes(path.read_bytes()[:-20])
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    run("report", tmp_path / "run").refused(4, str(path))
    gc.collect()
    assert ignored == [], "nothing but the one line is printed"
    done = run("verify", tmp_path / "run", "--json")
    assert done.code == 4
    assert path.name in done.tree["damaged"]["first"][0]


def test_an_alpha_band_is_no_further_band_whatever_says_what_is_data(tmp_path: Path, model: Path) -> None:
    write_scene(tmp_path / "in/rgba.tif", 60, 60, bands=4, photometric="RGB", alpha=4)
    for valid in ("auto", "none"):
        done = ok(predict(tmp_path / "in", model, tmp_path / valid, "--set", f"input.valid={valid}", **CUT))
        assert "more bands" not in done.err


def test_coarser_scenes_and_further_bands_are_named_once_and_stand_in_the_reports(
    tmp_path: Path, scenes: Path, model: Path
) -> None:
    write_scene(scenes / "coarse.tif", 60, 60, pixel_m=0.9)
    write_scene(scenes / "fine.tif", 60, 60, pixel_m=0.25)
    write_scene(scenes / "rgbi.tif", 60, 60, bands=4)
    done = ok(predict(scenes, model, tmp_path / "run", **CUT))
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "1 scene with pixels more than 1.5 x coarser than the model's: coarse" in warnings[0]
    assert "more bands" in warnings[1]
    assert warnings[1].endswith(": rgbi")
    table = pq.read_table(tmp_path / "run/reports/scenes.parquet").to_pylist()
    found = {row["scene_id"]: (row["coarser_than_model"], row["downsample"]) for row in table}
    assert found == {
        "a": (False, 1), "b": (False, 1), "coarse": (True, 1), "fine": (False, 2), "rgbi": (False, 1),
    }  # fmt: skip
    again = ok(predict(scenes, model, tmp_path / "run", **CUT))
    assert "warning" not in again.err


def warnings_of(done: Done) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("warning: ")]


def test_scenes_whose_bands_are_named_in_another_order_are_named_and_read_as_they_lie(
    tmp_path: Path, scenes: Path
) -> None:
    model = make_model(tmp_path / "colours.safetensors", "pixel", names=("red", "green", "blue"))
    plain = ok(predict(scenes, model, tmp_path / "plain", **CUT))
    assert warnings_of(plain) == []
    for path in sorted(scenes.iterdir()):
        with rasterio.open(path, "r+") as file:
            file.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    write_scene(scenes / "rgb.tif", 40, 40)
    planned = ok(predict(scenes, model, tmp_path / "run", "--dry-run", "--json", **CUT))
    assert planned.tree["band_names_differ"] == 2
    done = ok(predict(scenes, model, tmp_path / "run", **CUT))
    (line,) = warnings_of(done)
    assert line == warnings_of(planned)[0] == (
        "warning: 2 scenes whose bands are named blue, green, red where the model takes red, green, blue "
        "(set input.bands): a, b"
    )  # fmt: skip
    masks = whole_masks(tmp_path / "run")
    for name, mask in whole_masks(tmp_path / "plain").items():
        np.testing.assert_array_equal(masks[name], mask)
    asked = predict(scenes, model, tmp_path / "asked", "--set", "input.bands=[3,2,1]", **CUT)
    assert warnings_of(ok(asked)) == []
    nameless = make_model(tmp_path / "nameless.safetensors", "pixel")
    assert warnings_of(ok(predict(scenes, nameless, tmp_path / "nameless", **CUT))) == []
    for name in ("a", "b", "rgb"):
        write_label(tmp_path / f"labels/{name}.tif", np.zeros(masks[name].shape, np.uint8))
    scored = ("--labels", f"{tmp_path}/labels/{{stem}}.tif", "--output", tmp_path / "scores")
    done = ok(run("evaluate", scenes, "--masks", tmp_path / "asked", *scored, *local()))
    assert warnings_of(done) == [], "the masks were made of the bands that were asked for"


def test_what_an_input_folder_holds_besides_scenes_is_said(tmp_path: Path, scenes: Path, model: Path) -> None:
    write_label(scenes / "a_label.tif", np.zeros((110, 150), np.uint8))
    write_label(scenes / "b_label.tif", np.zeros((110, 150), np.uint8))
    done = ok(predict(scenes, model, scenes / "run", "--labels", "{stem}_label.tif", **CUT))
    assert "left out 2 files named by the template of labels" in done.err
    assert done.err.count("left out") == 1
    assert {row["scene_id"] for row in rows(scenes / "run", "scene_id")} == {"a", "b"}
    again = ok(predict(scenes, model, scenes / "run", "--labels", "{stem}_label.tif", "--json", **CUT))
    assert (again.tree["computed"], again.tree["units"]) == (0, 6), "the output is never taken for input"


def config_text(scenes: Path, model: Path, out: str) -> str:
    return (
        f"input: {{scenes: [{scenes}]}}\nmodel: {model}\noutput: {out}\n"
        "inference: {margin_px: 4, block_px: 64, unit_px: 9000}\n"
        "cluster: {executor: ray, threads_per_worker: 1}\n"
    )


def check_config(uri: str, tmp_path: Path, scenes: Path, model: Path) -> None:
    """Flags override the config, ``--set`` overrides both."""
    storage, key = open_object(uri)
    storage.put(key, config_text(scenes, model, str(tmp_path / "unused")).encode())
    flags = ("--executor", "local", "--output", tmp_path / "flag")
    ok(run("predict", "--config", uri, *flags))
    ok(
        run(
            "predict",
            "--config",
            uri,
            *flags,
            "--set",
            f"output={tmp_path}/set",
            "--set",
            "inference.margin_px=8",
        )
    )
    assert not (tmp_path / "unused").exists()
    for out, margin_px in (("flag", 4), ("set", 8)):
        facts = require_run(open_storage(str(tmp_path / out))).facts
        assert (facts.margin_px, facts.block_px, facts.unit_px) == (margin_px, 64, 9000)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_flags_override_a_config_and_set_overrides_both(
    tmp_path: Path, scenes: Path, model: Path, where: str
) -> None:
    uri = f"memory://configs-{tmp_path.name}/job.yaml" if where == "memory" else f"{tmp_path}/job.yaml"
    check_config(uri, tmp_path, scenes, model)


@pytest.mark.s3
def test_inputs_model_config_and_output_may_all_lie_in_s3(
    tmp_path: Path, scenes: Path, model: Path, s3_prefix: str
) -> None:
    storage = open_storage(s3_prefix)
    for name, path in (
        ("in/a.tif", scenes / "a.tif"),
        ("in/b.tif", scenes / "b.tif"),
        ("m.safetensors", model),
    ):
        storage.put(name, path.read_bytes())
    text = config_text(scenes, model, f"{s3_prefix}/run")
    text = text.replace(str(scenes), f"{s3_prefix}/in/").replace(str(model), f"{s3_prefix}/m.safetensors")
    storage.put("job.yaml", text.encode())
    ok(run("predict", "--config", f"{s3_prefix}/job.yaml", "--executor", "local"))
    ok(predict(scenes, model, tmp_path / "run", margin_px=4, block_px=64, unit_px=9000))
    masks = {row["scene_id"]: row["mask"] for row in rows(tmp_path / "run", "scene_id", "row_off", "mask")}
    found: dict[str, Any] = {}
    for data in objects(f"{s3_prefix}/run").values():
        for row in pq.read_table(__import__("io").BytesIO(data)).to_pylist():
            found[row["scene_id"]] = row["mask"]
    assert found == masks
    assert run("verify", f"{s3_prefix}/run").code == 0
    assert storage.stat("run/_SUCCESS") is not None


def test_evaluate_prints_its_scores_as_json_too(tmp_path: Path, scenes: Path, model: Path) -> None:
    for name in "ab":
        write_label(tmp_path / f"labels/{name}.tif", np.zeros((110, 150), np.uint8))
    labels = ("--labels", f"{tmp_path}/labels/{{stem}}.tif")
    done = run(
        "evaluate", scenes, "--model", model, *labels, "--output", tmp_path / "run", "--json", *local()
    )
    tree = ok(done).tree
    assert tree["schema_version"] == 1
    assert (tree["exit_code"], tree["missing"]) == (0, 0)
    assert tree["summary"] == json.loads((tmp_path / "run/reports/summary.json").read_text())
    assert tree["summary"]["scores"]["miou"] is not None


def test_a_catalogues_times_stand_in_plan_masks_and_exports_of_damaged_scenes_too(
    tmp_path: Path, scenes: Path, model: Path
) -> None:
    (scenes / "b.tif").write_bytes(b"II*\0 and no more")
    times = {"a": "2024-05-01T10:00:00", "b": "2024-05-02T10:00:00"}
    lines = ["uri,datetime", *(f"{scenes}/{name}.tif,{time}" for name, time in times.items())]
    (tmp_path / "cat.csv").write_text("\n".join(lines) + "\n")
    assert predict(tmp_path / "cat.csv", model, tmp_path / "run").code == 5
    found = rows(tmp_path / "run", "uri", "datetime", "status")
    assert {Path(row["uri"]).stem: (row["datetime"], row["status"]) for row in found} == {
        "a": (times["a"], "ok"),
        "b": (times["b"], "failed"),
    }
    ok(run("verify", tmp_path / "run", "--full"))
    ok(run("export", tmp_path / "run", "-o", tmp_path / "out"))
    with rasterio.open(next((tmp_path / "out").rglob("a.tif"))) as exported:
        assert exported.tags()["SEGPIPE_SOURCE_DATETIME"] == times["a"]
