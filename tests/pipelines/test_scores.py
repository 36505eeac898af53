"""``segpipe evaluate``: the same scores from a model and from its masks, and the rules of labels."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from archive import (
    Done,
    files,
    grid_of,
    local,
    make_model,
    ok,
    predict,
    rows,
    run,
    scene_pixels,
    write_label,
    write_scene,
)
from rasterio.enums import ColorInterp
from rasters import write_tiff

import segpipe.pipelines.predict as driver

Array = np.ndarray[Any, Any]

SIZES = {"a": (130, 97), "b": (60, 140), "c": (33, 20)}
TABLES = ("classes", "confusion", "scenes", "failures")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three scenes with labels of their own noise, and a pixel classifier."""
    make_model(tmp_path / "model.safetensors", "pixel")
    for number, (name, size) in enumerate(SIZES.items()):
        write_scene(tmp_path / f"in/{name}.tif", *size, seed=number)
        write_label(tmp_path / f"labels/{name}.tif", label_of(name), **grid_of(number))
    return tmp_path


def label_of(name: str) -> Array:
    """The right answer, with noise and pixels without truth."""
    label = scene_pixels(3, *SIZES[name], seed=list(SIZES).index(name)).argmax(axis=0).astype(np.uint8)
    random = np.random.default_rng(7)
    noisy = random.random(label.shape) < 0.2
    label[noisy] = random.integers(0, 3, int(noisy.sum()))
    label[:5] = 255
    return label


def evaluate(folder: Path, out: str, *more: Any, labels: str | None = None, **settings: Any) -> Done:
    template = labels or f"{folder}/labels/{{stem}}.tif"
    arguments = (folder / "in", "--labels", template, "--output", folder / out, *local(**settings))
    return run("evaluate", *arguments, *more)


def table(folder: Path, out: str, name: str) -> list[dict[str, Any]]:
    """Return a table of the reports, without how many blocks a scene was cut into."""
    found = pq.read_table(folder / out / f"reports/{name}.parquet").to_pylist()
    return [{key: value for key, value in row.items() if key != "blocks"} for row in found]


def test_scores_are_those_of_the_confusion_counted_by_hand(folder: Path) -> None:
    done = ok(evaluate(folder, "run", "--model", folder / "model.safetensors", block_px=50)).out
    matrix = np.zeros((3, 3), int)
    for number, (name, size) in enumerate(SIZES.items()):
        label, mask = label_of(name), scene_pixels(3, *size, seed=number).argmax(axis=0)
        known = label != 255
        np.add.at(matrix, (label[known], mask[known]), 1)
    names = ("ground", "roof", "water")
    found = {(row["label"], row["predicted"]): row["pixels"] for row in table(folder, "run", "confusion")}
    assert found == {(names[i], names[j]): matrix[i, j] for i in range(3) for j in range(3)}
    for index, row in enumerate(table(folder, "run", "classes")):
        hit, wanted, given = matrix[index, index], matrix[index].sum(), matrix[:, index].sum()
        assert row["iou"] == pytest.approx(hit / (wanted + given - hit))
        assert row["dice"] == pytest.approx(2 * hit / (wanted + given))
        assert row["support_px"] == wanted
        assert f"{row['iou']:.4f}" in done or f"{row['iou']:.3f}" in done
    assert {row["scene_id"]: row["label_px"] for row in table(folder, "run", "scenes")} == {
        name: int((label_of(name) != 255).sum()) for name in SIZES
    }


def test_scores_of_masks_are_those_of_the_model(folder: Path) -> None:
    model = folder / "model.safetensors"
    ok(evaluate(folder, "by-model", "--model", model, block_px=50, unit_px=4000))
    made = ok(predict(folder / "in", model, folder / "masks", block_px=70, margin_px=4))
    assert f"masks:  {folder}/masks/masks\n" in made.out
    for out, cut in (("as-made", {"block_px": 70}), ("other-cut", {"block_px": 40, "unit_px": 3000})):
        done = ok(evaluate(folder, out, "--masks", folder / "masks", **cut))
        assert "masks: " not in done.out, "it holds none"
        assert f"report: {folder}/{out}/reports/report.html" in done.out
        for name in TABLES:
            assert table(folder, out, name) == table(folder, "by-model", name), (out, name)
        assert all(row["mask"] is None for row in rows(folder / out, "mask"))
        summary = json.loads((folder / out / "reports/summary.json").read_text())
        expected = json.loads((folder / "by-model/reports/summary.json").read_text())
        assert summary["scores"] == expected["scores"]
    assert len(rows(folder / "other-cut", "unit")) > len(rows(folder / "as-made", "unit"))
    assert run("verify", folder / "other-cut").code == 0


