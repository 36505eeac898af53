"""What the workers of one training tell each other; with one worker nothing is sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Comm:
    """Worker ``rank`` of ``world``.

    Where world > 1 the process group of torch.distributed is ready, with gloo for tensors on the CPU.
    """

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in ``tensor`` itself; it must not require a gradient."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every worker the values of worker 0, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather_texts(self, texts: list[str]) -> list[str]:
        """The texts of all workers, in the order of their ranks."""
        if self.world == 1:
            return texts
        gathered: list[list[str]] = [[] for _ in range(self.world)]
        dist.all_gather_object(gathered, texts)
        return [text for part in gathered for text in part]

    def barrier(self) -> None:
        """Wait for all workers."""
        self.all_reduce(torch.zeros(1))
