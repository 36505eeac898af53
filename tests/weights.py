"""Weights files of every kind, and what a network holds after it started from one."""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.config.train import InitConfig
from segpipe.models.families import build_of
from segpipe.models.file import _NoStart, empty_model
from segpipe.models.pretrained import StartReport, load_start
from segpipe.storage import open_object

RGB = ("red", "green", "blue")


ABC = ("a", "b", "c")


def card_of(
    family: str, bands: tuple[str, ...] = RGB, classes: tuple[str, ...] = ABC, **options: Any
) -> ModelCard:
    if family == "unet" and not options:
        options = {"width": 4, "depth": 2}
    return ModelCard(
        family=family,
        options=options,
        bands=bands,
        mean=(0.0,) * len(bands),
        std=(1.0,) * len(bands),
        classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in classes),
    )


def network_of(card: ModelCard) -> nn.Module:
    if "resnet50" in card.family:  # its random start takes long and no test asks for it
        blank = empty_model(card, "test").to_empty(device="cpu")
        for tensor in blank.state_dict().values():
            tensor.zero_()
        return blank
    return build_of(card)


def random_state(model: nn.Module) -> dict[str, Tensor]:
    """Random values for all names of a network that may have no storage.

    All are views of one small storage, at different places: files of large networks stay small.
    """
    base = torch.rand(60_000, generator=torch.Generator().manual_seed(5))
    state = {}
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.is_floating_point():
            state[name] = base.as_strided(tensor.shape, (13, 5, 3, 1)[: tensor.ndim], 17 * index)
        else:
            state[name] = torch.tensor(7)
    return state


def safe_bytes(state: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in state.items()})


def torchvision_state(name: str, **options: Any) -> dict[str, Tensor]:
    """A stand-in for a published file: torchvision's names and shapes, random values."""
    from torchvision.models import get_model

    with torch.device("meta"), _NoStart():
        model = get_model(name, weights=None, **options)
    return random_state(model)


def segmentation_state(name: str, **options: Any) -> dict[str, Tensor]:
    return torchvision_state(name, weights_backbone=None, **options)


def torch_bytes(content: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink, **options)
    return sink.getvalue()


class Folder:
    """A store in memory that takes bytes and gives the config that starts from them."""

    def __init__(self) -> None:
        self.root = f"memory://{uuid.uuid4().hex}"

    def start(self, data: bytes, name: str = "weights", sha256: str | None = None) -> InitConfig:
        uri = f"{self.root}/{name}"
        storage, key = open_object(uri)
        storage.put(key, data)
        return InitConfig(weights=uri, sha256=sha256)


def started(folder: Folder, data: bytes, card: ModelCard) -> tuple[dict[str, Tensor], StartReport]:
    """The network's values after the start, and the report."""
    torch.manual_seed(3)
    model = network_of(card)
    report = load_start(model, card, folder.start(data))
    return model.state_dict(), report


def untouched(card: ModelCard) -> dict[str, Tensor]:
    """The values that ``started`` begins with."""
    torch.manual_seed(3)
    return network_of(card).state_dict()


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert theirs
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
