"""How the names in a state dict lie on those of our families. Names decide, shapes never."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

LAST_LAYERS: Final[dict[str, tuple[str, ...]]] = {
    "unet": ("head",),
    "unet_mobilenet_v2": ("head",),
    "pixel": ("head",),
    "fcn_resnet50": ("classifier.4",),
    "deeplabv3_resnet50": ("classifier.4",),
    "lraspp_mobilenet_v3_large": ("classifier.low_classifier", "classifier.high_classifier"),
}
"""Per family the modules that have one output per class."""

COUNTER: Final = "num_batches_tracked"
"""A batch norm's count of batches: older files lack it, and only running averages without momentum use it."""


@dataclass(frozen=True, slots=True)
class KeyMap:
    """One way in which a file may hold a family's weights."""

    kind: str
    """What such a file is, in words."""
    from_prefix: str = ""
    """Prefix of the names that are taken from the file."""
    to_prefix: str = ""
    """Prefix that takes its place, and that of all our names which the file must hold."""
    dropped_prefixes: tuple[str, ...] = ()
    """Prefixes of names that are left out."""
    rgb: bool = False
    """The file's three bands are red, green, blue."""


@dataclass(frozen=True, slots=True)
class Match:
    """A file's weights under our names."""

    key_map: KeyMap
    state: dict[str, Tensor]
    dropped: tuple[str, ...]
    """Prefixes that were left out."""
    problems: tuple[str, ...]
    """Names that are missing or that nothing is known of; empty = the map fits."""


SAME_NETWORK: Final = KeyMap("state dict of the same network")

_HEADS: Final = ("classifier.", "aux_classifier.")
_RESNET: Final = (
    KeyMap(
        "ResNet-50 backbone of a torchvision segmentation network with another head",
        "backbone.",
        "backbone.",
        _HEADS,
        True,
    ),
    KeyMap("torchvision ResNet-50 backbone", "", "backbone.", ("fc.",), True),
)

KEY_MAPS: Final[dict[str, tuple[KeyMap, ...]]] = {
    "unet": (SAME_NETWORK,),
    "pixel": (SAME_NETWORK,),
    "unet_mobilenet_v2": (
        SAME_NETWORK,
        KeyMap(
            "torchvision MobileNetV2 backbone",
            "features.",
            "features.",
            ("classifier.", "features.17.", "features.18."),
            True,
        ),
    ),
    "fcn_resnet50": (
        KeyMap("torchvision FCN ResNet-50", dropped_prefixes=("aux_classifier.",), rgb=True),
        *_RESNET,
    ),
    "deeplabv3_resnet50": (
        KeyMap("torchvision DeepLabV3 ResNet-50", dropped_prefixes=("aux_classifier.",), rgb=True),
        *_RESNET,
    ),
    "lraspp_mobilenet_v3_large": (
        KeyMap("torchvision LR-ASPP MobileNetV3-Large", rgb=True),
        KeyMap(
            "MobileNetV3-Large backbone of a torchvision segmentation network with another head",
            "backbone.",
            "backbone.",
            _HEADS,
            True,
        ),
        KeyMap("torchvision MobileNetV3-Large backbone", "features.", "backbone.", ("classifier.",), True),
    ),
}
"""Per family the maps in the order in which they are tried."""


def match(key_map: KeyMap, state: Mapping[str, Tensor], wanted: Iterable[str]) -> Match:
    """``state`` under our names by one map; ``wanted``: all names of our network."""
    wanted = set(wanted)
    taken: dict[str, Tensor] = {}
    dropped: dict[str, None] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        prefix = next((prefix for prefix in key_map.dropped_prefixes if name.startswith(prefix)), None)
        ours = key_map.to_prefix + name.removeprefix(key_map.from_prefix)
        if prefix is not None:
            dropped[prefix.rstrip(".")] = None
        elif name.startswith(key_map.from_prefix) and ours in wanted:
            taken[ours] = tensor
        else:
            unknown.append(f"unexpected {name}")
    missing = [
        f"missing {name}"
        for name in sorted(wanted)
        if name.startswith(key_map.to_prefix) and name not in taken and not name.endswith(COUNTER)
    ]
    return Match(key_map, taken, tuple(dropped), (*missing, *unknown))


def best_match(key_maps: Iterable[KeyMap], state: Mapping[str, Tensor], wanted: Iterable[str]) -> Match:
    """The first map that fits, else the one that places most names, with its problems."""
    names = set(wanted)
    matches = [match(key_map, state, names) for key_map in key_maps]
    return next((m for m in matches if not m.problems), max(matches, key=lambda m: len(m.state)))
