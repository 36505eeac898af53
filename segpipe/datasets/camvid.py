"""CamVid in the 11-class version of Kendall et al.: train.txt, val.txt, test.txt of "image label" pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from segpipe.config.card import ClassInfo
from segpipe.config.prepare import PrepareConfig
from segpipe.datasets.images import read_pair
from segpipe.datasets.layout import ReadsAlone, Sample, SampleRef, refuse_missing
from segpipe.datasets.tree import Tree, list_tree
from segpipe.errors import InputError
from segpipe.rasters.scene_ids import scene_id_of

_CLASSES: Final = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
_VOID: Final = 11
_SPLITS: Final = ("train", "val", "test")


class CamvidLayout(ReadsAlone):
    """Pairs listed in text files; the paths in them may begin with folders that are not there any more."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self.classes = tuple(ClassInfo(name=name, color=color) for name, color in _CLASSES)
        self._label_map = {str(index): index for index in range(_VOID)} | {str(_VOID): 255}

    def listing(self) -> Iterator[SampleRef]:
        """Samples in the order of the lists; the id is the image's path without suffix."""
        for root in self._config.sources:
            tree = list_tree(root)
            found = [split for split in _SPLITS if f"{split}.txt" in tree.objects]
            if not found:
                raise InputError(
                    "there is no train.txt, val.txt or test.txt", root, "Name CamVid's own folder."
                )
            for split in found:
                yield from self._pairs(tree, split)

    def read(self, ref: SampleRef) -> Sample:
        """Void (11) becomes 255."""
        return read_pair(ref, self.classes, self._label_map, self._config.limits)

    def _pairs(self, tree: Tree, split: str) -> Iterator[SampleRef]:
        where = f"{tree.root}/{split}.txt"
        refs, no_image, no_label = [], [], []
        for number, line in enumerate(tree.read_text(f"{split}.txt").splitlines(), 1):
            words = line.split()
            if not words:
                continue
            if len(words) == 1:
                no_label.append(words[0])
                continue
            if len(words) > 2:
                raise InputError(f"line {number} is no pair: {line!r}", where, "Write: IMAGE LABEL.")
            image, label = _found(tree, words[0]), _found(tree, words[1])
            if image is None:
                no_image.append(words[0])
            elif label is None:
                no_label.append(words[0])
            else:
                name = scene_id_of(image)
                size_bytes = tree.version(image).size_bytes
                refs.append(SampleRef(name, split, tree.pair(name, image, label), size_bytes))
        refuse_missing(no_image, "image", where)
        refuse_missing(no_label, "label", where)
        yield from refs


def _found(tree: Tree, path: str) -> str | None:
    """The key of a listed path: the longest end of it that is there."""
    parts = path.strip("/").split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((key for key in ends if key in tree.objects), None)
