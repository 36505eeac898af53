from __future__ import annotations

import html
import re
from typing import Any

import pytest

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.config.train import TrainConfig, load_train
from segpipe.datasets.prepared import PreparedDataset, ShardRef
from segpipe.training.history import ScoreRow, scores_table
from segpipe.training.model_card import card_text, without_credentials

markdown_it = pytest.importorskip("markdown_it", reason="the Markdown parser that comes with rich is missing")

PLAIN = ("land", "water")
HOSTILE = (
    "a|b",
    "<script>alert(1)</script>",
    "`x` *y* _z_ ~~w~~ [l](u) ![i](j)",
    "band_1 & \\| more",
    "# h\n- i",
)


def config_of(**sections: Any) -> dict[str, Any]:
    tree = {"data": {"uri": "s3://bucket/prepared"}, "train": {"epochs": 2}, **sections}
    return TrainConfig.model_validate(tree).model_dump(mode="json")


def run_of(config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "config": config or config_of(),
        "steps": 1000,
        "epochs": 2.0,
        "kept_step": 500,
        "parameters": 1_234_567,
        "device": "cpu",
        "workers": 2,
        "metric": "miou",
        **changes,
    }


def text_of(
    names: tuple[str, ...] = PLAIN,
    run: dict[str, Any] | None = None,
    rows: list[ScoreRow] | None = None,
    licence: str | None = "CC BY 4.0",
    start_lines: tuple[str, ...] = ("Random start.",),
    pixel_m: float | None = 0.3,
) -> str:
    classes = tuple(ClassInfo(name=name, color=(255, 0, index)) for index, name in enumerate(names))
    bands = ("red", "green", "blue", "nir")
    ones = (1.0,) * len(bands)
    card = ModelCard(
        family="unet",
        options={"width": 16},
        bands=bands,
        mean=ones,
        std=ones,
        pixel_m=pixel_m,
        classes=classes,
    )
    dataset = PreparedDataset(
        uri="s3://bucket/prepared",
        key="0123abcd",
        classes=classes,
        bands=4,
        dtype="uint8",
        mean=ones,
        std=ones,
        pixel_m=pixel_m,
        licence=licence,
        shards=(ShardRef("a", "train", 1500), ShardRef("b", "val", 20), ShardRef("c", "test", 30)),
        class_px={"train": (750, 250) + (0,) * (len(names) - 2), "val": (1,) * len(names)},
        present_px={},
    )
    if rows is None:
        rows = [score_row(500, 0.625, names), score_row(1000, 0.5, names)]
    return card_text(card, run or run_of(), scores_table(rows, names), dataset, start_lines)


def score_row(step: int, miou: float, names: tuple[str, ...] = PLAIN) -> ScoreRow:
    iou = {name: (None if index == 1 else miou + 0.01) for index, name in enumerate(names)}
    return ScoreRow(step, 1.0, miou, True, {"miou": miou, "kappa": None}, iou, 123_456, 0.5)


def parsed(text: str) -> tuple[list[Any], str]:
    """The Markdown tokens, and the page without its tags."""
    parser = markdown_it.MarkdownIt("commonmark").enable("table")
    return parser.parse(text), html.unescape(re.sub(r"<[^>]*>", "", parser.render(text)))


def cells(text: str, heading: str) -> list[list[str]]:
    """The shown cells of the table below a heading."""
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tokens, _ = parsed(part)
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows:
            rows[-1].append("".join(child.content for child in token.children))
        elif token.type == "table_close":
            break
    return rows


def yaml_of(text: str) -> str:
    (fence,) = (token for token in parsed(text)[0] if token.type == "fence" and token.info == "yaml")
    return str(fence.content)


def test_the_card_says_what_the_model_is_and_how_to_use_it() -> None:
    text = text_of()
    facts = dict(cells(text, "Network")[1:])
    assert facts["parameters"] == "1,234,567"
    assert facts["options"] == "width: 16"
    assert facts["bands"] == "red, green, blue, nir"
    assert facts["pixel size"] == "0.3 m"
    assert facts["tile"] == "512 x 512 px"
    assert "segpipe predict IMAGES --model model.safetensors" in text
    assert "](curves.png)" in text
    assert "- Random start." in text


