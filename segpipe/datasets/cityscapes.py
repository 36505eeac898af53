"""Cityscapes: leftImg8bit and gtFine; 34 label ids become the 19 train ids, the others are ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from segpipe.config.card import IGNORE, ClassInfo
from segpipe.config.prepare import PrepareConfig
from segpipe.datasets.images import read_pair
from segpipe.datasets.layout import ReadsAlone, Sample, SampleRef, refuse_missing
from segpipe.datasets.tree import Tree, list_tree
from segpipe.errors import InputError

TRAIN_CLASSES: Final = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
"""Label id, name and colour of each train id, in train id order (the authors' label table)."""

NUM_IDS: Final = 34
_SPLITS: Final = ("train", "val")
_IMAGE: Final = "_leftImg8bit.png"
_LABEL: Final = "_gtFine_labelIds.png"


def label_map() -> dict[str, int]:
    """Label id 0..33 as text to train id, 255 for those without."""
    train_ids = {label_id: index for index, (label_id, _, _) in enumerate(TRAIN_CLASSES)}
    return {str(label_id): train_ids.get(label_id, IGNORE) for label_id in range(NUM_IDS)}


class CityscapesLayout(ReadsAlone):
    """The splits train and val; the labels of test are not public."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self.classes = tuple(ClassInfo(name=name, color=color) for _, name, color in TRAIN_CLASSES)
        self._label_map = label_map()

    def listing(self) -> Iterator[SampleRef]:
        """Samples by name; the id is city/name."""
        for root in self._config.sources:
            tree = list_tree(root)
            found = sorted(
                key
                for key in tree.objects
                if key.endswith(_IMAGE)
                and key.startswith(tuple(f"leftImg8bit/{split}/" for split in _SPLITS))
            )
            if not found:
                raise InputError(
                    f"there is no leftImg8bit/train/*/*{_IMAGE} (nor val)", root, "Name the root folder."
                )
            yield from self._samples(tree, found)

    def read(self, ref: SampleRef) -> Sample:
        """Label ids become train ids."""
        return read_pair(ref, self.classes, self._label_map, self._config.limits)

    def _samples(self, tree: Tree, images: list[str]) -> Iterator[SampleRef]:
        refs, no_label = [], []
        for image in images:
            _, split, below = image.split("/", 2)
            sample_id = below.removesuffix(_IMAGE)
            label = f"gtFine/{split}/{sample_id}{_LABEL}"
            if label not in tree.objects:
                no_label.append(image)
                continue
            size_bytes = tree.version(image).size_bytes
            refs.append(SampleRef(sample_id, split, tree.pair(sample_id, image, label), size_bytes))
        refuse_missing(no_label, "label (gtFine labelIds)", tree.root)
        yield from refs
