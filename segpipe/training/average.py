"""The running average of a network's weights: often better, and steadier, than those of the last step."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from segpipe.errors import InputError
from segpipe.wording import counted, few


class RunningAverage:
    """An exponential moving average of all parameters and floating buffers; other buffers are copied.

    After step s (from 0): average = d * average + (1 - d) * weights with d = min(decay, (1 + s) / (10 + s)),
    so that a short training is not held back by its start.
    """

    model: nn.Module
    """The averaged network, in evaluation mode; its tensors stay the same objects."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of ``model``, of the same build, after optimiser step ``step`` (from 0)."""
        floats, others = _tensors(model)
        own_floats, own_others = _tensors(self.model)
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(own_floats, floats, 1.0 - decay)
        if others:
            torch._foreach_copy_(own_others, others)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by the network's own names; not copies."""
        state: dict[str, Tensor] = self.model.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state in. Raises `InputError` where names or shapes are not the network's."""
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or [
            name for name, value in own.items() if value.shape != state[name].shape
        ]
        if wrong:
            raise InputError(
                f"{counted(len(wrong), 'tensor')} not as in the network: {few(wrong)}",
                "running average",
                "Go on with the network that it was written by.",
            )
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Floating and other tensors of a network, in its own order; of sharded ones this worker's part."""
    tensors = [_local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return floats, [tensor for tensor in tensors if not tensor.is_floating_point()]


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)  # of DTensor, whose import takes long
    return tensor if to_local is None else to_local()