def test_the_scores_are_those_of_the_kept_weights() -> None:
    text = text_of()
    scores = {row[0]: row[1] for row in cells(text, "Scores")[1:]}
    assert scores["miou"] == "0.6250"
    assert scores["kappa"] == "-"
    assert set(scores) == {"miou", "mdice", "accuracy", "mean_accuracy", "fw_iou", "kappa"}
    assert "after step 500, on whole images of val (20 samples, 123,456 pixels with a label)" in text
    assert cells(text, "Classes")[1:] == [
        ["0", "land", "#ff0000", "75.00%", "0.6350"],
        ["1", "water", "#ff0001", "25.00%", "-"],
    ]


def test_without_a_validation_the_card_says_so() -> None:
    text = text_of(rows=[], run=run_of(kept_step=1000))
    assert "They were not scored." in text
    assert "has not been measured" in text
    assert [row[-1] for row in cells(text, "Classes")[1:]] == ["-", "-"]


def test_the_data_table_says_what_each_split_was_used_for() -> None:
    config = config_of(
        data={"uri": "s3://bucket/prepared", "train_splits": ["train", "val"]}, validation={"splits": ["val"]}
    )
    assert cells(text_of(run=run_of(config)), "Data")[1:] == [
        ["test", "30", "not used"],
        ["train", "1,500", "training"],
        ["val", "20", "training and validation"],
    ]


def test_an_unknown_licence_and_pixel_size_are_named_as_limits() -> None:
    text = text_of(licence=None, pixel_m=None)
    assert "The licence of the data is not stated" in text
    assert "The pixel size of the training images is unknown" in text


def test_hostile_names_are_shown_as_they_are_and_break_nothing() -> None:
    text = text_of(names=HOSTILE, licence="<b>x</b> | y", start_lines=("# no heading", "1. no list", "<i>&"))
    rows = cells(text, "Classes")
    assert [len(row) for row in rows] == [5] * 6
    assert [row[1] for row in rows[1:]] == [" ".join(name.split()) for name in HOSTILE]
    tokens, shown = parsed(text)
    assert not [token for token in tokens if token.type == "html_block"]
    inline = [child.type for token in tokens for child in token.children or ()]
    assert not {"html_inline", "em_open", "strong_open", "link_open"} & set(inline)
    assert inline.count("image") == 1
    assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 1
    assert not [token for token in tokens if token.type == "ordered_list_open"]
    assert "Licence: <b>x</b> | y" in shown
    assert "# no heading" in shown


def test_the_recipe_is_the_config_again_without_where_it_ran() -> None:
    config = config_of(
        output="s3://somewhere/out", cluster={"address": "ray://head:10001"}, train={"steps": 7}
    )
    text = text_of(run=run_of(config))
    assert "somewhere" not in text
    assert "head:10001" not in text
    again = load_train(yaml_of(text), {}, [], "README.md").model_dump(mode="json")
    assert again == config_of(train={"steps": 7})


@pytest.mark.parametrize(
    "option", ["```\n# out\n```", "````", "~~~", "</code></pre>", "a: b\n- c", "水 | \t"]
)
def test_no_value_of_the_config_breaks_out_of_the_fence(option: str) -> None:
    config = config_of(model={"options": {"note": option}})
    text = text_of(run=run_of(config))
    again = load_train(yaml_of(text), {}, [], "README.md")
    assert again.model.options == {"note": option}
    assert cells(text, "Network")[0] == ["property", "value"]
    assert parsed(text)[1].count("Limits") == 1


def test_credentials_do_not_reach_the_card() -> None:
    config = config_of(init={"weights": "https://me:hunter2@host/w.pth?X-Amz-Signature=hunter2"})
    text = text_of(run=run_of(config), start_lines=("From https://me:hunter2@host/w.pth?sig=hunter2.",))
    assert "hunter2" not in text
    assert "https://host/w.pth" in yaml_of(text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://bucket/a b", "s3://bucket/a b"),
        ("http://user:p@ss@host:5000/x?token=1#part", "http://host:5000/x#part"),
        ("see a@b.c and what? yes", "see a@b.c and what? yes"),
        ("/plain/path@2x?.png", "/plain/path@2x?.png"),
    ],
)
def test_only_user_and_query_of_a_uri_are_taken_out(given: str, expected: str) -> None:
    assert without_credentials(given) == expected


def test_the_card_is_the_same_each_time() -> None:
    assert text_of() == text_of()
