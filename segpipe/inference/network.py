"""A model made ready for inference: folded, in the right layout and number format, logits kept low."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

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
    from torch.fx import GraphModule, Tracer
    from torch.fx.experimental.optimization import fuse

    # In float64: rounded once, the folded logits are as near to the true ones as the unfolded.
    exact = copy.deepcopy(module).double()
    # By default fx swaps the functions of `math` while it traces, for all threads: numba then misses them.
    tracer = Tracer(autowrap_modules=())  # type: ignore[arg-type]
    try:
        with _TRACING:
            graph = tracer.trace(exact)
        return fuse(GraphModule(exact, graph), inplace=True, no_trace=True).float()
    except Exception as error:  # fx raises many types: what a model's code does while traced is open
        _log.warning("batch norms are not folded: %s cannot be traced (%s)", type(module).__name__, error)
        return copy.deepcopy(module)


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
