from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_rows import ROW_SCHEMA, TWO, block, build, compared, failed, pairs

from segpipe.config.card import ClassInfo
from segpipe.errors import CheckError
from segpipe.reports.html import render_html
from segpipe.reports.tables import (
    ReportBuilder,
    column_names,
    parquet_bytes,
    scene_schema,
    summary_json,
)
from segpipe.reports.totals import NUM_FAILURES_SHOWN, NUM_WORST, Planned


def test_a_scene_of_two_blocks_has_the_sum_of_both() -> None:
    rows = [
        compared("a", pairs((0, 0, 50), (0, 1, 10), (1, 1, 30)), scene_height=20),
        compared(
            "a", pairs((1, 0, 5), (1, 1, 20)), row_off=10, scene_height=20, class_px=[5, 20], valid_px=25
        ),
    ]
    reports, (scene,), failures = build(rows)
    assert (scene["scene_id"], scene["uri"], scene["status"]) == ("a", "/archive/a.tif", "ok")
    assert (scene["blocks"], scene["failed_blocks"], scene["missing_px"]) == (2, 0, 0)
    assert (scene["height"], scene["width"], scene["valid_px"]) == (20, 10, 125)
    assert (scene["label_px"], scene["compared_px"]) == (115, 115)
    assert scene["iou_background"] == pytest.approx(50 / 65)
    assert scene["iou_building"] == pytest.approx(50 / 65)
    assert scene["miou"] == pytest.approx(50 / 65)
    assert scene["accuracy"] == pytest.approx(100 / 115)
    assert (scene["px_background"], scene["px_building"]) == (65, 60)
    assert reports.matrix.tolist() == [[50, 10], [5, 50]]
    assert reports.summary["scores"]["miou"] == pytest.approx(50 / 65)
    assert failures == []


def test_the_dataset_scores_come_from_added_counts_not_from_averaged_scenes() -> None:
    rows = [compared("a", pairs((1, 1, 1), (0, 0, 9))), compared("b", pairs((1, 0, 90), (1, 1, 10)))]
    reports, scenes, _ = build(rows)
    assert [scene["iou_building"] for scene in scenes] == pytest.approx([1.0, 0.1])
    building = reports.classes.to_pylist()[1]
    assert building["iou"] == pytest.approx(11 / 101)
    assert building["recall"] == pytest.approx(11 / 101)
    assert building["precision"] == 1.0
    assert (building["support_px"], building["predicted_px"], building["px"]) == (101, 11, 80)
    assert (building["class_id"], building["class"]) == (1, "building")


def test_an_absent_class_is_null_in_scene_class_table_and_means() -> None:
    three = (*TWO, ClassInfo(name="water", color=(0, 0, 255)))
    reports, (scene,), _ = build([compared("a", pairs((0, 0, 5), (0, 1, 5)), class_px=[5, 5, 0])], three)
    assert scene["iou_water"] is None
    assert scene["px_water"] == 0
    assert scene["miou"] == pytest.approx((0.5 + 0.0) / 2)
    water = reports.classes.to_pylist()[2]
    assert [water[name] for name in ("iou", "dice", "precision", "recall")] == [None] * 4
    assert water["support_px"] == 0


def test_without_labels_scores_and_label_counts_are_null_but_pixels_are_there() -> None:
    reports, (scene,), _ = build([block("a")])
    assert [scene[name] for name in ("label_px", "compared_px", "miou", "kappa", "iou_building")] == [
        None
    ] * 5
    assert scene["px_building"] == 40
    assert reports.summary["scores"] is None
    assert reports.summary["label_px"] is None
    assert reports.classes["support_px"].to_pylist() == [None, None]
    assert reports.classes["px"].to_pylist() == [60, 40]
    assert reports.worst_scenes == []


def test_label_pixels_of_failed_blocks_stay_counted() -> None:
    rows = [
        compared("a", pairs((0, 0, 80), (1, 1, 20)), scene_height=20),
        failed("a", row_off=10, scene_height=20, label_uri="/labels/x.tif", label_px=70),
        failed("b", label_uri="/labels/x.tif", label_px=None),
    ]
    reports, scenes, _ = build(rows)
    assert [(scene["label_px"], scene["compared_px"]) for scene in scenes] == [(170, 100), (None, None)]
    assert [scene["status"] for scene in scenes] == ["partial", "failed"]
    summary = reports.summary
    assert (summary["label_px"], summary["compared_px"], summary["uncounted_label_blocks"]) == (170, 100, 1)
    assert summary["scores"]["accuracy"] == 1.0


