"""Checkpoints: one safetensors object each, so that one is there whole or not at all. Nothing is pickled."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from segpipe.errors import InputError, StorageFull, first_line
from segpipe.models.header import parse_header
from segpipe.storage import Storage

PREFIX: Final = "checkpoints/"
_META_KEY: Final = "segpipe.training"
_NAME = re.compile(r"^checkpoints/step-(\d{8,})/state\.safetensors$")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands after ``step`` optimiser steps."""

    step: int
    recipe_key: str
    best_step: int | None = None
    """Step of the best score so far; its checkpoint is kept."""
    best_metric: float | None = None
    without_gain: int = 0
    """Validations since the best one."""
    stopped: bool = False
    """It ended early: no better score for as many validations as the config allows."""
    loss_sum: float = 0.0
    """Sum of the losses since the last validation, and how many there are."""
    loss_steps: int = 0
    scaler: float | None = None
    """Loss scale of fp16."""
    workers: int = 1
    """Workers of the last step."""
    start_lines: list[str] = field(default_factory=list)
    """What the pretrained start was, in words."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a training goes on from: tensors ``model/...``, ``average/...`` and ``optimizer/...``."""

    progress: Progress
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors below ``name/``, without it."""
        start = len(name) + 1
        return {key[start:]: value for key, value in self.tensors.items() if key.startswith(f"{name}/")}


def checkpoint_key(step: int) -> str:
    return f"{PREFIX}step-{step:08d}/state.safetensors"


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """The object's bytes. Tensors may lie on any device."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    meta = json.dumps(asdict(checkpoint.progress), sort_keys=True)
    data: bytes = safetensors.torch.save(tensors, {_META_KEY: meta})
    return data


def put_checkpoint(storage: Storage, step: int, data: bytes) -> None:
    """Write a checkpoint; one of that step that is there already stays."""
    key = checkpoint_key(step)
    try:
        storage.put_if_absent(key, data)
    except StorageFull as error:
        raise StorageFull(
            f"no space for the checkpoint of step {step}",
            storage.uri(key),
            "Make room; the same command then goes on from the newest checkpoint.",
        ) from error


def list_checkpoints(storage: Storage) -> list[int]:
    """Steps of all checkpoints, in order."""
    steps = []
    for page in storage.list(PREFIX):
        steps += [int(match[1]) for info in page if (match := _NAME.match(info.key))]
    return sorted(steps)


def read_checkpoint(storage: Storage, step: int, recipe_key: str) -> Checkpoint:
    """Read one checkpoint. Raises `InputError` for a damaged one, or one of another training."""
    key = checkpoint_key(step)
    data, where = storage.read(key), storage.uri(key)
    fix = "Delete it: the training then goes on from the one before."
    try:
        metadata = parse_header(data, where)["__metadata__"]
        progress = Progress(**json.loads(metadata[_META_KEY]))
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"the checkpoint is damaged ({first_line(error)})", where, fix) from error
    if progress.recipe_key != recipe_key:
        raise InputError("the checkpoint belongs to another training", where, fix)
    return Checkpoint(progress, tensors)


def prune(storage: Storage, keep_last: int, keep: Sequence[int | None]) -> None:
    """Delete all checkpoints but the newest ``keep_last`` and those of the steps ``keep``."""
    steps = list_checkpoints(storage)
    for step in steps[:-keep_last]:
        if step not in keep:
            storage.delete(checkpoint_key(step))
