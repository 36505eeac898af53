"""COCO: instances (or stuff) as polygons and run lengths, or panoptic PNGs, painted into class masks."""

from __future__ import annotations

import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from segpipe.config.card import IGNORE, MAX_CLASSES, ClassInfo
from segpipe.config.prepare import PrepareConfig
from segpipe.datasets.coco_maps import CocoMapsLayout, as_colour, find_map_folders
from segpipe.datasets.coco_masks import region_mask
from segpipe.datasets.images import DecodedImage, decode_image, read_encoded, whole_sample
from segpipe.datasets.layout import Layout, ReadsAlone, Sample, SampleRef, refuse_missing
from segpipe.datasets.tree import Tree, list_tree
from segpipe.datasets.voc import voc_colour
from segpipe.errors import InputError, SceneError
from segpipe.rasters.driver import faults_as, read_object
from segpipe.rasters.scene import SceneSource
from segpipe.rasters.scene_ids import scene_id_of
from segpipe.storage import join_uri
from segpipe.wording import few

Array = np.ndarray[Any, Any]

_NAMED: Final = re.compile(r"(?:^|.*/)(instances|panoptic)_([a-z]+)\d*\.json")
_BACKGROUND: Final = ("background", "_background_")


def coco_layout(config: PrepareConfig) -> Layout:
    """The layout of annotation files; or that of maps, where they are named, or are all there is."""
    root, *more = config.sources
    if more:
        raise InputError("coco takes one root folder", ", ".join(config.sources), "Prepare one by one.")
    tree = list_tree(root)
    maps = config.coco.maps
    if not maps and not config.coco.annotations and not _found_files(tree):
        maps = find_map_folders(tree)
    return CocoMapsLayout(config, tree, maps) if maps else CocoLayout(config, tree)