def test_labels_without_any_compared_pixel_leave_null_scores_beside_their_count() -> None:
    reports, (scene,), _ = build([failed("a", label_uri="/labels/x.tif", label_px=70)])
    assert (scene["label_px"], scene["compared_px"], scene["miou"]) == (70, 0, None)
    assert set(reports.summary["scores"].values()) == {None}


def test_labels_of_which_no_pixel_could_be_counted_leave_null_scores_beside_their_blocks() -> None:
    reports, _, _ = build([failed("a", "label_read", label_uri="/labels/x.tif", label_px=None)])
    assert (reports.summary["label_px"], reports.summary["uncounted_label_blocks"]) == (0, 1)
    assert set(reports.summary["scores"].values()) == {None}


def test_the_status_of_a_scene_is_its_worst_case() -> None:
    empty = {"status": "empty", "valid_px": 0, "class_px": [0, 0]}
    rows = [
        *(block("ok", row, scene_height=20) for row in (0, 10)),
        *(block("half-empty", row, scene_height=20, **(empty if row else {})) for row in (0, 10)),
        *(block("empty", row, scene_height=20, **empty) for row in (0, 10)),
        block("partial", scene_height=20),
        failed("partial", row_off=10, scene_height=20),
        block("unfinished", scene_height=20),
        *(failed("failed", row_off=row, scene_height=20) for row in (0, 10)),
        failed("half-failed", scene_height=20),
        failed("no-header", "header", height=0, width=0, scene_height=None, scene_width=None),
    ]
    reports, scenes, _ = build(rows)
    assert {scene["scene_id"]: scene["status"] for scene in scenes} == {
        "ok": "ok",
        "half-empty": "ok",
        "empty": "empty",
        "partial": "partial",
        "unfinished": "partial",
        "failed": "failed",
        "half-failed": "partial",
        "no-header": "failed",
    }
    assert {scene["scene_id"]: scene["missing_px"] for scene in scenes if scene["missing_px"]} == {
        "unfinished": 100,
        "half-failed": 100,
    }
    assert scenes[-1]["height"] is None
    assert scenes[-1]["error_kind"] == "header"
    statuses = reports.summary["scenes"]
    assert [statuses[name] for name in ("all", "ok", "empty", "partial", "failed")] == [8, 2, 1, 3, 2]


