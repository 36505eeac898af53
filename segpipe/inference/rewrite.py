"""A folded network rewritten for one core of a CPU: the same layers by quicker means, all in float32."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from segpipe.inference.winograd import WinogradConv, suits_winograd

_FEW_OUTPUTS: Final = 32
"""A 1x1 convolution to fewer channels is done as a matrix product over pixels."""


class PointwiseConv(nn.Module):
    """A 1x1 convolution as one matrix product: torch copies small ones to another layout and back."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self._weight_OC = conv.weight.detach().flatten(1).clone()
        self._bias_O = None if conv.bias is None else conv.bias.detach().clone()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, outputs, H, W), channels_last."""
        return F.linear(x_BCHW.permute(0, 2, 3, 1), self._weight_OC, self._bias_O).permute(0, 3, 1, 2)


def quicken(network: nn.Module) -> nn.Module:
    """Rewrite a traced network in place and return it; one that could not be traced is left as it is.

    3x3 convolutions with many channels become `WinogradConv`, which takes in the ReLU behind it and the
    joining of maps before it; the last 1x1 convolution becomes `PointwiseConv`.
    """
    if not isinstance(network, GraphModule):
        return network
    for node in list(network.graph.nodes):
        conv = _module(network, node)
        if not isinstance(conv, nn.Conv2d):
            continue
        if suits_winograd(conv):
            _replace_by_winograd(network, node, conv)
        elif _is_head(node, conv):
            network.set_submodule(str(node.target), PointwiseConv(conv))
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _module(network: GraphModule, node: Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _replace_by_winograd(network: GraphModule, node: Node, conv: nn.Conv2d) -> None:
    follower = next(iter(node.users)) if len(node.users) == 1 else None
    relu = follower is not None and (
        isinstance(_module(network, follower), nn.ReLU) or follower.target in (F.relu, torch.relu)
    )
    network.set_submodule(str(node.target), WinogradConv(conv, relu=relu))
    if relu and follower is not None:
        follower.replace_all_uses_with(node)
        network.graph.erase_node(follower)
    source = node.args[0]
    if isinstance(source, Node) and len(source.users) == 1 and (parts := _joined_channels(source)):
        node.args = parts


def _joined_channels(node: Node) -> tuple[Any, ...]:
    """Return the maps that a node joins along their channels; () if it does something else."""
    if node.target is not torch.cat:
        return ()
    maps = node.args[0] if node.args else node.kwargs.get("tensors", ())
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return tuple(maps) if dim == 1 and isinstance(maps, (tuple, list)) else ()


def _is_head(node: Node, conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
        and conv.groups == 1
        and conv.out_channels < _FEW_OUTPUTS
        and all(user.op == "output" for user in node.users)
    )
