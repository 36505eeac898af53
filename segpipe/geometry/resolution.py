"""How far a scene is reduced to a wanted ground pixel size. One rule for prediction and for training data."""

from __future__ import annotations

from typing import Final

MAX_DOWNSAMPLE: Final = 16
COARSE_FACTOR: Final = 1.5
"""A scene whose pixels are this much coarser, or finer, than wanted is named: scores suffer there."""


def choose_downsample(wanted_m: float | None, scene_m: float | None) -> int:
    """Return the whole number nearest to wanted / scene pixel size, 1 to 16; 1 where either is unknown."""
    if wanted_m is None or scene_m is None:
        return 1
    return min(MAX_DOWNSAMPLE, max(1, int(wanted_m / scene_m + 0.5)))


def is_coarser(wanted_m: float | None, scene_m: float | None) -> bool | None:
    """Return whether the scene's pixels are too coarse for the wanted size; None where either is unknown."""
    if wanted_m is None or scene_m is None:
        return None
    return scene_m > COARSE_FACTOR * wanted_m


def is_finer(wanted_m: float | None, scene_m: float | None) -> bool | None:
    """Return whether the scene's pixels are too fine for the wanted size; None where either is unknown."""
    if wanted_m is None or scene_m is None:
        return None
    return wanted_m > COARSE_FACTOR * scene_m
