"""Pascal VOC: ImageSets/Segmentation lists, JPEGImages, and SegmentationClass as palette PNG."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Final

from segpipe.config.card import ClassInfo
from segpipe.config.prepare import PrepareConfig
from segpipe.datasets.images import read_pair
from segpipe.datasets.layout import ReadsAlone, Sample, SampleRef, refuse_missing
from segpipe.datasets.tree import Tree, list_tree
from segpipe.errors import InputError

_NAMES: Final = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_SPLITS: Final = ("train", "val")
_LISTS: Final = "ImageSets/Segmentation/"


def voc_colour(index: int) -> tuple[int, int, int]:
    """Colour of a class: bits 0, 3, 6 of the index are red's from the top, 1, 4, 7 green's, 2, 5 blue's.

    The rule of the devkit's ``VOClabelcolormap``.
    """
    colour = [0, 0, 0]
    for bit in range(8):
        colour[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return colour[0], colour[1], colour[2]


class VocLayout(ReadsAlone):
    """One or more years below the root. trainval is train and val; the labels of test are not public."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self.classes = tuple(
            ClassInfo(name=name, color=voc_colour(index)) for index, name in enumerate(_NAMES)
        )

    def listing(self) -> Iterator[SampleRef]:
        """Samples of all lists; an id is the image's, below its year's folder where there is one."""
        for root in self._config.sources:
            tree = list_tree(root)
            lists = [
                (key.removesuffix(f"{_LISTS}{split}.txt"), split)
                for key in sorted(tree.objects)
                for split in _SPLITS
                if key == f"{_LISTS}{split}.txt" or key.endswith(f"/{_LISTS}{split}.txt")
            ]
            if not lists:
                raise InputError(
                    f"there is no {_LISTS}train.txt or val.txt", root, "Name VOCdevkit or a year's folder."
                )
            for folder, split in lists:
                yield from self._samples(tree, folder, split)

    def read(self, ref: SampleRef) -> Sample:
        """Indices of the palette are the classes; 255 (the border) is ignored."""
        return read_pair(ref, self.classes, {}, self._config.limits)

    def _samples(self, tree: Tree, folder: str, split: str) -> Iterator[SampleRef]:
        refs, no_image, no_label = [], [], []
        key = f"{folder}{_LISTS}{split}.txt"
        for name in tree.read_text(key).split():
            image, label = f"{folder}JPEGImages/{name}.jpg", f"{folder}SegmentationClass/{name}.png"
            if image not in tree.objects:
                no_image.append(name)
            elif label not in tree.objects:
                no_label.append(name)
            else:
                sample_id = posixpath.join(folder, name)
                size_bytes = tree.version(image).size_bytes
                refs.append(SampleRef(sample_id, split, tree.pair(sample_id, image, label), size_bytes))
        refuse_missing(no_image, "image", f"{tree.root}/{key}")
        refuse_missing(no_label, "label", f"{tree.root}/{key}")
        yield from refs
