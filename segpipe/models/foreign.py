"""Weights out of any file that may hold them, by its content. Nothing is unpickled that could run code."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from segpipe.config.card import ModelCard
from segpipe.errors import InputError
from segpipe.models.header import CARD_KEY, LENGTH_BYTES, parse_header, read_card_bytes
from segpipe.wording import few

_ZIP: Final = b"PK\x03\x04"
_PICKLE: Final = b"\x80"
_STATE_KEYS: Final = ("state_dict", "model", "model_state_dict")
_WRAPPER: Final = "module."  # what DistributedDataParallel puts before each name
_GIVE: Final = "Give a model file of segpipe, a safetensors state dict or a torch state dict (.pth)."
_FETCH: Final = "Fetch or write the file again."
_SAVE_TENSORS: Final = (
    "Load it where you trust it and save the tensors alone: torch.save(model.state_dict(), path)."
)


@dataclass(frozen=True, slots=True)
class StateFile:
    """Weights by name, on the CPU, with a card where the file is one of segpipe's."""

    state: dict[str, Tensor]
    card: ModelCard | None


def read_state(data: bytes, where: str) -> StateFile:
    """The weights of a whole file in memory. ``where`` names it in errors.

    Raises:
        InputError: no file of weights, a damaged one, one with code in it, or tensors of no plain kind.
    """
    card = None
    if data[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{":
        header = parse_header(data, where)
        metadata = header.pop("__metadata__", None)
        if isinstance(metadata, dict) and CARD_KEY in metadata:
            card = read_card_bytes(data, where)
        state = _read_safetensors(data, list(header), where)
    elif data.startswith((_ZIP, _PICKLE)):
        state = _unwrap(_read_torch(data, where), where)
    else:
        raise InputError(_what_it_is(data, where), where, _GIVE)
    if not state:
        raise InputError("the file holds no weights", where, _GIVE)
    _check_tensors(state, where)
    return StateFile(state, card)


def _what_it_is(data: bytes, where: str) -> str:
    """Words for content that holds no weights."""
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "this is a web page, not a file of weights"
    try:
        parse_header(data, where)
    except InputError as error:
        return f"{error.what}; nor is it a torch file" if data else "the file is empty"
    raise AssertionError("a file without a brace at byte 8 has no header")


def _read_safetensors(data: bytes, names: Sequence[str], where: str) -> dict[str, Tensor]:
    """The tensors in the order of ``names``, the header's: the library gives them in any order."""
    try:
        loaded = safetensors.torch.load(data)
        return {name: loaded[name] for name in names}
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"the safetensors file is damaged: {error}", where, _FETCH) from error


def _read_torch(data: bytes, where: str) -> Any:
    """What ``torch.save`` wrote, through torch's reader for tensors and plain containers only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of ends as an error below
            return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # damaged bytes raise errors of any class
        text = str(error)
        if "TorchScript" in text:
            what, fix = "a TorchScript archive is refused: it holds code, not only weights", _SAVE_TENSORS
        elif found := re.search(r"GLOBAL ([\w.]+)", text):
            what = f"this pickle is refused: it asks for {found.group(1)}, and opening it could run code"
            fix = _SAVE_TENSORS
        elif "Weights only load failed" in text:
            what, fix = "a pickle that is no torch file is refused: opening it could run code", _SAVE_TENSORS
        else:
            what, fix = f"no torch file of weights, or a damaged one ({type(error).__name__})", _FETCH
        raise InputError(what, where, fix) from None


def _unwrap(loaded: Any, where: str) -> dict[str, Tensor]:
    """The state dict itself, out of a checkpoint that may hold more."""
    for found in (loaded, *(loaded.get(key) for key in _STATE_KEYS if isinstance(loaded, Mapping))):
        if _is_state(found):
            return _without_wrapper(found)
    holds = type(loaded).__name__
    if isinstance(loaded, Mapping):
        holds = "a dict of " + (", ".join(repr(key) for key in list(loaded)[:5]) or "nothing")
    raise InputError(f"the torch file holds {holds}, not a state dict", where, _GIVE)


def _is_state(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())
    )


def _without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {name: tensor.detach() for name, tensor in state.items()}  # some files hold parameters
    bare = {name.removeprefix(_WRAPPER): tensor for name, tensor in plain.items()}
    return bare if len(bare) == len(plain) else plain


def _check_tensors(state: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = "a quantized" if tensor.is_quantized else "a sparse or empty"
            raise InputError(f"{name} is {kind} tensor", where, "Save plain dense weights.")
        if tensor.is_complex():
            raise InputError(f"{name} holds complex numbers", where, "Save real weights.")


_MARKS: Final[tuple[tuple[Callable[[Mapping[str, Tensor]], bool], str], ...]] = (
    (lambda s: "backbone.layer1.0.conv1.weight" in s, "a torchvision segmentation network on a ResNet"),
    (lambda s: "backbone.0.0.weight" in s, "a torchvision segmentation network on MobileNetV3"),
    (lambda s: "layer3.6.conv3.weight" in s, "a ResNet of more than 50 layers"),
    (lambda s: "layer1.0.conv3.weight" in s, "a ResNet-50 or one of its kind"),
    (lambda s: "layer1.0.conv1.weight" in s, "a ResNet of 18 or 34 layers"),
    (lambda s: "features.1.block.0.0.weight" in s, "a MobileNetV3"),
    (lambda s: "features.1.conv.0.0.weight" in s, "a MobileNetV2"),
    (lambda s: "downs.0.0.0.weight" in s, "segpipe's unet"),
    (lambda s: "ups.0.convs.0.0.weight" in s, "segpipe's unet_mobilenet_v2"),
    (lambda s: "hidden.0.weight" in s and "head.weight" in s, "segpipe's pixel classifier"),
    (lambda s: any("patch_embed" in name for name in s), "a vision transformer"),
    (lambda s: any(name.startswith("encoder.") for name in s), "an encoder and decoder of another library"),
)


def looks_like(state: Mapping[str, Tensor]) -> str:
    """Words for the network that a state dict may be of, from its names."""
    return next((words for mark, words in _MARKS if mark(state)), "no network that is known here")


def first_keys(state: Mapping[str, Tensor]) -> str:
    """The first three names with their shapes."""
    shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:3]]
    return few(shown, 3, total=len(state))