def test_masks_of_a_grown_run_are_scored_in_their_newest_version(folder: Path) -> None:
    model = folder / "model.safetensors"
    write_scene(folder / "in/b.tif", *SIZES["b"], seed=50)
    ok(predict(folder / "in", model, folder / "masks"))
    write_scene(folder / "in/b.tif", *SIZES["b"], seed=1)
    ok(predict(folder / "in", model, folder / "masks"))
    ok(evaluate(folder, "by-model", "--model", model))
    ok(evaluate(folder, "by-masks", "--masks", folder / "masks"))
    assert table(folder, "by-masks", "confusion") == table(folder, "by-model", "confusion")


def test_scenes_without_masks_are_failed_rows_when_masks_are_scored(folder: Path) -> None:
    ok(predict(folder / "in/a.tif", folder / "model.safetensors", folder / "masks"))
    done = evaluate(folder, "run", "--masks", folder / "masks")
    assert done.code == 5
    states = {row["scene_id"]: row["status"] for row in table(folder, "run", "scenes")}
    assert states == {"a": "ok", "b": "failed", "c": "failed"}
    assert {row["error_kind"] for row in table(folder, "run", "failures")} == {"mask_missing"}
    assert all(row["label_px"] for row in table(folder, "run", "failures")), "no label drops out unseen"


def test_a_block_that_masks_cover_in_part_is_a_failed_row_when_they_are_scored(folder: Path) -> None:
    path = folder / "in/a.tif"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    assert predict(folder / "in", folder / "model.safetensors", folder / "masks", block_px=40).code == 5
    states = {row["status"] for row in rows(folder / "masks", "scene_id", "status") if row["scene_id"] == "a"}
    assert states == {"ok", "failed"}
    assert evaluate(folder, "run", "--masks", folder / "masks", block_px=1000).code == 5
    (failure,) = table(folder, "run", "failures")
    assert (failure["scene_id"], failure["error_kind"]) == ("a", "mask_missing")
    assert failure["label_px"] == int((label_of("a") != 255).sum())


def test_masks_of_an_unfinished_run_are_refused(folder: Path) -> None:
    ok(predict(folder / "in", folder / "model.safetensors", folder / "masks"))
    sorted((folder / "masks/masks").rglob("*.parquet"))[0].unlink()
    done = evaluate(folder, "run", "--masks", folder / "masks")
    done.refused(2, str(folder / "masks"), "unfinished", "1 of 1 unit")
    assert not (folder / "run").exists()


def test_masks_without_success_are_refused_until_their_reports_are_written(folder: Path) -> None:
    ok(predict(folder / "in", folder / "model.safetensors", folder / "masks"))
    (folder / "masks/_SUCCESS").unlink()
    evaluate(folder, "run", "--masks", folder / "masks").refused(2, "_SUCCESS", "segpipe report")
    assert not (folder / "run").exists()
    ok(run("report", folder / "masks"))
    ok(evaluate(folder, "run", "--masks", folder / "masks"))


def test_a_damaged_mask_is_named_and_all_others_are_scored(folder: Path) -> None:
    model = folder / "model.safetensors"
    ok(predict(folder / "in", model, folder / "masks", unit_px=10_000))
    whole = ok(evaluate(folder, "whole", "--masks", folder / "masks", unit_px=10_000))
    path = folder / "masks/masks/part-00000/unit-0000001.parquet"
    good = path.read_bytes()
    held = pq.read_table(path)
    masks = [png[:-20] for png in held["mask"].to_pylist()]
    index = held.schema.get_field_index("mask")
    pq.write_table(held.set_column(index, held.schema.field(index), pa.array(masks, pa.binary())), path)
    done = evaluate(folder, "run", "--masks", folder / "masks", unit_px=10_000)
    assert done.code == 4
    assert f"not committed: {path}: the object is damaged" in done.err
    assert "it is cut off after" in done.err
    assert "1 of 2 units missing" in done.err
    path.write_bytes(good)
    ok(evaluate(folder, "run", "--masks", folder / "masks", unit_px=10_000))
    assert table(folder, "run", "confusion") == table(folder, "whole", "confusion")
    assert whole.code == 0


