"""A run grows by parts: only new and changed scenes are computed, and readers take the newest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from archive import (
    local,
    objects,
    ok,
    planned,
    predict,
    rows,
    run,
    start,
    tell_changed,
    whole_masks,
    write_label,
    write_scene,
)

CUT = {"block_px": 64, "unit_px": 8000}


def success(folder: Path) -> dict[str, int]:
    return json.loads((folder / "_SUCCESS").read_text())


def test_only_new_and_changed_scenes_are_computed_and_readers_take_the_newest(
    tmp_path: Path, model: Path
) -> None:
    scenes, out = tmp_path / "in", tmp_path / "run"
    labels = f"{tmp_path}/labels/{{stem}}.tif"
    pixels = {name: write_scene(scenes / f"{name}.tif", 70, 90, seed=ord(name)) for name in "abc"}
    for name in "abcde":
        write_label(tmp_path / f"labels/{name}.tif", np.zeros((70, 90), np.uint8))
    first = ok(predict(scenes, model, out, "--labels", labels, "--json", **CUT)).tree
    before = objects(out)
    assert success(out)["parts"] == 1

    for name in "de":
        pixels[name] = write_scene(scenes / f"{name}.tif", 70, 90, seed=ord(name))
    pixels["b"] = write_scene(scenes / "b.tif", 70, 90, seed=99)
    tell_changed(scenes / "b.tif")
    grown = ok(predict(scenes, model, out, "--labels", labels, "--json", **CUT))
    assert "2 scenes planned already, 3 new or changed" in grown.err
    assert grown.tree["computed"] == grown.tree["units"] - first["units"]
    parts: dict[int, list[str]] = {}
    for part, scene in planned(out):
        parts.setdefault(part, []).append(scene.source.scene_id)
    assert parts == {0: ["a", "b", "c"], 1: ["b", "d", "e"]}
    after = objects(out)
    assert {key: after[key] for key in before} == before, "finished objects are never touched"
    assert all(key.startswith("masks/part-00001/") for key in after.keys() - before.keys())

    for name, mask in whole_masks(out).items():
        assert np.array_equal(mask, pixels[name].argmax(axis=0)), name
    table = pq.read_table(out / "reports/scenes.parquet").to_pydict()
    assert sorted(table["scene_id"]) == list("abcde")
    expected_px = sum(int((pixels[name].argmax(axis=0) == 0).sum()) for name in "abcde")
    confusion = pq.read_table(out / "reports/confusion.parquet").to_pylist()
    assert sum(row["pixels"] for row in confusion if row["predicted"] == "ground") == expected_px
    assert sum(row["pixels"] for row in confusion) == 5 * 70 * 90
    total = success(out)
    assert total["parts"] == 2
    assert total["units"] == len(after)
    assert total["bytes"] == sum(map(len, after.values()))
    assert total["rows"] == len(rows(out, "scene_id"))
    assert run("verify", out).code == 0

    third = ok(predict(scenes, model, out, "--labels", labels, "--json", **CUT)).tree
    assert (third["computed"], third["missing"]) == (0, 0)
    assert objects(out) == after
    assert success(out) == total


def test_what_a_report_of_an_unfinished_run_lacks_is_counted_in_the_newest_versions_alone(
    tmp_path: Path, model: Path
) -> None:
    for number, scene in enumerate("ab"):
        write_scene(tmp_path / f"in/{scene}.tif", 70, 90, seed=number)
    ok(predict(tmp_path / "in", model, tmp_path / "run"))
    write_scene(tmp_path / "in/b.tif", 70, 90, seed=7)
    tell_changed(tmp_path / "in/b.tif")
    ok(predict(tmp_path / "in", model, tmp_path / "run"))
    next((tmp_path / "run").glob("masks/part-00001/*")).unlink()
    report = ok(run("report", tmp_path / "run", "--json")).tree
    assert report["summary"]["missing"] == {"scenes": 1, "blocks": 1, "pixels": 70 * 90}


def test_the_index_names_the_rows_of_every_part(tmp_path: Path, model: Path) -> None:
    write_scene(tmp_path / "in/a.tif", 70, 90)
    ok(predict(tmp_path / "in", model, tmp_path / "run", **CUT))
    write_scene(tmp_path / "in/b.tif", 40, 50)
    ok(predict(tmp_path / "in", model, tmp_path / "run", **CUT))
    for part, names in ((0, {"a"}), (1, {"b"})):
        index = pq.read_table(tmp_path / f"run/index/part-{part:05d}.parquet").to_pylist()
        assert {row["scene_id"] for row in index} == names
        assert "mask" not in index[0]
        for row in index:
            assert (tmp_path / "run" / row["object"]).stat().st_size == row["object_bytes"]


def test_a_scene_that_is_taken_out_of_the_input_stays_in_the_run(tmp_path: Path, model: Path) -> None:
    for name in "ab":
        write_scene(tmp_path / f"in/{name}.tif", 40, 50)
    ok(predict(tmp_path / "in", model, tmp_path / "run"))
    (tmp_path / "in/a.tif").unlink()
    done = ok(predict(tmp_path / "in", model, tmp_path / "run", "--json")).tree
    assert (done["computed"], done["summary"]["scenes"]["all"]) == (0, 2)


def test_a_changed_label_makes_a_new_version_of_its_scene_alone(tmp_path: Path, model: Path) -> None:
    for name in "ab":
        write_scene(tmp_path / f"in/{name}.tif", 40, 50)
        write_label(tmp_path / f"labels/{name}.tif", np.zeros((40, 50), np.uint8))
    labels = ("--labels", f"{tmp_path}/labels/{{stem}}.tif")
    ok(predict(tmp_path / "in", model, tmp_path / "run", *labels))
    write_label(tmp_path / "labels/a.tif", np.ones((40, 50), np.uint8))
    tell_changed(tmp_path / "labels/a.tif")
    done = ok(predict(tmp_path / "in", model, tmp_path / "run", *labels))
    assert "1 scene planned again with the same file: the label or validity mask is another one" in done.err
    assert [(part, scene.source.scene_id) for part, scene in planned(tmp_path / "run")] == [
        (0, "a"), (0, "b"), (1, "a"),
    ]  # fmt: skip
    confusion = pq.read_table(tmp_path / "run/reports/confusion.parquet").to_pylist()
    by_label: dict[str, int] = {}
    for row in confusion:
        by_label[row["label"]] = by_label.get(row["label"], 0) + row["pixels"]
    assert (by_label["ground"], by_label["roof"], by_label["water"]) == (2000, 2000, 0)


def test_scenes_that_were_gone_for_a_while_are_computed_once_they_are_back(
    tmp_path: Path, model: Path
) -> None:
    scenes, away, out = tmp_path / "in", tmp_path / "away", tmp_path / "run"
    pixels = {name: write_scene(scenes / f"{name}.tif", 70, 90, seed=ord(name)) for name in "abc"}
    ok(predict(scenes / "a.tif", model, out, **CUT))
    unmounted = f"""
