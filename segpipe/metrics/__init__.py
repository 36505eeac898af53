"""Confusion counts and the scores made of them: numpy, and numba where a matrix is counted."""

from segpipe.metrics.counts import class_counts, confusion, from_pairs, to_pairs
from segpipe.metrics.scores import ScoreArrays, Scores, score_arrays

__all__ = [
    "ScoreArrays",
    "Scores",
    "class_counts",
    "confusion",
    "from_pairs",
    "score_arrays",
    "to_pairs",
]