class CocoLayout(ReadsAlone):
    """One annotation file a split. Pixels of no region: background (instances), ignored (panoptic, stuff).

    Where instances overlap the smaller one is on top; crowds lie below all others.
    """

    def __init__(self, config: PrepareConfig, tree: Tree) -> None:
        self._config = config
        self._tree = tree
        self._files: list[tuple[str, str, dict[str, Any]]] = []
        for split, key in _annotation_files(tree, config.coco.annotations):
            self._files.append((split, key, _parse(tree, key)))
        self._panoptic = _is_panoptic(self._files[0][2])
        categories = _categories(self._files, self._tree.root)
        self._unlabelled, self._class_of, self.classes = _make_classes(
            categories, background=not self._panoptic and not _is_stuff(self._files[0][1])
        )

    def __getstate__(self) -> dict[str, Any]:
        """Workers need no annotations: each sample carries its own."""
        return {**self.__dict__, "_files": [], "_tree": None}

    def listing(self) -> Iterator[SampleRef]:
        """Images in the order of the files, also those without a region; the id is the file name's."""
        for split, key, tree in self._files:
            regions: dict[Any, list[Any]] = defaultdict(list)
            for item in tree["annotations"]:
                regions[item["image_id"]].append(item)
            yield from self._samples(split, key, tree["images"], regions)

    def read(self, ref: SampleRef) -> Sample:
        """Paint the label; a grey image becomes RGB, as a few of COCO's photographs are grey."""
        data = read_encoded(ref.scene)
        image = as_colour(decode_image(data, ref.scene.where, self._config.limits))
        payload = json.loads(ref.payload)
        height, width = image.pixels.shape[1:]
        if (payload["height"], payload["width"]) != (height, width):
            what = (
                f"annotated as {payload['height']} x {payload['width']} pixels, but it has {height} x {width}"
            )
            raise SceneError("label_size", what, ref.scene.where, "Correct the annotations.")
        try:
            label = self._panoptic_label(ref.scene, image, payload) if self._panoptic else None
            label = self._painted(payload, height, width) if label is None else label
        except (ValueError, KeyError, TypeError, IndexError) as error:
            what = f"its annotations cannot be read ({error})"
            raise SceneError("label_read", what, ref.scene.where, "Correct them.") from None
        return whole_sample(data, image, label)

    def _samples(
        self, split: str, key: str, images: list[dict[str, Any]], regions: dict[Any, list[Any]]
    ) -> Iterator[SampleRef]:
        finder = _Finder(self._tree, key)
        refs, no_image, no_label = [], [], []
        for item in images:
            image = finder.image(item["file_name"])
            found = regions.get(item["id"], [])
            if image is None:
                no_image.append(item["file_name"])
                continue
            label, kept = None, found
            if self._panoptic:
                label = finder.panoptic(found[0]["file_name"]) if len(found) == 1 else None
                if label is None:
                    no_label.append(item["file_name"])
                    continue
                kept = found[0]["segments_info"]
            names = ("id", "category_id", "iscrowd", "area", "segmentation")
            payload = {
                "height": item["height"],
                "width": item["width"],
                "regions": [{name: region[name] for name in names if name in region} for region in kept],
            }
            name = scene_id_of(item["file_name"])
            refs.append(
                SampleRef(
                    name,
                    split,
                    self._tree.pair(name, image, label),
                    self._tree.version(image).size_bytes,
                    payload=json.dumps(payload, separators=(",", ":")),
                )
            )
        where = join_uri(self._tree.root, key)
        refuse_missing(no_image, "image", where)
        refuse_missing(no_label, "panoptic PNG", where)
        yield from refs

    def _painted(self, payload: dict[str, Any], height: int, width: int) -> Array:
        label = np.full((height, width), self._unlabelled, np.uint8)
        order = sorted(
            payload["regions"],
            key=lambda item: (not item.get("iscrowd"), -float(item.get("area", 0)), int(item["id"])),
        )
        for item in order:
            mask = region_mask(item["segmentation"], height, width)
            label[mask] = self._value_of(item)
        return label

    def _panoptic_label(self, scene: SceneSource, image: DecodedImage, payload: dict[str, Any]) -> Array:
        """Segment ids are R + 256 G + 65536 B; 0 is no segment (the panoptic format's definition)."""
        if scene.label_uri is None or scene.label_version is None:
            raise ValueError("no panoptic PNG")
        with faults_as("label_read"):
            data = read_object(scene.label_uri, scene.label_version)
        shown = decode_image(data, scene.label_uri, self._config.limits).pixels
        if shown.shape[1:] != image.pixels.shape[1:] or len(shown) != 3:
            what = f"the panoptic PNG has the shape {shown.shape}, the image {image.pixels.shape}"
            raise SceneError("label_size", what, scene.label_uri, "Correct it.")
        red, green, blue = shown.astype(np.int64)
        ids, places = np.unique(red + 256 * green + 65536 * blue, return_inverse=True)
        values = {int(item["id"]): self._value_of(item) for item in payload["regions"]} | {0: IGNORE}
        if strange := [segment for segment in ids.tolist() if segment not in values]:
            what = f"the segment {strange[0]} is not in segments_info"
            raise SceneError("label_value", what, scene.label_uri, "Correct the annotations.")
        table = np.array([values[segment] for segment in ids.tolist()], np.uint8)
        return table[places].reshape(image.pixels.shape[1:])

    def _value_of(self, item: dict[str, Any]) -> int:
        category = item["category_id"]
        if category not in self._class_of:
            what = f"the category {category} is not listed"
            fix = "List it in categories, or correct the annotation."
            raise SceneError("label_value", what, f"annotation {item.get('id')}", fix)
        rule = self._config.coco.crowd
        ignored = rule == "ignore" or (rule == "auto" and not self._panoptic)
        return IGNORE if item.get("iscrowd") and ignored else self._class_of[category]