@pytest.mark.parametrize("name", ["plan/part-00000.parquet", "reports/failures.parquet"])
def test_a_damaged_plan_is_named_and_damaged_reports_are_made_again(folder: Path, name: str) -> None:
    model = folder / "model.safetensors"
    (folder / "in/d.tif").write_bytes(b"no raster")
    assert predict(folder / "in", model, folder / "masks").code == 5
    path = folder / "masks" / name
    path.write_bytes(path.read_bytes().replace(b"not_raster", b"not_rast\xff\xff").replace(b"PAR1", b"PAR0"))
    done = predict(folder / "in", model, folder / "masks")
    if name.startswith("plan"):
        done.refused(4, str(path), "the object is damaged", "Put a whole copy back")
        verified = run("verify", folder / "masks")
        assert verified.code == 4
        assert "A part of the plan is damaged or gone. Put a whole copy back" in " ".join(
            verified.out.split()
        )
    else:
        assert done.code == 5
        assert len(table(folder, "masks", "failures")) == 1


def test_scores_of_scores_are_refused(folder: Path) -> None:
    ok(predict(folder / "in", folder / "model.safetensors", folder / "masks"))
    ok(evaluate(folder, "scores", "--masks", folder / "masks"))
    evaluate(folder, "more", "--masks", folder / "scores").refused(2, "no masks", str(folder / "masks"))
    assert not (folder / "more").exists()


def test_a_label_of_another_size_or_with_unmapped_values_is_a_failed_row_and_the_rest_is_done(
    folder: Path,
) -> None:
    write_label(folder / "labels/a.tif", np.zeros((130, 96), np.uint8))
    write_label(folder / "labels/c.tif", np.full((33, 20), 7, np.uint8))
    done = evaluate(folder, "run", "--model", folder / "model.safetensors")
    assert done.code == 5
    assert "Traceback" not in done.err
    assert "2 of 3 scenes have failed" in done.err
    said = done.err.splitlines()[-6:]
    assert said[0] == "2 of 3 scenes have failed, more than failures.max_fraction 0 allows:"
    assert said[1].startswith(f"failed: label_size in 1 scene, first a: {folder}/labels/a.tif: ")
    assert said[2].startswith(f"failed: label_value in 1 scene, first c: {folder}/labels/c.tif: ")
    assert said[3].startswith("what to do about label_size: correct the labels and run the same command")
    assert said[4].startswith("what to do about label_value: correct the labels and run the same command")
    assert said[4].endswith("or map their values with input.label_map and choose another --output.")
    reports = f"{folder}/run/reports"
    assert said[5] == f"all failures: {reports}/failures.parquet, {reports}/report.html"
    assert "repair the sources" not in done.err
    failures = {row["scene_id"]: row for row in table(folder, "run", "failures")}
    assert {name: row["error_kind"] for name, row in failures.items()} == {
        "a": "label_size", "c": "label_value",
    }  # fmt: skip
    assert "130 x 96" in failures["a"]["error"]
    assert "7" in failures["c"]["error"]
    assert (folder / "run/_SUCCESS").exists()


def test_a_label_that_lies_elsewhere_is_a_failed_row_and_the_rest_is_scored(folder: Path) -> None:
    write_label(folder / "labels/a.tif", label_of("a"), **grid_of(0, shift_px=50))
    done = evaluate(folder, "run", "--model", folder / "model.safetensors", block_px=50)
    assert done.code == 5
    assert "1 of 3 scenes has failed" in done.err
    failures = table(folder, "run", "failures")
    assert {(row["scene_id"], row["error_kind"]) for row in failures} == {("a", "label_size")}
    assert "its upper left corner is 50.0 pixels from the scene's" in failures[0]["error"]
    assert str(folder / "labels/a.tif") in failures[0]["error"]
    scored = {row["scene_id"]: row["compared_px"] for row in table(folder, "run", "scenes")}
    assert {name for name, pixels in scored.items() if pixels} == {"b", "c"}
    write_label(folder / "labels/a.tif", label_of("a"))
    ok(evaluate(folder, "run", "--model", folder / "model.safetensors", block_px=50))