@pytest.mark.parametrize("batch_rows", [1, 2, 3])
def test_the_error_kind_of_a_scene_is_that_of_its_first_failed_block(
    batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segpipe.reports.tables._PENDING_ROWS", 1)
    rows = [
        block("a", scene_height=30),
        failed("a", "decode", row_off=10, scene_height=30),
        failed("a", "label_value", row_off=20, scene_height=30),
    ]
    _, (scene,), _ = build(rows, batch_rows=batch_rows)
    assert (scene["failed_blocks"], scene["error_kind"]) == (2, "decode")


def test_the_ledger_adds_up() -> None:
    rows = [
        block("a", valid_px=90, pixel_m=0.5),
        failed("b", "decode", pixel_m=0.5),
        failed("c", "decode", scene_height=20),
        failed("c", "label_value", row_off=10, scene_height=20),
        block("d", status="empty", valid_px=0, class_px=[0, 0]),
    ]
    reports, _, failures = build(rows, planned=Planned(scenes=6, blocks=9, pixels=1000))
    summary = reports.summary
    assert summary["blocks"] == {"all": 5, "ok": 1, "empty": 1, "failed": 3}
    assert summary["pixels"] == {"all": 500, "valid": 90, "no_data": 110, "failed": 300}
    assert summary["failures"] == {
        "decode": {
            "blocks": 2,
            "scenes": 2,
            "first_scene": "b",
            "first_error": "decode went wrong",
        },
        "label_value": {
            "blocks": 1,
            "scenes": 1,
            "first_scene": "c",
            "first_error": "label_value went wrong",
        },
    }
    assert summary["missing"] == {"scenes": 2, "blocks": 4, "pixels": 500}
    assert summary["km2"] == pytest.approx(
        {"all": 50e-6, "valid": 22.5e-6, "no_data": 2.5e-6, "failed": 25e-6}
    )
    assert [(row["scene_id"], row["row_off"], row["error_kind"]) for row in failures] == [
        ("b", 0, "decode"),
        ("c", 0, "decode"),
        ("c", 10, "label_value"),
    ]
    assert failures[0]["error"] == "decode went wrong"
    assert reports.failures == failures


def test_ground_area_is_null_where_no_pixel_size_is_known() -> None:
    assert build([block("a")])[0].summary["km2"] is None


def test_plan_columns_reach_the_scene_table_and_the_coarse_scenes_are_counted() -> None:
    rows = [
        block("a", downsample=2, pixel_m=0.3, coarser_than_model=False),
        block("b", coarser_than_model=True),
    ]
    reports, scenes, _ = build(rows)
    assert [scene["downsample"] for scene in scenes] == [2, None]
    assert [scene["pixel_m"] for scene in scenes] == [0.3, None]
    assert [scene["coarser_than_model"] for scene in scenes] == [False, True]
    assert reports.summary["scenes"]["coarser_than_model"] == 1


def test_rows_of_unknown_status_are_passed_over() -> None:
    rows = [block("a"), block("b", status="from_the_future"), block("c")]
    reports, scenes, _ = build(rows)
    assert [scene["scene_id"] for scene in scenes] == ["a", "c"]
    assert reports.summary["blocks"]["all"] == 2


def random_rows(num_scenes: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for scene in range(num_scenes):
        blocks = int(rng.integers(1, 5))
        for index in range(blocks):
            common = {
                "row_off": 10 * index,
                "scene_height": 10 * blocks,
                "pixel_m": float(rng.random() + 0.1),
            }
            if rng.random() < 0.1:
                rows.append(failed(f"s{scene:03d}", label_px=int(rng.integers(100)), **common))
                continue
            cells = rng.multinomial(100, [0.5, 0.1, 0.1, 0.3]).tolist()
            confusion = pairs(*((a, b, cells[2 * a + b]) for a in (0, 1) for b in (0, 1) if cells[2 * a + b]))
            rows.append(compared(f"s{scene:03d}", confusion, **common))
    return rows


@pytest.mark.parametrize("batch_rows", [1, 7, 1000])
def test_the_cut_into_batches_changes_nothing(monkeypatch: pytest.MonkeyPatch, batch_rows: int) -> None:
    rows = random_rows(60, seed=4)
    whole = build(rows, batch_rows=len(rows))
    monkeypatch.setattr("segpipe.reports.tables._PENDING_ROWS", 5)
    monkeypatch.setattr("segpipe.reports.tables._GROUP_ROWS", 7)
    reports, scenes, failures = build(rows, batch_rows=batch_rows)
    assert scenes == whole[1]
    assert failures == whole[2]
    assert summary_json(reports.summary) == summary_json(whole[0].summary)
    assert reports.worst_scenes == whole[0].worst_scenes
    assert reports.failures == whole[0].failures


def test_scene_sums_equal_a_plain_loop_over_rows() -> None:
    rows = random_rows(40, seed=5)
    _, scenes, _ = build(rows, batch_rows=11)
    for scene in scenes:
        own = [row for row in rows if row["scene_id"] == scene["scene_id"]]
        counts = np.zeros((2, 2), np.int64)
        for row in own:
            for cell in row.get("confusion") or []:
                counts[cell["label"], cell["predicted"]] += cell["px"]
        assert scene["compared_px"] == counts.sum()
        assert scene["label_px"] == sum(row["label_px"] for row in own)
        expected = None if counts.sum() == 0 else np.trace(counts) / counts.sum()
        assert scene["accuracy"] == pytest.approx(expected)
        assert scene["px_building"] == sum(row["class_px"][1] for row in own if row["class_px"])


def test_old_objects_without_nullable_columns_are_read() -> None:
    needed = ("scene_id", "height", "width", "status", "valid_px", "class_px")
    scenes = io.BytesIO()
    builder = ReportBuilder(TWO, scenes, io.BytesIO())
    builder.add(pa.Table.from_pylist([{name: block("old")[name] for name in needed}]))
    builder.add(pa.Table.from_pylist([block("new", downsample=2)], schema=ROW_SCHEMA))
    builder.close()
    rows = pq.read_table(io.BytesIO(scenes.getvalue())).to_pylist()
    assert [(row["scene_id"], row["downsample"], row["valid_px"]) for row in rows] == [
        ("old", None, 100),
        ("new", 2, 100),
    ]


def test_no_rows_at_all_give_empty_tables_of_the_same_schema() -> None:
    scenes, failures = io.BytesIO(), io.BytesIO()
    builder = ReportBuilder(TWO, scenes, failures)
    builder.add(pa.RecordBatch.from_pylist([], schema=ROW_SCHEMA))
    reports = builder.close()
    assert pq.read_table(io.BytesIO(scenes.getvalue())).schema.equals(scene_schema(TWO))
    assert pq.read_table(io.BytesIO(failures.getvalue())).num_rows == 0
    assert reports.summary["scenes"]["all"] == 0
    assert "No labels were given" in render_html(reports, TWO)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (block("a", class_px=[1, 2, 3]), r"class_px has \[3\] values"),
        (compared("a", pairs((2, 0, 5))), "outside the run's 2 classes"),
    ],
)
def test_rows_that_contradict_the_classes_are_damage(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckError, match=reason):
        build([row])


