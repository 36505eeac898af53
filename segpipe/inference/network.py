"""A model made ready for inference: folded, in the right layout and number format, logits kept low."""

from __future__ import annotations

import copy
import logging
import threading
from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.nn.utils.fusion import fuse_conv_bn_weights

from segpipe.errors import ConfigError, first_line
from segpipe.inference.device import DTYPES
from segpipe.inference.rewrite import quicken

_log = logging.getLogger(__name__)

_TRACING = threading.Lock()
"""Tracing changes `nn.Module` for the whole process: one engine at a time."""

Forward = Callable[[Tensor], Tensor]


class LowLogits(nn.Module):
    """``model.forward_low`` as a forward, so that it can be traced; ``forward`` for models without it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BNHW: Tensor) -> Tensor:
        low = getattr(self.model, "forward_low", self.model)
        return low(x_BNHW)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Return a copy with batch norms folded into the convolutions before them.

    Of a module that cannot be traced a plain copy, with a warning in the log. It must be in eval mode; the
    one given is not modified.
    """
    # By default fx swaps the functions of `math` while it traces, for all threads: numba then misses them.
    tracer = Tracer(autowrap_modules=())  # type: ignore[arg-type]
    try:
        with _TRACING:
            graph = tracer.trace(module)
        parts = _fold(graph, module)
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr") and node.target not in parts:
                parts[node.target] = copy.deepcopy(attrgetter(node.target)(module))
        return GraphModule(parts, graph).eval()
    except Exception as error:  # fx raises many types: what a model's code does while traced is open
        _log.warning("batch norms are not folded: %s cannot be traced (%s)", type(module).__name__, error)
        return copy.deepcopy(module)


def _fold(graph: Graph, module: nn.Module) -> dict[str, nn.Module]:
    """Take batch norms out of the graph and return, by name, the convolutions that stand for both."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A network that also reads the weights of a convolution by itself needs them as they are.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    folded: dict[str, nn.Module] = {}
    for norm_node in list(graph.nodes):
        conv_node = norm_node.args[0] if norm_node.args else None
        if calls[norm_node.target] != 1 or not isinstance(conv_node, Node) or calls[conv_node.target] != 1:
            continue
        if (name := str(conv_node.target)) in read:
            continue
        norm, conv = module.get_submodule(norm_node.target), module.get_submodule(name)
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        if norm.track_running_stats and len(conv_node.users) == 1:
            folded[name] = _folded(conv, norm)
            norm_node.replace_all_uses_with(conv_node)
            graph.erase_node(norm_node)
    return folded


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a convolution that does both, its weights computed in float64 and rounded once."""
    given = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    exact: list[Any] = [value if value is None else value.detach().double() for value in given]
    weight, bias, mean, variance, scale, shift = exact
    weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    both = copy.copy(conv)
    both._parameters = {"weight": nn.Parameter(weight.float()), "bias": nn.Parameter(bias.float())}
    return both


def prepare_network(model: nn.Module, *, device: str, precision: str, compile_network: bool) -> Forward:
    """Return a function from float32 (B, N, H, W) to low-resolution logits (B, C, h, w) on ``device``.

    The input is channels_last on the device; the caller holds ``torch.inference_mode``. With
    ``compile_network`` torch.compile builds for the first shape that it meets; make the first
    call by `first_call`.
    """
    dtype = DTYPES[precision]
    network = fold_batch_norms(LowLogits(model).eval())
    if torch.device(device).type == "cpu" and dtype == torch.float32 and not compile_network:
        network = quicken(network)
    network = network.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
    if compile_network:
        network = _compiled(network)

    def forward(x_BNHW: Tensor) -> Tensor:
        return network(x_BNHW.to(dtype))

    return forward


def _compiled(network: nn.Module) -> nn.Module:
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torch.compile(network, dynamic=False)  # type: ignore[return-value]


def first_call(
    forward: Forward, x_BNHW: Tensor, *, compile_network: bool, key: str = "inference.compile"
) -> Tensor:
    """Call ``forward`` once; where torch.compile cannot build, say what is missing. ``key`` asked for it.

    Raises:
        ConfigError: torch.compile failed, as it does without a C++ compiler.
    """
    if not compile_network:
        return forward(x_BNHW)
    from torch._dynamo.exc import TorchDynamoException

    try:
        return forward(x_BNHW)
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise  # a full memory and a lost worker are no faults of torch.compile
    except (TorchDynamoException, RuntimeError) as error:
        raise ConfigError(
            f"torch.compile failed: {first_line(error)}",
            key,
            f"Install a C++ compiler (Debian: `apt-get install g++`) or set {key} to false.",
        ) from error
