"""The layouts by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from segpipe.config.prepare import PrepareConfig
from segpipe.datasets.archive import ArchiveLayout
from segpipe.datasets.camvid import CamvidLayout
from segpipe.datasets.cityscapes import CityscapesLayout
from segpipe.datasets.coco import coco_layout
from segpipe.datasets.folder import FolderLayout
from segpipe.datasets.layout import Layout
from segpipe.datasets.voc import VocLayout

LAYOUTS: Final[dict[str, Callable[[PrepareConfig], Layout]]] = {
    "archive": ArchiveLayout,
    "camvid": CamvidLayout,
    "cityscapes": CityscapesLayout,
    "coco": coco_layout,
    "folder": FolderLayout,
    "voc": VocLayout,
}


def make_layout(config: PrepareConfig) -> Layout:
    """The layout that the config names."""
    return LAYOUTS[config.layout](config)