import os
import segpipe.pipelines.predict as p
real = p._complete
def complete(*arguments):
    os.rename({str(scenes)!r}, {str(away)!r})
    return real(*arguments)
p._complete = complete
"""
    words = ("predict", scenes, "--model", model, "--output", out, *local(**CUT))
    assert start(*words, code=unmounted).wait() == 5
    away.rename(scenes)
    dry = ok(predict(scenes, model, out, "--dry-run", "--json", **CUT)).tree
    assert (dry["scenes"], dry["scenes_planned_already"], dry["planned_units_to_compute"]) == (2, 1, 0)
    ok(predict(scenes, model, out, **CUT))
    for name, mask in whole_masks(out).items():
        assert np.array_equal(mask, pixels[name].argmax(axis=0)), name
    assert pq.read_table(out / "reports/failures.parquet").num_rows == 0
    assert run("verify", out).code == 0
    assert ok(predict(scenes, model, out, "--json", **CUT)).tree["computed"] == 0


def test_a_dry_run_tells_units_that_an_earlier_plan_still_lacks(tmp_path: Path, model: Path) -> None:
    write_scene(tmp_path / "in/a.tif", 70, 90)
    ok(predict(tmp_path / "in", model, tmp_path / "run", **CUT))
    next((tmp_path / "run").glob("masks/*/*")).unlink()
    dry = ok(predict(tmp_path / "in", model, tmp_path / "run", "--dry-run", "--json", **CUT)).tree
    assert (dry["units"], dry["planned_units_to_compute"]) == (0, 1)


def test_a_scene_beyond_the_limits_is_planned_anew_where_they_are_raised(tmp_path: Path, model: Path) -> None:
    for name, height in (("a", 70), ("b", 200)):
        write_scene(tmp_path / f"in/{name}.tif", height, 90)
    small = ("--set", "input.limits.scene_px=10000")
    for _ in range(2):
        done = predict(tmp_path / "in", model, tmp_path / "run", *small)
        assert (done.code, len(list((tmp_path / "run/plan").iterdir()))) == (5, 1)
        dry = ok(predict(tmp_path / "in", model, tmp_path / "run", *small, "--dry-run", "--json")).tree
        assert (dry["scenes"], dry["units"]) == (0, 0)
    done = ok(predict(tmp_path / "in", model, tmp_path / "run", "--json"))
    assert (done.tree["computed"], done.tree["summary"]["scenes"]["ok"]) == (1, 2)
    ok(run("verify", tmp_path / "run", "--full"))


def test_a_scene_that_replaces_one_of_another_path_is_named(tmp_path: Path, model: Path) -> None:
    for number, folder in enumerate(("2024", "2025")):
        write_scene(tmp_path / folder / "t.tif", 70, 90, seed=number)
    assert "another path" not in ok(predict(tmp_path / "2024", model, tmp_path / "run")).err
    done = ok(predict(tmp_path / "2025", model, tmp_path / "run"))
    assert "1 scene under an id that an earlier start had planned from another path: t" in done.err
    (tmp_path / "2025").rename(tmp_path / "moved")
    assert "another path" not in ok(predict(tmp_path / "moved", model, tmp_path / "run")).err
