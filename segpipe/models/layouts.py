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
"""Per family the modules that have one output a class."""

COUNTER: Final = "num_batches_tracked"
"""A batch norm's count of batches: older files lack it, and only running averages without momentum use it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which a file may hold a family's weights."""

    kind: str
    """What such a file is, in words."""
    takes: str = ""
    """Prefix of the names that are taken from the file."""
    puts: str = ""
    """Prefix that takes its place, and that of all our names which the file must hold."""
    drops: tuple[str, ...] = ()
    """Prefixes of names that are left out."""
    rgb: bool = False
    """The file's three bands are red, green, blue."""


@dataclass(frozen=True, slots=True)
class Match:
    """A file's weights under our names."""

    layout: Layout
    state: dict[str, Tensor]
    dropped: tuple[str, ...]
    """Prefixes that were left out."""
    problems: tuple[str, ...]
    """Names that are missing or that nothing is known of; empty = the layout fits."""


SAME_NETWORK: Final = Layout("state dict of the same network")

_HEADS: Final = ("classifier.", "aux_classifier.")
_RESNET: Final = (
    Layout(
        "ResNet-50 backbone of a torchvision segmentation network with another head",
        "backbone.",
        "backbone.",
        _HEADS,
        True,
    ),
    Layout("torchvision ResNet-50 backbone", "", "backbone.", ("fc.",), True),
)

LAYOUTS: Final[dict[str, tuple[Layout, ...]]] = {
    "unet": (SAME_NETWORK,),
    "pixel": (SAME_NETWORK,),
    "unet_mobilenet_v2": (
        SAME_NETWORK,
        Layout(
            "torchvision MobileNetV2 backbone",
            "features.",
            "features.",
            ("classifier.", "features.17.", "features.18."),
            True,
        ),
    ),
    "fcn_resnet50": (Layout("torchvision FCN ResNet-50", drops=("aux_classifier.",), rgb=True), *_RESNET),
    "deeplabv3_resnet50": (
        Layout("torchvision DeepLabV3 ResNet-50", drops=("aux_classifier.",), rgb=True),
        *_RESNET,
    ),
    "lraspp_mobilenet_v3_large": (
        Layout("torchvision LR-ASPP MobileNetV3-Large", rgb=True),
        Layout(
            "MobileNetV3-Large backbone of a torchvision segmentation network with another head",
            "backbone.",
            "backbone.",
            _HEADS,
            True,
        ),
        Layout("torchvision MobileNetV3-Large backbone", "features.", "backbone.", ("classifier.",), True),
    ),
}
"""Per family the layouts in the order in which they are tried."""


def match(layout: Layout, state: Mapping[str, Tensor], wanted: Iterable[str]) -> Match:
    """``state`` under our names by one layout; ``wanted``: all names of our network."""
    wanted = set(wanted)
    taken: dict[str, Tensor] = {}
    dropped: dict[str, None] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        prefix = next((prefix for prefix in layout.drops if name.startswith(prefix)), None)
        ours = layout.puts + name.removeprefix(layout.takes)
        if prefix is not None:
            dropped[prefix.rstrip(".")] = None
        elif name.startswith(layout.takes) and ours in wanted:
            taken[ours] = tensor
        else:
            unknown.append(f"unexpected {name}")
    missing = [
        f"missing {name}"
        for name in sorted(wanted)
        if name.startswith(layout.puts) and name not in taken and not name.endswith(COUNTER)
    ]
    return Match(layout, taken, tuple(dropped), (*missing, *unknown))


def best_match(layouts: Iterable[Layout], state: Mapping[str, Tensor], wanted: Iterable[str]) -> Match:
    """The first layout that fits, else the one that places most names, with its problems."""
    names = set(wanted)
    matches = [match(layout, state, names) for layout in layouts]
    return next((m for m in matches if not m.problems), max(matches, key=lambda m: len(m.state)))
