"""Parameters sharded over GPUs (FSDP2), and their whole values for checkpoints and validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_OWN_SHARD_NUMEL = 1 << 20


def shard(model: nn.Module) -> None:
    """Shard a network in place: each large part by itself, so that few whole parameters are held at once."""
    for part in _parts(model):
        if sum(p.numel() for p in part.parameters()) >= _OWN_SHARD_NUMEL:
            fully_shard(part)
    fully_shard(model)


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """What is surely called: sharding works where a module is called, and some walk through a container."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from _parts(child)
        else:
            yield child


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with shards brought together; every worker must call this, in the same order."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()
    }


def scattered(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors cut as those of ``like`` are; names that it does not hold go by the part after "/"."""
    return {name: _as(value, like.get(name.partition("/")[2] or name)) for name, value in tensors.items()}


def _as(value: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
