from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peak_memory import peak_growth_bytes
from rich.console import Console

from segpipe.config.card import ClassInfo
from segpipe.errors import CheckError
from segpipe.masks.schema import COUNT_COLUMNS, MASK_FIELDS
from segpipe.reports.html import format_percent, render_html
from segpipe.reports.tables import (
    ReportBuilder,
    Reports,
    column_names,
    parquet_bytes,
    scene_schema,
    summary_json,
)
from segpipe.reports.terminal import print_scores
from segpipe.reports.totals import NUM_FAILURES_SHOWN, NUM_WORST, Planned

TWO = (ClassInfo(name="background", color=(0, 0, 0)), ClassInfo(name="building", color=(220, 20, 60)))
PLAN_COLUMNS = [("downsample", pa.int32()), ("pixel_m", pa.float64()), ("coarser_than_model", pa.bool_())]
ROW_SCHEMA = pa.schema([*(field for field in MASK_FIELDS if field.name in COUNT_COLUMNS), *PLAN_COLUMNS])


def pairs(*cells: tuple[int, int, int]) -> list[dict[str, int]]:
    return [{"label": a, "predicted": b, "px": px} for a, b, px in cells]


def block(scene_id: str, row_off: int = 0, **changes: Any) -> dict[str, Any]:
    """An ``ok`` block of 10 x 10 pixels without label, in a scene of just that block."""
    return {
        "scene_id": scene_id,
        "uri": f"/archive/{scene_id}.tif",
        "part": 0,
        "unit": 0,
        "row_off": row_off,
        "col_off": 0,
        "height": 10,
        "width": 10,
        "scene_height": 10,
        "scene_width": 10,
        "valid_px": 100,
        "class_px": [60, 40],
        "status": "ok",
    } | changes


def compared(scene_id: str, confusion: list[dict[str, int]], **changes: Any) -> dict[str, Any]:
    compared_px = sum(cell["px"] for cell in confusion)
    labels = {"label_uri": "/labels/x.tif", "label_px": compared_px, "compared_px": compared_px}
    return block(scene_id, **(labels | {"confusion": confusion} | changes))


def failed(scene_id: str, kind: str = "decode", **changes: Any) -> dict[str, Any]:
    gone = {
        "valid_px": 0,
        "class_px": None,
        "status": "failed",
        "error_kind": kind,
        "error": f"{kind} went wrong",
    }
    return block(scene_id, **(gone | changes))


