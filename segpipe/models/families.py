"""The network families by name. A new one is a file with a ``build``, a line here, two in ``state_keys``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Final

from segpipe.config.card import ModelCard
from segpipe.errors import ConfigError
from segpipe.models import mobilenet_unet, pixel, torchvision_families, unet
from segpipe.models.blocks import SegmentationModel

FAMILIES: Final[dict[str, Callable[..., SegmentationModel]]] = {
    "unet": unet.build,
    "unet_mobilenet_v2": mobilenet_unet.build,
    "pixel": pixel.build,
    "fcn_resnet50": torchvision_families.build_fcn_resnet50,
    "deeplabv3_resnet50": torchvision_families.build_deeplabv3_resnet50,
    "lraspp_mobilenet_v3_large": torchvision_families.build_lraspp_mobilenet_v3_large,
}


def build(family: str, *, bands: int, classes: int, **options: Any) -> SegmentationModel:
    """A new network of a family, randomly started from torch's global random state, in training mode.

    ``options`` are the keyword arguments of the family's own ``build``, beside ``bands`` and ``classes``.

    Raises:
        ConfigError: no such family or option (the nearest one is named), or a value that cannot be.
    """
    if family not in FAMILIES:
        raise ConfigError(f"no model family {family!r}", fix=_choices(family, list(FAMILIES)))
    parameters = inspect.signature(FAMILIES[family]).parameters
    known = {name: p.default for name, p in parameters.items() if name not in ("bands", "classes")}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"model family {family!r} has no option {name!r}", fix=_choices(name, list(known))
            )
        _check_value(family, name, value, known[name])
    for name, number in (("bands", bands), ("classes", classes)):
        if number < 1:
            raise ConfigError(f"{name} is {number}", fix=f"Give at least 1 for {name}.")
    return FAMILIES[family](bands=bands, classes=classes, **options)


def build_of(card: ModelCard) -> SegmentationModel:
    """A new network of a card's family, options, bands and classes, as ``build`` makes it."""
    return build(card.family, bands=len(card.bands), classes=card.num_classes, **card.options)


def _choices(given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.4)
    if near:
        return f"Did you mean {near[0]!r}? There are: {', '.join(known)}."
    return f"There are: {', '.join(known) or 'none'}."


def _check_value(family: str, name: str, value: Any, default: Any) -> None:
    wanted = (int, float) if isinstance(default, float) else type(default)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ConfigError(
            f"option {name!r} of model family {family!r} is {value!r}",
            fix=f"It takes a number such as {default!r}.",
        )