def test_worst_scenes_are_bounded_sorted_and_ties_keep_plan_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segpipe.reports.tables._PENDING_ROWS", 4)
    rows = [compared(f"s{i:02d}", pairs((0, 0, 50 + i % 10), (0, 1, 50 - i % 10))) for i in range(60)]
    worst = build(rows)[0].worst_scenes
    assert len(worst) == NUM_WORST
    scores = [row["miou"] for row in worst]
    assert scores == sorted(scores)
    assert [row["scene_id"] for row in worst[:7]] == ["s00", "s10", "s20", "s30", "s40", "s50", "s01"]


def test_shown_failures_are_bounded_and_all_are_in_the_file() -> None:
    reports, _, failures = build(failed(f"s{i}") for i in range(NUM_FAILURES_SHOWN + 50))
    assert len(failures) == NUM_FAILURES_SHOWN + 50
    assert reports.failures == failures[:NUM_FAILURES_SHOWN]
    assert reports.summary["failures"]["decode"] == {
        "blocks": 150, "scenes": 150, "first_scene": "s0", "first_error": "decode went wrong",
    }  # fmt: skip


def test_class_columns_are_snake_case_and_unique() -> None:
    names = ["Small Car", "small-car", "SmallCar", "Gebäude", "道路", "a", "A", "a_6"]
    columns = column_names(names)
    assert columns[:5] == ["small_car", "small_car_1", "small_car_2", "gebaude", "class_4"]
    assert len(set(columns)) == len(columns)
    assert all(column.isidentifier() for column in columns)


def test_small_tables_become_parquet_files() -> None:
    reports, _, _ = build([compared("a", pairs((0, 0, 7), (1, 0, 3)))])
    confusion = pq.read_table(io.BytesIO(parquet_bytes(reports.confusion)))
    assert confusion.to_pylist() == [
        {"label": "background", "predicted": "background", "pixels": 7},
        {"label": "background", "predicted": "building", "pixels": 0},
        {"label": "building", "predicted": "background", "pixels": 3},
        {"label": "building", "predicted": "building", "pixels": 0},
    ]
    assert pq.read_table(io.BytesIO(parquet_bytes(reports.classes))).equals(reports.classes)


def test_summary_json_leads_with_what_made_the_run_and_is_plain_json() -> None:
    about = {"recipe_key": "k" * 64, "model_sha256": "m" * 64}
    reports, _, _ = build([compared("a", pairs((0, 0, 10)))], about=about)
    tree = json.loads(summary_json(reports.summary))
    assert list(tree)[:3] == ["format", "recipe_key", "model_sha256"]
    assert tree["scores"]["kappa"] is None
    assert tree["classes"][1]["iou"] is None