def test_a_label_map_gives_values_their_classes(folder: Path) -> None:
    for name in SIZES:
        label = label_of(name)
        write_label(
            folder / f"labels/{name}.tif", np.where(label == 255, 255, label * 40 + 7).astype("uint8")
        )
    maps = [
        word
        for key, index in ((7, 0), (47, 1), (87, 2))
        for word in ("--set", f"input.label_map.{key}={index}")
    ]
    ok(evaluate(folder, "mapped", "--model", folder / "model.safetensors", *maps))
    for name in SIZES:
        write_label(folder / f"labels/{name}.tif", label_of(name))
    ok(evaluate(folder, "plain", "--model", folder / "model.safetensors"))
    assert table(folder, "mapped", "confusion") == table(folder, "plain", "confusion")


def test_a_later_start_with_another_label_map_is_refused(folder: Path) -> None:
    model = folder / "model.safetensors"
    ok(evaluate(folder, "run", "--model", model))
    before = files(folder / "run")
    evaluate(folder, "run", "--model", model, "--set", "input.label_map.0=1").refused(2, "label_map")
    assert files(folder / "run") == before


def test_a_template_that_finds_no_label_is_refused_and_nothing_is_written(folder: Path) -> None:
    (folder / "labels/b.tif").unlink()
    done = evaluate(folder, "run", "--model", folder / "model.safetensors")
    done.refused(2, "no label for 1 of 3 scenes", f"{folder}/labels/b.tif", "'b'", "template")
    assert not (folder / "run").exists()


def test_an_empty_label_in_a_catalogue_gives_no_counts_for_its_scene(folder: Path) -> None:
    catalogue = folder / "list.csv"
    with catalogue.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "label", "town"])
        writer.writerow(["in/a.tif", "labels/a.tif", "north"])
        writer.writerow(["in/b.tif", "", "south"])
    arguments = ("--model", folder / "model.safetensors", "--output", folder / "run", *local())
    done = ok(run("evaluate", catalogue, *arguments))
    assert "scenes: 2, 2 ok, 1 labelled" in done.out
    found = {row["scene_id"]: row for row in rows(folder / "run", "scene_id", "label_px", "confusion")}
    assert set(found) == {"in/a", "in/b"}
    assert (found["in/b"]["label_px"], found["in/b"]["confusion"]) == (None, None)
    assert found["in/a"]["label_px"] == int((label_of("a") != 255).sum())
    assert pq.read_table(folder / "run/plan/part-00000.parquet")["town"].to_pylist() == ["north", "south"]


def test_evaluate_without_labels_or_model_is_refused(folder: Path) -> None:
    model = folder / "model.safetensors"
    run("evaluate", folder / "in", "--model", model, "--output", folder / "run", *local()).refused(2, "label")
    run("evaluate", folder / "in", "--labels", "{stem}.png", "--output", folder / "run").refused(2, "--masks")
    evaluate(folder, "run", "--model", model, "--masks", folder / "in").refused(2, "exclude each other")
    evaluate(folder, "run", "--masks", folder / "in").refused(2, "not a run")
    evaluate(folder, "run", "--model", model, "--set", "input.label_map.7=3").refused(2, "classes 0 to 2")
    assert not (folder / "run").exists()


def test_masks_of_a_scene_that_had_another_size_are_never_compared(folder: Path) -> None:
    ok(predict(folder / "in", folder / "model.safetensors", folder / "masks"))
    height, width = SIZES["b"][0] - 8, SIZES["b"][1] - 8
    write_scene(folder / "in/b.tif", height, width, seed=1)
    write_label(folder / "labels/b.tif", label_of("b")[:height, :width])
    assert evaluate(folder, "run", "--masks", folder / "masks").code == 5
    (failure,) = table(folder, "run", "failures")
    assert (failure["scene_id"], failure["error_kind"]) == ("b", "mask_missing")
    assert f"{height} x {width}" in failure["error"]


