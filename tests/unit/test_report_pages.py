"""The HTML page and the terminal table of a report: what they show, and that names do nothing there."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import pytest
from report_rows import TWO, block, build, compared, failed, pairs
from rich.console import Console

from segpipe.config.card import ClassInfo
from segpipe.errors import ERROR_KINDS
from segpipe.reports.html import format_percent, render_html
from segpipe.reports.tables import (
    Reports,
)
from segpipe.reports.terminal import failure_lines, print_scores
from segpipe.reports.totals import Planned


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


def test_the_page_says_which_run_it_is_in_its_title_and_under_its_heading() -> None:
    about = {"recipe_key": "a1b2c3d4e5f6" + "0" * 52, "model_sha256": "f" * 64, "family": "<u>net\u202e"}
    html = render_html(build([block("a")], about=about)[0], TWO)
    said = "model <u>net\\u202e, sha256 ffffffffffff, recipe a1b2c3d4e5f6"
    assert "<title>Segmentation report: model &lt;u&gt;net\\u202e, sha256 f" in html
    page = Page(html)
    assert f"\n{said}. What was asked is in run.json, beside the folder of this page.\n" in page.text
    for digest in (about["recipe_key"], about["model_sha256"]):
        assert digest in page.text, "in full at the end"
    assert "<title>Segmentation report</title>" in render_html(build([block("a")])[0], TWO)


def test_a_share_is_0_or_100_percent_only_where_it_is() -> None:
    assert format_percent(0.0) == "0%"
    assert format_percent(1.0) == "100%"
    assert format_percent(1e-9) == "0.01%"
    assert format_percent(1 - 1e-9) == "99.99%"
    assert format_percent(None) == "–"


def test_captions_count_one_as_one() -> None:
    one = [compared("a", pairs((0, 0, 100))), failed("b")]
    text = Page(render_html(build(one)[0], TWO)).text
    assert "The scene of lowest mean IoU; all scenes" in text
    assert "1 of 1 failed block; all are" in text
    two = [compared("c", pairs((0, 0, 100))), failed("d")]
    text = Page(render_html(build(one + two)[0], TWO)).text
    assert "The 2 scenes of lowest mean IoU; all scenes" in text
    assert "2 of 2 failed blocks; all are" in text


def test_areas_have_no_exponent_however_small() -> None:
    html = render_html(build([block("a", pixel_m=0.88141)])[0], TWO)
    assert "Pixels: 100, 0.00007769 km²." in Page(html).text
    assert "e-05" not in html


def printed(reports: Reports, width: int | None = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
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
    assert "scenes: 2, 1 ok, 1 failed, 1 labelled, not_raster: 1" in text


@pytest.mark.parametrize("width", [20, 40, 80, None])
def test_class_names_and_numbers_are_whole_at_any_width(width: int | None) -> None:
    side = 2_000_000
    names = ("background of all that is not listed", "Gebäude und Straßen 道路", "water body, standing")
    classes = tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in names)
    large = {"height": side, "width": side, "scene_height": side, "scene_width": side, "valid_px": side**2}
    pixels = [2_819_000_000_001, 1_180_000_000_000, side**2 - 3_999_000_000_001]
    row = compared("a", pairs(*((index, index, px) for index, px in enumerate(pixels))), class_px=pixels)
    reports = build([row | large], classes)[0]
    text = printed(reports, width)
    assert "…" not in text
    lines = text.splitlines()
    for name, px in zip(names, pixels, strict=True):
        line = next(line for line in lines if line.startswith(name))
        assert line.removeprefix(name).split()[-3:-1] == [f"{px:,}"] * 2
        assert line.split()[-7:-3] == ["1.0000"] * 4
        assert line.endswith("%")


def test_the_terminal_tells_of_labels_that_nobody_could_count() -> None:
    rows = [compared("a", pairs((0, 0, 100))), failed("b", "label_read", label_uri="/b.tif", label_px=None)]
    assert "in none of these counts: the labels of 1 block that could not be read" in printed(build(rows)[0])
    assert "in none of" not in printed(build(rows[:1])[0])


def test_the_terminal_shows_pixels_where_there_are_no_labels() -> None:
    text = printed(build([block("a")])[0])
    assert "building" in text
    assert "40.00%" in text
    assert "miou" not in text


def test_failures_are_told_by_kind_with_their_first_scene_and_what_to_do() -> None:
    rows = [
        failed("a", "limit"),
        failed("b", "decode"),
        *(failed("c", "decode", row_off=row, scene_height=20) for row in (0, 10)),
        failed("d\x1b[2J", "mask_missing", error="gone\u202e. Predict it too."),
    ]
    again = "run the same command again, which computes what has changed"
    assert failure_lines(build(rows)[0].summary) == [
        "failed: decode in 2 scenes, first b: decode went wrong",
        "failed: limit in 1 scene, first a: limit went wrong",
        "failed: mask_missing in 1 scene, first d\\x1b[2J: gone\\u202e. Predict it too.",
        f"what to do about decode: repair the sources and {again}.",
        f"what to do about limit: repair the sources, or raise input.limits if you trust them, and {again}.",
        f"what to do about mask_missing: predict these scenes into the run of --masks and {again}.",
    ]


def test_every_kind_has_its_count_and_advice_however_many_there_are() -> None:
    lines = failure_lines(build(failed(kind, kind) for kind in ERROR_KINDS)[0].summary)
    told = [line for line in lines if line.startswith("failed: ")]
    assert len(told) == 6
    for kind in ERROR_KINDS:
        assert sum(f"{kind} in 1 scene" in line for line in told) == 1
        advice = [line for line in lines if line.startswith("what to do about ")]
        assert sum(kind in line.split(":")[0].split("about ")[1].split(", ") for line in advice) == 1
    assert all(line.endswith(".") for line in lines if line.startswith("what to do"))


def test_markup_and_control_characters_in_class_names_do_nothing_on_the_terminal() -> None:
    classes = (TWO[0], ClassInfo(name="[red]x[/red]\x1b[2J", color=(0, 0, 0)))
    text = printed(build([block("a")], classes)[0])
    assert "[red]x[/red]\\x1b[2J" in text
    assert "\x1b" not in text
