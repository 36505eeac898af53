"""COCO-Stuff's maps: one PNG an image, of which each value stands for a category."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np

from segpipe.config.card import IGNORE, ClassInfo
from segpipe.config.model import InputConfig
from segpipe.config.prepare import PrepareConfig
from segpipe.datasets.images import DecodedImage, decode_image, read_encoded, whole_sample
from segpipe.datasets.layout import ReadsAlone, Sample, SampleRef, refuse_missing
from segpipe.datasets.tree import Tree
from segpipe.datasets.voc import voc_colour
from segpipe.errors import InputError
from segpipe.geometry.grid import Window
from segpipe.rasters.labels import open_label

_THINGS: Final = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
    zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis,
    snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
    bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, mirror,
    dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone,
    microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear,
    hair drier, toothbrush, hair brush
"""
_STUFF: Final = """
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet,
    ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
    door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog,
    food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat,
    metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
    plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea,
    shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table,
    tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
    wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""

_NEVER: Final = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
"""Thing categories that no image of COCO shows annotated (README of COCO-Stuff, "Labels")."""
_OTHER_ID: Final = 183
_FIRST_STUFF_ID: Final = 92
_PHOTOGRAPHS: Final = (".jpg", ".jpeg")
_MAP_FOLDERS: Final = {
    "stuff_thing": re.compile(r"(?:.*/)?stuffthingmaps[^/]*/([a-z]+)\d*"),
    "stuff": re.compile(r"(?:.*/)?stuff_([a-z]+)\d*_pixelmaps"),
}


def map_categories(kind: str) -> dict[int, tuple[int, str]]:
    """Pixel value -> category id and name of COCO-Stuff's maps.

    ``stuff_thing`` (stuffthingmaps_*): the category id less 1, 80 things and 91 stuff classes; 255 is not
    labelled. ``stuff`` (stuff_*_pixelmaps): the category id, 91 stuff classes and "other" for all things; 0
    is not labelled. Ids and names: labels.txt of COCO-Stuff.
    """
    names = [" ".join(name.split()) for name in f"{_THINGS},{_STUFF}".split(",")]
    ids = dict(enumerate(names, 1))
    if kind == "stuff":
        return {i: (i, ids[i]) for i in range(_FIRST_STUFF_ID, len(ids) + 1)} | {
            _OTHER_ID: (_OTHER_ID, "other")
        }
    return {i - 1: (i, name) for i, name in ids.items() if i not in _NEVER}


def find_map_folders(tree: Tree) -> dict[str, str]:
    """Split -> folder of maps by COCO-Stuff's own names; empty where there are none."""
    folders = sorted({posixpath.dirname(key) for key in tree.objects if key.endswith(".png")})
    for pattern in _MAP_FOLDERS.values():
        found = {match[1]: folder for folder in folders if (match := pattern.fullmatch(folder))}
        if found:
            return found
    return {}


def as_colour(image: DecodedImage) -> DecodedImage:
    """A grey image as RGB: a few of COCO's photographs are grey."""
    if len(image.pixels) != 1:
        return image
    return replace(image, pixels=np.repeat(image.pixels, 3, axis=0), plain=False)


class CocoMapsLayout(ReadsAlone):
    """A folder of maps a split; each has the name of its photograph, which lies anywhere below the root."""

    def __init__(self, config: PrepareConfig, tree: Tree, folders: dict[str, str]) -> None:
        self._config = config
        self._tree: Tree | None = tree
        self._folders = {split: folder.strip("/") for split, folder in folders.items()}
        categories = map_categories(self._kind(tree.root))
        self._label_map = {str(value): index for index, value in enumerate(categories)}
        if _OTHER_ID in categories:
            self._label_map["0"] = IGNORE
        self.classes = tuple(
            ClassInfo(name=name, color=voc_colour(number)) for number, name in categories.values()
        )

    def __getstate__(self) -> dict[str, Any]:
        """Workers need no listing: each sample carries its own files."""
        return {**self.__dict__, "_tree": None}

    def listing(self) -> Iterator[SampleRef]:
        """Samples in the order of the maps; the id is the file's name without suffix."""
        tree = self._tree
        assert tree is not None
        maps = {split: _by_stem(tree, folder, (".png",)) for split, folder in self._folders.items()}
        photographs: dict[str, list[str]] = defaultdict(list)
        for key in tree.objects:
            if key.lower().endswith(_PHOTOGRAPHS):
                photographs[_stem(key)].append(key)
        folders, no_image, refs = set(), [], []
        for split, keys in maps.items():
            for name, key in keys.items():
                image = _nearest(photographs[name], split, tree.root)
                if image is None:
                    no_image.append(key)
                    continue
                folders.add(posixpath.dirname(image))
                size_bytes = tree.version(image).size_bytes
                refs.append(SampleRef(name, split, tree.pair(name, image, key), size_bytes))
        mapped = {name for keys in maps.values() for name in keys}
        no_map = [
            key
            for folder in sorted(folders)
            for name, key in _by_stem(tree, folder, _PHOTOGRAPHS).items()
            if name not in mapped
        ]
        refuse_missing(no_image, "image", tree.root)
        refuse_missing(no_map, "map", tree.root)
        yield from refs

    def read(self, ref: SampleRef) -> Sample:
        """Pixels that are not labelled become 255. Raises `SceneError`, also for a value of no category."""
        data = read_encoded(ref.scene)
        image = as_colour(decode_image(data, ref.scene.where, self._config.limits))
        height, width = image.pixels.shape[1:]
        wanted = InputConfig(label_map=self._label_map, limits=self._config.limits)
        with open_label(ref.scene, height, width, self.classes, wanted, image.located) as reader:
            label = reader.read(Window(0, 0, height, width))
        return whole_sample(data, image, label)

    def _kind(self, root: str) -> str:
        """What the values mean: as the config says, else by the names of all folders."""
        asked = self._config.coco.map_values
        kinds = {_kind_of(folder) if asked == "auto" else asked for folder in self._folders.values()}
        if len(kinds) == 1 and (kind := kinds.pop()) is not None:
            return kind
        raise InputError(
            f"the names {', '.join(self._folders.values())} do not say what the maps' values mean",
            root,
            "Set coco.map_values: stuff_thing (id - 1) or stuff (id).",
        )


def _kind_of(folder: str) -> str | None:
    """By the innermost part that says it: stuffthingmaps... or ..._pixelmaps."""
    for part in reversed(folder.split("/")):
        if part.startswith("stuffthingmaps"):
            return "stuff_thing"
        if part.endswith("_pixelmaps"):
            return "stuff"
    return None


def _stem(key: str) -> str:
    return posixpath.splitext(posixpath.basename(key))[0]


def _by_stem(tree: Tree, folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Name without suffix -> key of the files right below a folder, sorted; `InputError` for none."""
    keys = sorted(k for k in tree.objects if posixpath.dirname(k) == folder and k.lower().endswith(suffixes))
    if not keys:
        raise InputError(f"there is no map in {folder}", tree.root, "Correct coco.maps.")
    return {_stem(key): key for key in keys}


def _nearest(keys: list[str], split: str, root: str) -> str | None:
    """The photograph of a map: the one in a folder called as the split, else the only one of its name."""
    own = [key for key in keys if posixpath.basename(posixpath.dirname(key)).rstrip("0123456789") == split]
    found = own or keys
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]} have one name", root, "Name a smaller root.")
    return found[0] if found else None
