"""The model file: weights and card in one safetensors file. Loading builds the family and fills it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segpipe.config.card import ModelCard
from segpipe.errors import ConfigError, InputError
from segpipe.models.families import build_of
from segpipe.models.header import CARD_KEY, FORMAT, FORMAT_KEY, LENGTH_BYTES, read_card_bytes
from segpipe.storage import read_uri
from segpipe.wording import few


def save_model(path: str | Path, model: nn.Module, card: ModelCard) -> None:
    """Write a local model file, whole or not at all. Same weights and card give the same bytes.

    Raises:
        InputError: the weights are not those of the card's family, bands and classes.
    """
    data = encode_model(model, card, str(path))
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def encode_model(model: nn.Module, card: ModelCard, where: str = "model file") -> bytes:
    """The bytes of a model file. Same weights and card give the same bytes; ``where`` names it in errors.

    Raises:
        InputError: the weights are not those of the card's family, bands and classes.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _check_weights(empty_model(card, where), weights, where)
    return _encode(weights, card)


def load_model(uri: str) -> tuple[nn.Module, ModelCard]:
    """The network with its weights, float32, in evaluation mode on the CPU, and its card.

    Raises:
        InputError: not a model file of segpipe, a damaged one, or weights that do not fit the card.
        StorageError: it cannot be fetched.
    """
    return load_model_bytes(read_uri(uri), uri)


def load_model_bytes(data: bytes, where: str = "model file") -> tuple[nn.Module, ModelCard]:
    """As ``load_model``, from a whole file in memory. ``where`` names it in errors."""
    card = read_card_bytes(data, where)
    try:
        weights = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"the model file is damaged: {error}", where, "Fetch or write the file again."
        ) from error
    model = empty_model(card, where)
    _check_weights(model, weights, where)
    # Copied: the tensors that were read may be views of the file's bytes.
    wanted = model.state_dict()
    exact = {name: tensor.to(wanted[name].dtype, copy=True) for name, tensor in weights.items()}
    model.load_state_dict(exact, assign=True)
    return model.eval(), card


def empty_model(card: ModelCard, where: str) -> nn.Module:
    """The card's network without storage for weights: quick, and no random number is drawn.

    Raises `InputError` for a card whose network cannot be built.
    """
    try:
        with torch.device("meta"), _NoStart():
            return build_of(card)
    except ConfigError as error:
        raise InputError(
            f"the model card asks for what cannot be built: {error.what}", where, error.fix
        ) from error


class _NoStart(TorchFunctionMode):
    """Leaves out the random start of weights: on tensors without storage it would import torch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _RANDOM_STARTS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


_RANDOM_STARTS: Final = frozenset((Tensor.normal_, Tensor.uniform_, Tensor.erfinv_))


def _check_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in wanted]
    for name, tensor in weights.items():
        if name not in wanted:
            continue
        if tensor.shape != wanted[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}")
        elif tensor.is_floating_point() != wanted[name].is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, not {wanted[name].dtype}")
    if problems:
        fix = "Write the file again with the card of the network that was trained."
        raise InputError(f"the weights do not fit the model card: {few(problems, 3, '; ')}", where, fix)


def _encode(weights: dict[str, Tensor], card: ModelCard) -> bytes:
    # safetensors writes several metadata entries in a random order, so they are put in here, sorted.
    plain = safetensors.torch.save(weights)
    body_start = LENGTH_BYTES + int.from_bytes(plain[:LENGTH_BYTES], "little")
    header: dict[str, Any] = json.loads(plain[LENGTH_BYTES:body_start])
    header["__metadata__"] = {FORMAT_KEY: str(FORMAT), CARD_KEY: card.model_dump_json()}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + plain[body_start:]