class _Finder:
    """Finds the files that an annotation file names, in whatever folder of the tree they lie."""

    def __init__(self, tree: Tree, annotations: str) -> None:
        self._tree = tree
        self._own = annotations.removesuffix(".json")
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for key in tree.objects:
            self._by_name[posixpath.basename(key)].append(key)

    def image(self, name: str) -> str | None:
        return self._find(name, posixpath.dirname(self._own))

    def panoptic(self, name: str) -> str | None:
        """COCO keeps the PNGs in a folder that is called as the JSON file is."""
        return self._find(name, self._own)

    def _find(self, name: str, folder: str) -> str | None:
        for key in (posixpath.join(folder, name), name):
            if key in self._tree.objects:
                return key
        found = [key for key in self._by_name[posixpath.basename(name)] if key.endswith(f"/{name}")]
        if len(found) > 1:
            raise InputError(
                f"{name} lies in several folders: {few(sorted(found))}",
                self._tree.root,
                "Write the folder into the annotations, or name a smaller root.",
            )
        return found[0] if found else None


def _annotation_files(tree: Tree, named: dict[str, str]) -> list[tuple[str, str]]:
    """(split, key) of the annotation files: as named, else instances_SPLIT*.json, else panoptic, else one."""
    if named:
        if absent := [key for key in named.values() if key not in tree.objects]:
            raise InputError(f"there is no {absent[0]}", tree.root, "Correct coco.annotations.")
        return list(named.items())
    if found := _found_files(tree):
        return found
    raise InputError(
        "there is no annotations/instances_SPLIT*.json, panoptic_SPLIT*.json or annotations.json, and no "
        "folder stuffthingmaps*/SPLIT* or stuff_SPLIT*_pixelmaps",
        tree.root,
        'Name the files: --set coco.annotations="{train: FILE}", or the folders: coco.maps.',
    )


def _found_files(tree: Tree) -> list[tuple[str, str]]:
    """(split, key) of the annotation files by COCO's own names."""
    for kind in ("instances", "panoptic"):
        found = [
            (match[2], key)
            for key in sorted(tree.objects)
            if (match := _NAMED.fullmatch(key)) and match[1] == kind
        ]
        if found:
            return found
    return [("train", "annotations.json")] if "annotations.json" in tree.objects else []


def _parse(tree: Tree, key: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(tree.read_text(key))
        if not all(isinstance(content[name], list) for name in ("images", "annotations", "categories")):
            raise ValueError("images, annotations and categories must be lists")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"it is no COCO annotation file ({error})", join_uri(tree.root, key), "Correct coco.annotations."
        ) from None
    return content


def _is_panoptic(content: dict[str, Any]) -> bool:
    return any("segments_info" in item for item in content["annotations"][:1])


def _is_stuff(key: str) -> bool:
    return posixpath.basename(key).startswith("stuff")


def _categories(files: list[tuple[str, str, dict[str, Any]]], root: str) -> list[dict[str, Any]]:
    """The categories by id, which all files must share, as they must be of one kind."""
    first: list[dict[str, Any]] = sorted(files[0][2]["categories"], key=lambda item: int(item["id"]))
    names = {item["id"]: item["name"] for item in first}
    for _, key, content in files[1:]:
        if {item["id"]: item["name"] for item in content["categories"]} != names:
            what = "its categories differ from those of the first file"
            raise InputError(what, join_uri(root, key), "Give all files the same categories.")
        if _is_panoptic(content) != _is_panoptic(files[0][2]):
            what = "one file is panoptic, the other is not"
            raise InputError(what, join_uri(root, key), "Prepare them apart.")
    return first


def _make_classes(
    categories: list[dict[str, Any]], *, background: bool
) -> tuple[int, dict[Any, int], tuple[ClassInfo, ...]]:
    """The class byte of pixels without region, category id -> class, and the classes."""
    own = next((i for i, item in enumerate(categories) if str(item["name"]).lower() in _BACKGROUND), None)
    added = background and own is None
    classes = [ClassInfo(name="background", color=(0, 0, 0))] if added else []
    for item in categories:
        colour = tuple(item["color"]) if "color" in item else voc_colour(len(classes) % 256)
        classes.append(ClassInfo(name=str(item["name"]), color=colour))
    if len(classes) > MAX_CLASSES:
        raise InputError(f"{len(classes)} classes, {MAX_CLASSES} fit", "categories", "Merge some of them.")
    class_of = {item["id"]: index + added for index, item in enumerate(categories)}
    unlabelled = (own or 0) if background else IGNORE
    return unlabelled, class_of, tuple(classes)
