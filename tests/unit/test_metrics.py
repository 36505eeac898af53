from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from segpipe.config import card
from segpipe.metrics import Scores, class_counts, confusion, from_pairs, score_arrays, to_pairs
from segpipe.metrics.counts import _CHUNK_PX, IGNORE


def test_the_ignored_byte_is_the_one_of_model_cards() -> None:
    assert IGNORE == card.IGNORE == card.MAX_CLASSES


def sets_oracle(label: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[str, list[float | None]]:
    """IoU, Dice, precision and recall from plain sets of pixel positions."""
    pixels = [
        (position, a, b)
        for position, (a, b) in enumerate(
            zip(label.ravel().tolist(), predicted.ravel().tolist(), strict=True)
        )
        if IGNORE not in (a, b)
    ]
    out: dict[str, list[float | None]] = {"iou": [], "dice": [], "precision": [], "recall": []}
    for index in range(num_classes):
        truth = {position for position, a, _ in pixels if a == index}
        found = {position for position, _, b in pixels if b == index}
        both = len(truth & found)
        out["iou"].append(both / len(truth | found) if truth | found else None)
        out["dice"].append(2 * both / (len(truth) + len(found)) if truth or found else None)
        out["precision"].append(both / len(found) if found else None)
        out["recall"].append(both / len(truth) if truth else None)
    return out


def plain_counts(label: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    counts = np.zeros((num_classes, num_classes), np.int64)
    for a, b in zip(label.ravel().tolist(), predicted.ravel().tolist(), strict=True):
        if IGNORE not in (a, b):
            counts[a, b] += 1
    return counts


def random_pair(shape: tuple[int, int], num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blobs, so that runs of equal pixels occur, with noise and some 255 in both."""
    rng = np.random.default_rng(seed)
    rows, cols = (-(-size // 8) for size in shape)
    label = rng.integers(0, num_classes, (rows, cols), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    label = label[: shape[0], : shape[1]].copy()
    predicted = label.copy()
    noise = rng.random(shape) < 0.2
    predicted[noise] = rng.integers(0, num_classes, int(noise.sum()))
    label[rng.random(shape) < 0.1] = IGNORE
    predicted[rng.random(shape) < 0.1] = IGNORE
    return label, predicted


@pytest.mark.parametrize("num_classes", [1, 2, 19, 31, 32, 200, 255])
def test_confusion_equals_counting_pixel_by_pixel(num_classes: int) -> None:
    label, predicted = random_pair((61, 83), num_classes)
    counts = confusion(label, predicted, num_classes)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, plain_counts(label, predicted, num_classes))


def test_rows_are_labels_and_columns_predictions() -> None:
    counts = confusion(np.array([[0, 0, 1]], np.uint8), np.array([[1, 1, 1]], np.uint8), 2)
    np.testing.assert_array_equal(counts, [[0, 2], [0, 1]])


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 23])
def test_confusion_counts_every_pixel_of_any_length(size: int) -> None:
    ones = np.ones((1, size), np.uint8)
    assert confusion(ones, ones, 2).tolist() == [[0, 0], [0, size]]


def test_confusion_of_views_that_are_neither_contiguous_nor_aligned() -> None:
    label, predicted = random_pair((40, 50), 5)
    flat_label, flat_predicted = label.ravel()[3:], predicted.ravel()[5:-1][:1990]
    expected = plain_counts(flat_label[:1990], flat_predicted, 5)
    np.testing.assert_array_equal(confusion(flat_label[:1990], flat_predicted, 5), expected)
    window = (slice(3, 31), slice(5, 44, 2))
    expected = plain_counts(label[window], predicted[window], 5)
    np.testing.assert_array_equal(confusion(label[window], predicted[window], 5), expected)


def test_confusion_of_read_only_arrays() -> None:
    label, predicted = random_pair((9, 9), 2)
    label.setflags(write=False)
    np.testing.assert_array_equal(confusion(label, predicted, 2), plain_counts(label, predicted, 2))


def test_confusion_over_several_chunks_equals_one(monkeypatch: pytest.MonkeyPatch) -> None:
    label, predicted = random_pair((64, 100), 3)
    whole, (class_px, _) = confusion(label, predicted, 3), class_counts(predicted, 3)
    monkeypatch.setattr("segpipe.metrics.counts._CHUNK_PX", 999)
    np.testing.assert_array_equal(confusion(label, predicted, 3), whole)
    np.testing.assert_array_equal(class_counts(predicted, 3)[0], class_px)


def test_a_chunk_cannot_overflow_a_cell() -> None:
    assert np.iinfo(np.uint32).max > _CHUNK_PX


def test_merging_counts_is_plain_addition() -> None:
    label, predicted = random_pair((64, 64), 4)
    halves = confusion(label[:20], predicted[:20], 4) + confusion(label[20:], predicted[20:], 4)
    np.testing.assert_array_equal(halves, confusion(label, predicted, 4))


@pytest.mark.parametrize("bad", [2, 30, 31, 32, 33, 254])
@pytest.mark.parametrize("where", ["label", "prediction"])
def test_a_value_outside_the_classes_is_refused_even_opposite_255(bad: int, where: str) -> None:
    clean, dirty = np.full((4, 9), IGNORE, np.uint8), np.zeros((4, 9), np.uint8)
    dirty[2, 3] = bad
    pair = (dirty, clean) if where == "label" else (clean, dirty)
    with pytest.raises(ValueError, match=rf"{where} holds {bad} \(1 pixels\).*0 to 1"):
        confusion(*pair, 2)


def test_class_counts_refuses_a_value_outside_the_classes() -> None:
    with pytest.raises(ValueError, match=r"mask holds 7, 9 \(3 pixels\)"):
        class_counts(np.array([[0, 7, 9, 9, 255]], np.uint8), 5)


def test_confusion_refuses_other_shapes_types_and_class_numbers() -> None:
    byte = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="shapes must agree"):
        confusion(byte, byte[:1], 2)
    with pytest.raises(ValueError, match="uint8, not int64"):
        confusion(byte.astype(np.int64), byte, 2)
    for num_classes in (0, 256):
        with pytest.raises(ValueError, match="between 1 and 255"):
            confusion(byte, byte, num_classes)


def test_class_counts_equals_bincount_without_255() -> None:
    label, _ = random_pair((61, 83), 19)
    counts, valid_px = class_counts(label, 19)
    np.testing.assert_array_equal(counts, np.bincount(label[label != IGNORE], minlength=19))
    assert valid_px == np.count_nonzero(label != IGNORE)
    assert class_counts(np.full((3, 3), IGNORE, np.uint8), 19)[1] == 0


def test_stored_cells_leave_zeros_out_and_come_back() -> None:
    counts = np.array([[5, 0], [7, 1]], np.int64)
    pairs = to_pairs(counts)
    assert pairs == [
        {"label": 0, "predicted": 0, "px": 5},
        {"label": 1, "predicted": 0, "px": 7},
        {"label": 1, "predicted": 1, "px": 1},
    ]
    assert all(type(value) is int for pair in pairs for value in pair.values())
    np.testing.assert_array_equal(from_pairs(pairs, 2), counts)
    assert from_pairs([], 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("cell", [(2, 0), (0, -1)])
def test_a_stored_cell_outside_the_classes_is_refused(cell: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside 2 classes"):
        from_pairs([{"label": cell[0], "predicted": cell[1], "px": 1}], 2)


def test_scores_of_a_matrix_worked_by_hand() -> None:
    scores = Scores.from_confusion(np.array([[50, 10, 0], [5, 20, 0], [0, 15, 0]], np.int64), label_px=120)
    assert scores.iou == pytest.approx((50 / 65, 20 / 50, 0.0))
    assert scores.dice == pytest.approx((100 / 115, 40 / 70, 0.0))
    assert scores.precision[:2] == pytest.approx((50 / 55, 20 / 45))
    assert scores.precision[2] is None  # never predicted
    assert scores.recall == pytest.approx((50 / 60, 20 / 25, 0.0))
    assert (scores.support_px, scores.predicted_px) == ((60, 25, 15), (55, 45, 0))
    assert scores.miou == pytest.approx((50 / 65 + 20 / 50) / 3)
    assert scores.mdice == pytest.approx((100 / 115 + 40 / 70) / 3)
    assert scores.accuracy == pytest.approx(0.7)
    assert scores.mean_accuracy == pytest.approx((50 / 60 + 20 / 25) / 3)
    assert scores.fw_iou == pytest.approx(0.60 * 50 / 65 + 0.25 * 20 / 50)
    chance = 0.60 * 0.55 + 0.25 * 0.45
    assert scores.kappa == pytest.approx((0.7 - chance) / (1 - chance))
    assert (scores.label_px, scores.compared_px) == (120, 100)


@pytest.mark.parametrize("seed", range(5))
def test_class_scores_equal_those_of_pixel_sets(seed: int) -> None:
    label, predicted = random_pair((24, 24), 6, seed)
    label[label == 4] = 0  # class 4 is only predicted, class 5 in neither
    label[label == 5], predicted[predicted == 5] = 1, 1
    scores = Scores.from_confusion(confusion(label, predicted, 6))
    for name, values in sets_oracle(label, predicted, 6).items():
        assert getattr(scores, name) == pytest.approx(tuple(values)), name
    assert scores.iou[5] is None
    assert scores.recall[4] is None
    assert scores.iou[4] == 0.0


def test_an_absent_class_is_null_and_not_in_the_means() -> None:
    scores = Scores.from_confusion(np.array([[6, 0, 0], [2, 2, 0], [0, 0, 0]], np.int64))
    assert scores.iou == (6 / 8, 0.5, None)
    assert scores.dice[2] is scores.precision[2] is scores.recall[2] is None
    assert scores.miou == pytest.approx((0.75 + 0.5) / 2)
    assert scores.mean_accuracy == pytest.approx((1.0 + 0.5) / 2)


def test_nothing_compared_leaves_every_score_null() -> None:
    scores = Scores.from_confusion(np.zeros((2, 2), np.int64), label_px=7)
    assert set(scores.overall().values()) == {None}
    assert scores.iou == (None, None)
    assert (scores.label_px, scores.compared_px) == (7, 0)


def test_kappa_is_null_for_one_class_minus_one_for_swapped_and_one_for_equal() -> None:
    assert Scores.from_confusion(np.array([[9, 0], [0, 0]], np.int64)).kappa is None
    assert Scores.from_confusion(np.array([[0, 5], [5, 0]], np.int64)).kappa == pytest.approx(-1.0)
    assert Scores.from_confusion(np.array([[3, 0], [0, 4]], np.int64)).kappa == pytest.approx(1.0)


def test_scores_of_an_archive_of_a_quadrillion_pixels() -> None:
    small = np.array([[50, 10], [5, 35]], np.int64)
    large = Scores.from_confusion(small * 10**13).overall()
    assert large == pytest.approx(Scores.from_confusion(small).overall())


def test_many_matrices_score_as_one_by_one() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 50, (20, 4, 4)) * (rng.random((20, 4, 4)) < 0.4)
    arrays = score_arrays(counts)
    for index, matrix in enumerate(counts):
        scores = Scores.from_confusion(matrix)
        for name in ("iou", "recall"):
            expected = [np.nan if value is None else value for value in getattr(scores, name)]
            np.testing.assert_array_equal(getattr(arrays, name)[index], expected)
        expected_kappa = np.nan if scores.kappa is None else scores.kappa
        np.testing.assert_array_equal(arrays.kappa[index], expected_kappa)


def test_importing_metrics_does_not_import_numba() -> None:
    code = (
        "import sys, segpipe.metrics; print(any(name in sys.modules for name in ('numba', 'torch', 'ray')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
