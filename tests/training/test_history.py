from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from segpipe.errors import CheckError
from segpipe.storage import open_storage
from segpipe.training.history import (
    History,
    OrderLog,
    ScoreRow,
    StepRow,
    read_order,
    read_scores,
    read_steps,
    scores_schema,
    steps_schema,
)

CLASSES = ("water", "Bare Soil", "bare-soil", "水")


def step_row(step: int, loss: float = 0.5, **parts: float) -> StepRow:
    return StepRow(step, step // 10, loss, parts or {"dice": loss}, 1e-3, None, 8, 20.0, 4096)


def score_row(step: int, metric: float | None = 0.5, is_best: bool = False) -> ScoreRow:
    iou = {"water": 0.25, "Bare Soil": 0.5, "bare-soil": None, "水": 1.0}
    return ScoreRow(step, step / 10, metric, is_best, {"miou": metric, "kappa": None}, iou, 999, None)


def keys(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))


def test_rows_come_back_as_they_went_in_with_null_where_nothing_is_defined(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    history = History(storage, CLASSES)
    history.add_step(StepRow(1, 0, 1.5, {"cross_entropy": 1.0, "dice": 0.5}, 1e-3, 2.5, 8, 20.0, 4096))
    history.add_step(StepRow(2, 0, 1.25, {"cross_entropy": 0.75, "dice": 0.5}, 2e-3, None, 7, 21.0, 4000))
    history.add_score(score_row(2, float("nan"), is_best=True))
    history.flush(2)
    steps, scores = read_steps(storage), read_scores(storage)
    assert steps.schema.equals(steps_schema(["cross_entropy", "dice"]))
    assert steps.to_pylist()[1] == {
        "step": 2,
        "epoch": 0,
        "loss": 1.25,
        "loss_cross_entropy": 0.75,
        "loss_dice": 0.5,
        "lr": 2e-3,
        "grad_norm": None,
        "samples": 7,
        "samples_per_s": 21.0,
        "valid_px": 4000,
    }
    (row,) = scores.to_pylist()
    assert scores.schema.equals(scores_schema(CLASSES))
    assert (row["metric"], row["miou"], row["kappa"], row["mdice"], row["train_loss"]) == (None,) * 5
    assert (row["step"], row["epoch"], row["is_best"], row["compared_px"]) == (2, 0.2, True, 999)


def test_each_class_has_a_column_of_its_own_also_where_names_look_alike(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    history = History(storage, CLASSES)
    history.add_score(score_row(10))
    history.flush(10)
    row = read_scores(storage).to_pylist()[0]
    assert [value for name, value in row.items() if name.startswith("iou_")] == [0.25, 0.5, None, 1.0]
    assert "iou_water" in row
    assert "iou_bare_soil" in row


def test_a_flush_writes_only_what_was_added_since_the_last(tmp_path: Path) -> None:
    history = History(open_storage(str(tmp_path)), CLASSES)
    history.flush(0)
    assert keys(tmp_path) == []
    for step in (1, 2, 3):
        history.add_step(step_row(step))
    history.flush(3)
    history.add_step(step_row(4))
    history.add_score(score_row(5))
    history.flush(5)
    history.flush(5)
    assert keys(tmp_path) == [
        "history/epochs-00000005-00000005.parquet",
        "history/steps-00000001-00000003.parquet",
        "history/steps-00000004-00000005.parquet",
    ]
    piece = pq.read_table(io.BytesIO((tmp_path / "history/steps-00000004-00000005.parquet").read_bytes()))
    assert piece["step"].to_pylist() == [4]


def test_a_row_after_the_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    history = History(storage, CLASSES)
    history.add_step(step_row(7))
    with pytest.raises(ValueError, match="step 7 is after step 6"):
        history.flush(6)
    history.flush(7)
    assert read_steps(storage)["step"].to_pylist() == [7]


def test_a_repeat_after_a_kill_leaves_the_first_object(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for loss in (1.0, 2.0):
        history = History(storage, CLASSES)
        history.add_step(step_row(1, loss))
        history.flush(1)
    assert read_steps(storage)["loss"].to_pylist() == [1.0]


def test_where_pieces_overlap_the_row_of_the_one_that_ends_later_wins_once(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for first, last, loss in ((1, 4, 1.0), (3, 7, 2.0), (5, 6, 3.0), (8, 8, 4.0)):
        history = History(storage, CLASSES)
        for step in range(first, last + 1):
            history.add_step(step_row(step, loss))
            history.add_score(score_row(step, loss / 10))
        history.flush(last)
    expected = [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 4.0]
    assert read_steps(storage)["step"].to_pylist() == list(range(1, 9))
    assert read_steps(storage)["loss"].to_pylist() == expected
    assert read_scores(storage)["metric"].to_pylist() == [loss / 10 for loss in expected]


def test_pieces_beyond_eight_digits_stay_in_step_order(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for step in (99_999_999, 100_000_000, 2):
        history = History(storage, CLASSES)
        history.add_step(step_row(step))
        history.flush(step)
    assert read_steps(storage)["step"].to_pylist() == [2, 99_999_999, 100_000_000]


def test_a_loss_that_came_later_is_null_in_the_steps_before(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    history = History(storage, CLASSES)
    history.add_step(step_row(1, dice=0.5))
    history.flush(1)
    history.add_step(step_row(2, dice=0.25, focal=0.125))
    history.flush(2)
    assert read_steps(storage)["loss_dice"].to_pylist() == [0.5, 0.25]
    assert read_steps(storage)["loss_focal"].to_pylist() == [None, 0.125]


def test_no_history_is_an_empty_table(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert read_steps(storage).num_rows == read_scores(storage).num_rows == read_order(storage).num_rows == 0
    assert "iou_water" not in read_scores(storage).schema.names


def test_a_damaged_piece_is_named(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("history/steps-00000001-00000002.parquet", b"no parquet")
    with pytest.raises(CheckError, match="steps-00000001-00000002"):
        read_steps(storage)


def test_other_objects_beside_the_pieces_are_passed_over(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("history/steps-notes.txt", b"hello")
    assert read_steps(storage).num_rows == 0


def test_the_order_log_holds_every_lane_of_every_step_once(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for rank in (0, 1):
        log = OrderLog(storage)
        log.flush(rank)
        for step in (1, 2):
            lanes = [rank, rank + 2]
            log.add(step, lanes, [f"sample-{step}-{lane}" for lane in lanes])
        log.flush(rank)
        log.flush(rank)
    assert len(keys(tmp_path)) == 2
    assert all(name.startswith("order/steps-00000001-00000002-rank-0000") for name in keys(tmp_path))
    assert read_order(storage).to_pylist() == [
        {"step": step, "lane": lane, "sample_id": f"sample-{step}-{lane}"}
        for step in (1, 2)
        for lane in range(4)
    ]


def test_no_lane_is_lost_where_a_repeat_has_another_number_of_workers(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for lanes in ([0, 4], [0, 2, 4, 6]):  # rank 0 of four workers, then of two
        log = OrderLog(storage)
        log.add(1, lanes, [f"s{lane}" for lane in lanes])
        log.flush(0)
        log.add(2, lanes, [f"s{lane}" for lane in lanes])
    assert read_order(storage)["lane"].to_pylist() == [0, 2, 4, 6]