def build(
    rows: Iterable[dict[str, Any]],
    classes: tuple[ClassInfo, ...] = TWO,
    batch_rows: int = 3,
    **close: Any,
) -> tuple[Reports, list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the reports, and the rows of scenes.parquet and failures.parquet."""
    rows, scenes, failures = list(rows), io.BytesIO(), io.BytesIO()
    builder = ReportBuilder(classes, scenes, failures)
    for start in range(0, len(rows), batch_rows):
        builder.add(pa.RecordBatch.from_pylist(rows[start : start + batch_rows], schema=ROW_SCHEMA))
    reports = builder.close(**close)
    tables = [pq.read_table(io.BytesIO(file.getvalue())).to_pylist() for file in (scenes, failures)]
    return reports, tables[0], tables[1]


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
        "decode": {"blocks": 2, "scenes": 2},
        "label_value": {"blocks": 1, "scenes": 1},
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
    assert reports.summary["failures"]["decode"] == {"blocks": 150, "scenes": 150}


def test_class_columns_are_snake_case_and_unique() -> None:
    names = ["Small Car", "small-car", "SmallCar", "Gebäude", "道路", "a", "A", "a_6"]
    columns = column_names([ClassInfo(name=name, color=(0, 0, 0)) for name in names])
    assert columns[:5] == ["small_car", "small_car_1", "small_car_2", "gebaude", "class_4"]
    assert len(set(columns)) == len(columns)
    assert all(column.isidentifier() for column in columns)


MANY = tuple(ClassInfo(name=f"c{i}", color=(i, 0, 0)) for i in range(255))


def rows_of_many_classes() -> list[dict[str, Any]]:
    build([compared("s", pairs((0, 0, 100)))], TWO)  # what a first call loads is not counted
    return [compared(f"s{i}", pairs((i, i, 60), (i, 254, 40)), class_px=[0] * 255) for i in range(150)]


def build_many_classes(rows: list[dict[str, Any]]) -> None:
    reports, scenes, _ = build(rows, MANY)
    assert scenes[7]["iou_c7"] == pytest.approx(0.6)
    assert reports.matrix[7, 254] == 40
    assert "confusion.parquet" in render_html(reports, MANY)


def test_255_classes_fit_without_a_matrix_a_scene_in_memory() -> None:
    # 150 matrices alone would be 78 MB, and their scores as much again
    assert peak_growth_bytes(rows_of_many_classes, build_many_classes) < 120e6


class Discard(io.RawIOBase):
    """A file that keeps nothing but its length."""

    length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.length += len(data)
        return len(data)

    def tell(self) -> int:
        return self.length


def thousand_rows() -> Any:
    """A batch of 1,000 scenes, after others have passed: what the first ones load is not counted."""
    columns = pa.RecordBatch.from_pylist(
        [compared(f"s{i:06d}", pairs((0, 0, 60), (1, 1, 40))) for i in range(1000)], schema=ROW_SCHEMA
    )
    add_scenes(columns, 30)
    return columns


def add_scenes(columns: Any, num_batches: int) -> None:
    builder = ReportBuilder(TWO, Discard(), Discard())  # type: ignore[arg-type]
    at = columns.schema.get_field_index("scene_id")
    for batch in range(num_batches):
        ids = pa.array([f"{batch}-{i}" for i in range(1000)])
        builder.add(columns.set_column(at, columns.schema.field(at), ids))
    summary = builder.close().summary
    assert summary["scenes"]["all"] == 1000 * num_batches
    assert summary["label_px"] == 100_000 * num_batches


def add_many_scenes(columns: Any) -> None:
    add_scenes(columns, 150)


def test_memory_is_flat_in_the_number_of_scenes() -> None:
    # five times as many scenes as before; each kept would be some hundred bytes
    assert peak_growth_bytes(thousand_rows, add_many_scenes) < 12e6


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


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that are not closed in order."""

    void = frozenset(("meta", "br", "link", "img", "input", "hr"))

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._stack: list[str] = []
        self.feed(html)
        self.close()
        assert self._stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self._stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e.tif"


def hostile_page() -> tuple[str, Page]:
    classes = (TWO[0], ClassInfo(name="<img src=x onerror=alert(2)>", color=(1, 2, 3)))
    rows = [
        compared(HOSTILE, pairs((0, 0, 9), (1, 0, 1))),
        failed(f"{HOSTILE}2", error="{{ 7*7 }}<b>bold</b>"),
    ]
    reports, _, _ = build(rows, classes, about={"recipe_key": "</dd><script>"})
    html = render_html(reports, classes, title="</title><script>alert(3)</script>")
    return html, Page(html)


def test_hostile_names_stay_text() -> None:
    html, page = hostile_page()
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "img", "iframe", "link"})
    assert "<b>bold" not in html
    assert "<script" not in html
    assert "<script>alert(1)</script>\"'&\\x1b[31m\\u202e.tif" in page.text
    assert "{{ 7*7 }}<b>bold</b>" in page.text
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_the_page_fetches_nothing_and_allows_only_its_own_style() -> None:
    html, page = hostile_page()
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    names = {name for _, attrs in page.tags for name in attrs}
    assert names.isdisjoint({"style", "src", "href", "onclick", "onload"})
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_the_page_shows_scores_classes_matrix_worst_scenes_and_failures() -> None:
    rows = [
        compared("town/a", pairs((0, 0, 50), (0, 1, 10), (1, 0, 5), (1, 1, 35)), pixel_m=0.5),
        failed("town/b", "decode", label_uri="/labels/b.tif", label_px=25),
        block("town/c", coarser_than_model=True),
    ]
    reports, _, _ = build(rows, planned=Planned(4, 4, 400), about={"recipe_key": "abc"})
    html = render_html(reports, TWO, title="Kampala")
    page = Page(html)
    for text in (
        "Kampala",
        f"{50 / 65:.4f}",  # IoU of background
        f"{35 / 50:.4f}",  # IoU of building
        "83.33%",  # of the background's label
        "100 pixels compared of 125 with a label",
        "25 labelled pixels without a prediction",
        "1 of 3 blocks failed: 1 scene as a whole, 0 in part",
        "still without a mask: 1 scene, 1 block, 100 pixels",
        "1.5 x coarser than the model was trained for: 1 scene.",
        "town/a",
        "town/b",
        "decode went wrong",
        "recipe key",
    ):
        assert text in page.text, text
    assert ".c1 { background: rgb(220 20 60); }" in html
    assert 'class="swatch c1"' in html
    assert sum(tag == "table" for tag, _ in page.tags) == 7


def test_a_share_is_0_or_100_percent_only_where_it_is() -> None:
    assert format_percent(0.0) == "0%"
    assert format_percent(1.0) == "100%"
    assert format_percent(1e-9) == "0.01%"
    assert format_percent(1 - 1e-9) == "99.99%"
    assert format_percent(None) == "–"


def printed(reports: Reports) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    print_scores(reports.summary, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_shows_classes_averages_and_coverage() -> None:
    rows = [
        compared("a", pairs((0, 0, 50), (0, 1, 10), (1, 0, 5), (1, 1, 35)), label_px=120),
        failed("b", "not_raster"),
    ]
    text = printed(build(rows)[0])
    lines = text.splitlines()
    building = next(line for line in lines if line.startswith("building"))
    assert building.split() == ["building", "0.7000", "0.8235", "0.7778", "0.8750", "40", "40", "40.00%"]
    assert "miou 0.7346" in text
    assert "compared 100 of 120 labelled pixels (83.33%)" in text
    assert "scenes: 2, 1 ok, 1 failed, not_raster: 1" in text


def test_the_terminal_shows_pixels_where_there_are_no_labels() -> None:
    text = printed(build([block("a")])[0])
    assert "building" in text
    assert "40.00%" in text
    assert "miou" not in text


def test_markup_and_control_characters_in_class_names_do_nothing_on_the_terminal() -> None:
    classes = (TWO[0], ClassInfo(name="[red]x[/red]\x1b[2J", color=(0, 0, 0)))
    text = printed(build([block("a")], classes)[0])
    assert "[red]x[/red]\\x1b[2J" in text
    assert "\x1b" not in text
