from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segpipe.masks.codec import DamagedMask, decode_mask, encode_mask
from segpipe.metrics import Scores, class_counts, confusion, from_pairs, to_pairs

COUNTS = st.integers(1, 5).flatmap(
    lambda side: hnp.arrays(np.int64, (side, side), elements=st.one_of(st.just(0), st.integers(0, 10**9)))
)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    num_classes = draw(st.integers(1, 255))
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 40)))
    few = st.sampled_from([0, num_classes // 2, num_classes - 1, 255])
    label = draw(hnp.arrays(np.uint8, shape, elements=few, fill=few))
    predicted = draw(hnp.arrays(np.uint8, shape, elements=few, fill=few))
    return label, predicted, num_classes


@settings(deadline=None, max_examples=60)
@given(pairs())
def test_confusion_equals_bincount_of_all_byte_pairs(pair: tuple[np.ndarray, np.ndarray, int]) -> None:
    label, predicted, num_classes = pair
    index = label.astype(np.int64).ravel() * 256 + predicted.ravel()
    everything = np.bincount(index, minlength=65536).reshape(256, 256)
    counts = confusion(label, predicted, num_classes)
    np.testing.assert_array_equal(counts, everything[:num_classes, :num_classes])
    np.testing.assert_array_equal(from_pairs(to_pairs(counts), num_classes), counts)
    class_px, valid_px = class_counts(label, num_classes)
    np.testing.assert_array_equal(class_px, everything[:num_classes].sum(axis=1))
    assert valid_px == class_px.sum()


@settings(deadline=None, max_examples=60)
@given(pairs(), st.integers(0, 12))
def test_counts_of_two_parts_add_up_to_the_whole(pair: tuple[np.ndarray, np.ndarray, int], cut: int) -> None:
    label, predicted, num_classes = pair
    parts = [confusion(label[rows], predicted[rows], num_classes) for rows in (slice(cut), slice(cut, None))]
    np.testing.assert_array_equal(sum(parts), confusion(label, predicted, num_classes))


@settings(deadline=None, max_examples=100)
@given(COUNTS)
def test_scores_lie_in_their_ranges_and_are_null_exactly_where_undefined(counts: np.ndarray) -> None:
    scores = Scores.from_confusion(counts)
    for name, value in scores.overall().items():
        low = -1.0 if name == "kappa" else 0.0
        assert value is None or low - 1e-9 <= value <= 1.0 + 1e-9, name
    for index, (iou, dice) in enumerate(zip(scores.iou, scores.dice, strict=True)):
        absent = scores.support_px[index] + scores.predicted_px[index] == 0
        assert (iou is None) == (dice is None) == absent
        if iou is not None and dice is not None:
            assert abs(dice - 2 * iou / (1 + iou)) < 1e-9
    assert (scores.miou is None) == (scores.accuracy is None) == (scores.compared_px == 0)


@settings(deadline=None, max_examples=60)
@given(COUNTS, st.randoms(use_true_random=False))
def test_the_order_of_classes_does_not_matter(counts: np.ndarray, random: object) -> None:
    order = list(range(len(counts)))
    random.shuffle(order)  # type: ignore[attr-defined]
    scores, turned = Scores.from_confusion(counts), Scores.from_confusion(counts[np.ix_(order, order)])
    assert [scores.iou[index] for index in order] == list(turned.iou)
    for name, value in scores.overall().items():
        other = turned.overall()[name]
        assert (value is None) == (other is None)
        assert value is None or other is None or abs(value - other) < 1e-6, name


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 90))))
def test_every_mask_comes_back_from_its_png(mask: np.ndarray) -> None:
    data = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(data), mask)
    assert encode_mask(mask.copy(order="F")) == data


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_changed_byte_of_a_png_is_an_error_and_never_another_mask(data: st.DataObject) -> None:
    mask = np.arange(120, dtype=np.uint8).reshape(10, 12) % 3
    png = bytearray(encode_mask(mask))
    at = data.draw(st.integers(0, len(png) - 1))
    png[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedMask):
        decode_mask(bytes(png))
