"""The start of a training from weights that are there: our own model files, torchvision's, plain state dicts.

The file's content decides what it is. What it holds is put in under our families' names (``state_keys``);
the first layer is adapted to our bands and the last one to our classes (``adapt``); nothing else may differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from segpipe.config.card import ModelCard
from segpipe.config.train import InitConfig
from segpipe.errors import InputError, ObjectMissing, StorageError
from segpipe.models.adapt import (
    BandPlan,
    ClassPlan,
    adapt_bands,
    adapt_classes,
    plan_bands,
    plan_classes,
)
from segpipe.models.foreign import StateFile, first_keys, looks_like, read_state
from segpipe.models.state_keys import KEY_MAPS, LAST_LAYERS, SAME_NETWORK, Match, best_match, match
from segpipe.storage import read_uri, scheme_of
from segpipe.wording import counted, few

_OWN: Final = "model file of segpipe"
_RGB: Final = ("red", "green", "blue")
_OTHER_FILE: Final = "Give weights of the network that model.family names, or change model.family."


@dataclass(frozen=True, slots=True)
class StartReport:
    """What a network started from."""

    source: str
    """URI of the file."""
    sha256: str
    """Digest of its bytes, 64 hex digits."""
    kind: str
    """What the file is, in words."""
    loaded: int
    """Tensors that were taken from the file, adapted ones too."""
    adapted: tuple[str, ...]
    """One line for each of first and last layer that was not simply copied by name."""
    fresh: tuple[str, ...]
    """Parameters that keep their random start whole."""
    dropped: tuple[str, ...]
    """Parts of the file that were left out."""
    from_file: tuple[str, ...] = field(repr=False)
    """Parameters that came from the file whole."""

    def is_backbone(self, name: str) -> bool:
        """Whether a parameter came from the file whole; a last layer with new classes did not."""
        return name in self.from_file

    def lines(self) -> list[str]:
        """The report for the terminal, in plain words."""
        found = [f"start: {self.kind}, {self.source}", f"  sha256 {self.sha256}"]
        found.append(f"  {counted(self.loaded, 'tensor')} from the file")
        found += [f"  {line}" for line in self.adapted]
        if self.dropped:
            found.append(f"  left out of the file: {', '.join(self.dropped)}")
        if self.fresh:
            count = counted(len(self.fresh), "parameter")
            found.append(f"  random start: {count} of {', '.join(_parts(self.fresh))}")
        return found


@dataclass(slots=True)
class _Filling:
    """The values for our network, gathered before the first is written."""

    values: dict[str, Tensor] = field(default_factory=dict)
    adapted: dict[str, None] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def load_start(model: nn.Module, card: ModelCard, config: InitConfig) -> StartReport:
    """Fill a network that was just built with the weights of ``config.weights`` and tell what was done.

    ``model``: float32 on the CPU, of the card's family, options, bands and classes. It is left as it is when
    an error is raised.

    Raises:
        InputError: no such file, one that cannot be fetched over http, another digest than ``config.sha256``,
            no file of weights, one with code in it, or weights of another network.
        StorageError: the store failed.
        ValueError: ``config.weights`` is None.
    """
    uri = config.weights
    if uri is None:
        raise ValueError("init.weights is not set")
    data = _fetch(uri)
    digest = hashlib.sha256(data).hexdigest()
    if config.sha256 is not None and not digest.startswith(config.sha256):
        what = f"the file's sha256 is {digest}, not {config.sha256}"
        raise InputError(what, uri, "Fetch the file again, or correct init.sha256.")
    file = read_state(data, uri)
    wanted = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    found = _match(file, card, wanted, uri)
    filling = _fill(found, file.card, card, wanted, _first_layer(model))
    problems = filling.problems or ([] if filling.values else list(filling.adapted))
    if problems:
        raise _unfit(file, card, problems, uri)
    with torch.no_grad():
        for name, value in filling.values.items():
            wanted[name].copy_(value)
    names = [name for name, _ in model.named_parameters()]
    return StartReport(
        source=uri,
        sha256=digest,
        kind=_OWN if file.card is not None else found.key_map.kind,
        loaded=len(filling.values),
        adapted=tuple(filling.adapted),
        fresh=tuple(name for name in names if name not in filling.values),
        dropped=found.dropped,
        from_file=tuple(name for name in names if name in filling.values and name not in filling.partial),
    )


def _fetch(uri: str) -> bytes:
    try:
        return read_uri(uri)
    except StorageError as error:
        if scheme_of(uri) in ("http", "https"):
            what = f"the weights to start from cannot be fetched: {error.what}"
            fix = "Fetch the file elsewhere and give its local path as init.weights."
            raise InputError(what, uri, fix) from error
        if isinstance(error, ObjectMissing):
            raise InputError("no such file of weights", uri, "Correct init.weights.") from error
        raise


def _match(file: StateFile, card: ModelCard, wanted: Mapping[str, Tensor], uri: str) -> Match:
    """The file's weights under our names; an ``InputError`` where no key map fits."""
    if file.card is None:
        found = best_match(KEY_MAPS[card.family], file.state, wanted)
    elif file.card.family == card.family:
        found = match(SAME_NETWORK, file.state, wanted)
    else:
        what = f"the weights are of model family {file.card.family}, the network is {card.family}"
        raise InputError(what, uri, f"Set model.family to {file.card.family} or start from other weights.")
    if found.problems:
        raise _unfit(file, card, found.problems, uri)
    return found