def test_scores_of_one_run_are_not_continued_with_the_masks_of_another(folder: Path) -> None:
    """Both runs have one recipe, and so one recipe key."""
    for name in ("first", "second"):
        ok(predict(folder / "in", folder / "model.safetensors", folder / name))
    ok(evaluate(folder, "scores", "--masks", folder / "first"))
    done = evaluate(folder, "scores", "--masks", folder / "second")
    done.refused(2, f"{folder}/first", f"{folder}/second", "Choose another --output")


def test_masks_that_were_made_anew_are_scored_anew(folder: Path) -> None:
    masks = folder / "masks"
    ok(predict(folder / "in/a.tif", folder / "model.safetensors", masks))
    done = evaluate(folder, "scores", "--masks", masks, "--json")
    assert (done.code, done.tree["summary"]["scenes"]["failed"]) == (5, 2)
    before = done.tree["summary"]["compared_px"]
    ok(predict(folder / "in", folder / "model.safetensors", masks))
    done = ok(evaluate(folder, "scores", "--masks", masks, "--json"))
    assert (done.tree["computed"], done.tree["summary"]["compared_px"] > before) == (1, True)
    write_tiff(folder / "in/c.tif.msk", np.zeros((1, *SIZES["c"]), np.uint8))
    ok(predict(folder / "in", folder / "model.safetensors", masks))
    fresh = ok(evaluate(folder, "fresh", "--masks", masks, "--json")).tree["summary"]
    again = ok(evaluate(folder, "scores", "--masks", masks, "--json")).tree["summary"]
    assert again["compared_px"] == fresh["compared_px"] < done.tree["summary"]["compared_px"]
    assert ok(evaluate(folder, "scores", "--masks", masks, "--json")).tree["computed"] == 0


def test_masks_are_scored_whatever_bands_and_validity_they_were_made_with(folder: Path) -> None:
    write_scene(folder / "in/d.tif", 40, 50, bands=4, seed=9)
    with rasterio.open(folder / "in/d.tif", "r+") as dataset:
        dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    model = make_model(folder / "four.safetensors", "pixel", bands=4)
    asked = ("--set", "input.bands=[1, 2, 3, 4]", "--set", "input.valid=none")
    ok(predict(folder / "in/d.tif", model, folder / "masks", *asked))
    label = np.zeros((40, 50), np.uint8)
    write_label(folder / "labels/d.tif", label, **grid_of(9))
    labels = ("--labels", f"{folder}/labels/{{stem}}.tif")
    done = run("evaluate", folder / "in/d.tif", *labels, "--masks", folder / "masks", "-o", folder / "s",
               *local(), "--json")  # fmt: skip
    assert ok(done).tree["summary"]["compared_px"] == label.size


def test_a_mask_object_that_is_lost_while_it_is_scored_defers_its_unit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(predict(folder / "in", folder / "model.safetensors", folder / "masks"))
    real = driver.make_plan

    def make_plan(*args: Any) -> Any:
        next((folder / "masks/masks").rglob("*.parquet")).rename(folder / "lost")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "make_plan", make_plan)
        done = evaluate(folder, "scores", "--masks", folder / "masks")
    assert done.code == 3
    assert "not committed" in done.err


def test_the_cut_of_scores_is_kept_where_none_is_asked_for(folder: Path) -> None:
    ok(predict(folder / "in", folder / "model.safetensors", folder / "masks"))
    ok(evaluate(folder, "scores", "--masks", folder / "masks", block_px=64))
    labels = ("--labels", f"{folder}/labels/{{stem}}.tif")
    plain = ("--masks", folder / "masks", "-o", folder / "scores", "--executor", "local")
    ok(run("evaluate", folder / "in", *labels, *plain))
    evaluate(folder, "scores", "--masks", folder / "masks", block_px=32).refused(2, "block_px is 32")


def test_validity_masks_beside_the_scenes_are_no_scenes_where_masks_are_scored(folder: Path) -> None:
    for name, size in SIZES.items():
        write_tiff(folder / f"in/{name}_mask.tif", np.full((1, *size), 255, np.uint8))
    valid = ("--set", "input.valid={parent}/{stem}_mask.tif")
    ok(predict(folder / "in", folder / "model.safetensors", folder / "masks", *valid))
    done = ok(evaluate(folder, "scores", "--masks", folder / "masks", *valid, "--json"))
    assert done.tree["summary"]["scenes"]["all"] == 3
