"""The picture of a scene: each panel shows what it is called after."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from segpipe.config.card import ClassInfo
from segpipe.reports.pictures import draw_scene

CLASSES = (
    ClassInfo(name="ground", color=(0, 0, 0)),
    ClassInfo(name="roof", color=(200, 30, 40)),
    ClassInfo(name="water", color=(10, 20, 250)),
)
PIXELS = np.array(
    [
        [(10, 20, 30), (40, 50, 60), (70, 80, 90), (100, 110, 120)],
        [(250, 240, 230), (220, 210, 200), (190, 180, 170), (160, 150, 140)],
    ],
    np.uint8,
)
LABEL = np.array([[0, 1, 2, 255], [0, 1, 1, 2]], np.uint8)
MASK = np.array([[0, 1, 2, 1], [2, 0, 2, 255]], np.uint8)
GREY = (128, 128, 128)
ORANGE, BLUE, PURPLE = (213, 94, 0), (0, 114, 178), (204, 121, 167)


def panels(picture: bytes, count: int) -> list[Any]:
    """The panels' values at the centre of each scene pixel."""
    drawn = np.asarray(Image.open(io.BytesIO(picture)))
    side = 480 // 4
    assert drawn.shape == (2 * side + 60, 8 + count * 488, 3)
    rows, cols = 52 + side // 2 + side * np.arange(2), side // 2 + side * np.arange(4)
    return [drawn[np.ix_(rows, 8 + 488 * index + cols)].astype(int) for index in range(count)]


def laid_over(classes_of: Any) -> Any:
    """Class colours over the picture, which is all that ground shows; grey where there is no class."""
    expected = PIXELS.astype(float)
    for place, index in np.ndenumerate(classes_of):
        if index == 255:
            expected[place] = GREY
        elif index:
            expected[place] = 0.35 * expected[place] + 0.65 * np.array(CLASSES[index].color)
    return expected


def near(drawn: Any, expected: Any) -> bool:
    return bool(np.abs(drawn - np.asarray(expected)).max() <= 1)


def test_image_label_mask_and_errors_stand_side_by_side() -> None:
    picture = draw_scene(np.moveaxis(PIXELS, -1, 0), LABEL, MASK, CLASSES, "scene")
    image, label, mask, errors = panels(picture, 4)
    assert np.array_equal(image, PIXELS)
    assert near(label, laid_over(LABEL))
    assert near(mask, laid_over(MASK))
    right = [(128 + PIXELS[place].mean() / 2,) * 3 for place in ((0, 0), (0, 1), (0, 2))]
    assert near(errors, [[*right, GREY], [BLUE, ORANGE, PURPLE, GREY]])


def test_a_scene_without_label_has_image_and_mask() -> None:
    picture = draw_scene(np.moveaxis(PIXELS, -1, 0), None, MASK, CLASSES, "scene")
    image, mask = panels(picture, 2)
    assert np.array_equal(image, PIXELS)
    assert near(mask, laid_over(MASK))
