"""A picture per scene: image, label, mask and errors side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from segpipe.config.card import IGNORE, ClassInfo

Array = np.ndarray[Any, Any]

_PANEL_PX: Final = 480
_GAP_PX: Final = 8
_CAPTION_PX: Final = 26
_BACKGROUND: Final = (255, 255, 255)
_INK: Final = (30, 30, 30)
_FADED: Final = 0.35
_NO_DATA_GREY: Final = 128
# Okabe and Ito's colours, distinct to colour-blind readers as well.
_MISSED: Final = (213, 94, 0)
_INVENTED: Final = (0, 114, 178)
_CONFUSED: Final = (204, 121, 167)


def draw_scene(
    image: Array, label: Array | None, mask: Array, classes: Sequence[ClassInfo], title: str
) -> bytes:
    """Return a PNG with image, label (where there is one), mask and errors side by side.

    Args:
        image: uint8 (3, H, W), red, green, blue.
        label: uint8 (H, W) class indices, 255 = no truth.
        mask: uint8 (H, W) class indices, 255 = no data.
        classes: Their names and colours; class 0 counts as background for the kinds of error.
        title: Line above the panels.
    """
    picture = np.moveaxis(image, 0, -1)
    panels = [("image", picture)]
    if label is not None:
        panels.append(("label", _overlay(picture, label, classes)))
    panels.append(("mask", _overlay(picture, mask, classes)))
    if label is not None:
        panels.append(("errors: orange missed, blue invented", _errors(picture, label, mask)))
    return _compose(panels, title)


def _overlay(picture: Array, classes_of: Array, classes: Sequence[ClassInfo]) -> Array:
    """Lay class colours over the faded picture; class 0 keeps the picture, no data is grey."""
    colours = np.full((256, 3), _NO_DATA_GREY, np.float32)
    for index, info in enumerate(classes):
        colours[index] = info.color
    shown = picture.astype(np.float32)
    over = classes_of != 0
    shown[over] = _FADED * shown[over] + (1 - _FADED) * colours[classes_of[over]]
    shown[classes_of == IGNORE] = _NO_DATA_GREY
    return shown.astype(np.uint8)


def _errors(picture: Array, label: Array, mask: Array) -> Array:
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    shown = (128 + 0.5 * grey).clip(0, 255)
    compared = (label != IGNORE) & (mask != IGNORE)
    wrong = compared & (label != mask)
    shown[wrong & (mask == 0)] = _MISSED
    shown[wrong & (label == 0)] = _INVENTED
    shown[wrong & (label != 0) & (mask != 0)] = _CONFUSED
    shown[~compared] = _NO_DATA_GREY
    return shown.astype(np.uint8)


def _compose(panels: Sequence[tuple[str, Array]], title: str) -> bytes:
    from PIL import Image, ImageDraw, ImageFont

    height, width = panels[0][1].shape[:2]
    scale = _PANEL_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    top = 2 * _CAPTION_PX
    canvas = Image.new(
        "RGB", (len(panels) * (size[0] + _GAP_PX) + _GAP_PX, size[1] + top + _GAP_PX), _BACKGROUND
    )
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=15)
    pen.text((_GAP_PX, 5), title, _INK, font)
    for index, (caption, panel) in enumerate(panels):
        left = _GAP_PX + index * (size[0] + _GAP_PX)
        pen.text((left, _CAPTION_PX + 3), caption, _INK, font)
        canvas.paste(Image.fromarray(panel).resize(size, Image.Resampling.BOX), (left, top))
    sink = io.BytesIO()
    canvas.save(sink, "PNG", optimize=True)
    return sink.getvalue()
