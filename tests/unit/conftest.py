"""Fixtures that several files of unit tests share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from engines import TILE_PX, small_unet
from torch import nn
from weights import Folder

from segpipe.config.card import ModelCard
from segpipe.inference.cpu_path import CpuPath
from segpipe.inference.engine import Engine, EngineConfig
from segpipe.inference.torch_path import TorchPath


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder to build an archive in: every rule holds for files and for objects."""
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def folder() -> Iterator[Folder]:
    made = Folder()
    yield made
    memory = fsspec.filesystem("memory")
    path = "/" + made.root.removeprefix("memory://")
    if memory.exists(path):
        memory.rm(path, recursive=True)


@pytest.fixture
def make_engine() -> Any:
    engines = []

    def make(
        model: nn.Module, card: ModelCard, path: type[CpuPath] | type[TorchPath] | None = None, **more: Any
    ):
        config = EngineConfig(**{"tile_px": TILE_PX, "batch_size": 4, "threads": 1, **more})
        engine = Engine(model, card, config, path=path(model, card, config) if path else None)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def one_thread() -> Any:
    """Small tensors: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return small_unet()