def _unfit(file: StateFile, card: ModelCard, problems: Sequence[str], uri: str) -> InputError:
    named = few(problems, 3, "; ")
    if file.card is not None and file.card.options != card.options:
        theirs, ours = file.card.options or "no options", card.options or "no options"
        what = f"the weights of {card.family} with {theirs} do not fit the network with {ours}: {named}"
        return InputError(what, uri, "Set model.options as they are in the file.")
    if file.card is not None:
        return InputError(f"the weights cannot be used: {named}", uri, "Start from other weights.")
    what = (
        f"the weights do not fit {card.family}: {named}. The file begins with {first_keys(file.state)}; "
        f"it looks like {looks_like(file.state)}"
    )
    return InputError(what, uri, _OTHER_FILE)


def _first_layer(model: nn.Module) -> str:
    """The name of the convolution that takes the bands: the first of the network."""
    return next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def _fill(
    found: Match, source: ModelCard | None, card: ModelCard, wanted: Mapping[str, Tensor], first: str
) -> _Filling:
    """Values for our network; nothing is written. ``source``: the file's card."""
    filling = _Filling()
    for name, tensor in found.state.items():
        value, fresh = tensor, wanted[name]
        if value.is_floating_point() != fresh.is_floating_point():
            filling.problems.append(f"{name} is {value.dtype}, not {fresh.dtype}")
            continue
        if name == f"{first}.weight" and value.ndim == fresh.ndim:
            plan = _band_plan(value.shape[1], found, source, card)
            value = adapt_bands(value, plan)
            filling.adapted.update(dict.fromkeys((plan.line,) if plan.line else ()))
        last = name.rpartition(".")[0] in LAST_LAYERS[card.family]
        if value.shape[1 if last else 0 :] != fresh.shape[1 if last else 0 :] or value.ndim != fresh.ndim:
            filling.problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(fresh.shape)}")
        elif last:
            _fill_last(filling, name, value, fresh, _class_plan(value.shape[0], source, card))
        else:
            filling.values[name] = value
    filling.problems += [
        f"{name} holds values that are not finite"
        for name, value in filling.values.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    return filling


def _fill_last(filling: _Filling, name: str, value: Tensor, fresh: Tensor, plan: ClassPlan) -> None:
    if plan.line:
        filling.adapted[plan.line] = None
    if plan.empty:
        return
    filling.values[name] = adapt_classes(value, fresh, plan)
    if not plan.whole:
        filling.partial.add(name)


def _band_plan(bands: int, found: Match, source: ModelCard | None, card: ModelCard) -> BandPlan:
    names: Sequence[str] | None = None
    if source is not None:
        names = source.bands
    elif found.key_map.rgb:
        names = _RGB  # blue, green, red must not get each other's weights
    return plan_bands(bands, names if names is not None and len(names) == bands else None, card.bands)


def _class_plan(classes: int, source: ModelCard | None, card: ModelCard) -> ClassPlan:
    ours = [info.name for info in card.classes]
    theirs = None if source is None else [info.name for info in source.classes]
    return plan_classes(classes, theirs if theirs is not None and len(theirs) == classes else None, ours)


def _parts(names: Sequence[str]) -> list[str]:
    """The top-level parts of parameter names, in order."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))
