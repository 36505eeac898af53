"""Segmentation scores from confusion counts, all computed in one place for one matrix or many.

With n[i, j] pixels of label i and prediction j, r[i] the row sums (label), p[j] the column sums (prediction)
and N all compared pixels:

iou          n[c,c] / (r[c] + p[c] - n[c,c])             Jaccard 1912; Everingham et al. 2010 (PASCAL VOC)
dice         2 n[c,c] / (r[c] + p[c]), equal to F1       Dice 1945
precision    n[c,c] / p[c]
recall       n[c,c] / r[c]
miou, mdice  mean over the classes for which it is defined
accuracy     sum n[c,c] / N                              "pixel accuracy", Long et al. 2015
mean_accuracy  mean recall over the classes in the label Long et al. 2015
fw_iou       sum r[c] iou[c] / N                         Long et al. 2015 (frequency weighted)
kappa        (po - pe) / (1 - pe), po = accuracy, pe = sum r[c] p[c] / N^2     Cohen 1960

0 / 0 is undefined, never 0 or 1: a class absent from label and prediction has no iou and no dice, and does
not enter a mean. All scores lie between 0 and 1, kappa between -1 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

CLASS_SCORES: Final = ("iou", "dice", "precision", "recall")
OVERALL_SCORES: Final = ("miou", "mdice", "accuracy", "mean_accuracy", "fw_iou", "kappa")


@dataclass(frozen=True, slots=True)
class ScoreArrays:
    """Scores of S matrices: float64 (S, C) by class and (S,) overall, NaN where undefined."""

    iou: Array
    dice: Array
    precision: Array
    recall: Array
    miou: Array
    mdice: Array
    accuracy: Array
    mean_accuracy: Array
    fw_iou: Array
    kappa: Array


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one confusion matrix; None where undefined.

    ``label_px`` counts all pixels with a label, also where nothing was predicted; ``compared_px`` those
    behind the scores. Their difference is what the scores do not see.
    """

    iou: tuple[float | None, ...]
    dice: tuple[float | None, ...]
    precision: tuple[float | None, ...]
    recall: tuple[float | None, ...]
    support_px: tuple[int, ...]
    """Compared pixels of each class in the label."""
    predicted_px: tuple[int, ...]
    """Compared pixels of each class in the prediction."""
    miou: float | None
    mdice: float | None
    accuracy: float | None
    mean_accuracy: float | None
    fw_iou: float | None
    kappa: float | None
    label_px: int
    compared_px: int

    @classmethod
    def from_confusion(cls, counts: Array, label_px: int | None = None) -> Scores:
        """Score one (C, C) int64 matrix; ``label_px`` defaults to the compared pixels."""
        compared_px = int(counts.sum())
        arrays = score_arrays(counts[np.newaxis])
        by_class = {name: tuple(optional(getattr(arrays, name)[0])) for name in CLASS_SCORES}
        overall = {name: optional(getattr(arrays, name))[0] for name in OVERALL_SCORES}
        return cls(
            iou=by_class["iou"],
            dice=by_class["dice"],
            precision=by_class["precision"],
            recall=by_class["recall"],
            support_px=tuple(counts.sum(axis=1).tolist()),
            predicted_px=tuple(counts.sum(axis=0).tolist()),
            miou=overall["miou"],
            mdice=overall["mdice"],
            accuracy=overall["accuracy"],
            mean_accuracy=overall["mean_accuracy"],
            fw_iou=overall["fw_iou"],
            kappa=overall["kappa"],
            label_px=compared_px if label_px is None else label_px,
            compared_px=compared_px,
        )

    def overall(self) -> dict[str, float | None]:
        """Return the scores that are not by class, by name."""
        return {name: getattr(self, name) for name in OVERALL_SCORES}


def score_arrays(counts: Array) -> ScoreArrays:
    """Score (S, C, C) int64 matrices at once."""
    hits = np.diagonal(counts, axis1=1, axis2=2)
    label, predicted = counts.sum(axis=2), counts.sum(axis=1)
    total = label.sum(axis=1)
    iou = _ratio(hits, label + predicted - hits)
    dice = _ratio(2 * hits, label + predicted)
    recall = _ratio(hits, label)
    accuracy = _ratio(hits.sum(axis=1), total)
    # in shares of N: products of counts would pass int64 for an archive of 3e9 pixels
    chance = (_ratio(label, total[:, np.newaxis]) * _ratio(predicted, total[:, np.newaxis])).sum(axis=1)
    return ScoreArrays(
        iou=iou,
        dice=dice,
        precision=_ratio(hits, predicted),
        recall=recall,
        miou=_mean_defined(iou),
        mdice=_mean_defined(dice),
        accuracy=accuracy,
        mean_accuracy=_mean_defined(recall),
        fw_iou=_ratio((label * np.nan_to_num(iou)).sum(axis=1), total),
        kappa=_ratio(accuracy - chance, np.maximum(1.0 - chance, 0.0)),
    )


def optional(values: Array) -> list[float | None]:
    """Return a float array as a list, None for NaN."""
    return [None if value != value else value for value in values.tolist()]


def _ratio(part: Array, whole: Array) -> Array:
    out = np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan)
    np.divide(part, whole, out=out, where=whole != 0)
    return out


def _mean_defined(values: Array) -> Array:
    """Mean over the last axis of what is not NaN; NaN where nothing is left."""
    return _ratio(np.nan_to_num(values).sum(axis=-1), np.count_nonzero(~np.isnan(values), axis=-1))
