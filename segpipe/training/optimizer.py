"""The optimiser, its learning rate as a pure function of the step, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from segpipe.config.train import StepsConfig
from segpipe.errors import InputError
from segpipe.wording import counted, few

_BASE_RATE: Final = "base_lr"
_STEP: Final = "step"
_ONE_CYCLE_RISE: Final = 0.3
_ONE_CYCLE_FIRST: Final = 1 / 25
_ONE_CYCLE_LAST: Final = 1 / 1000


def make_optimizer(model: nn.Module, config: StepsConfig, backbone: Callable[[str], bool]) -> Optimizer:
    """AdamW or SGD over the parameters that require a gradient.

    Groups come in this order, empty ones left out: other parameters, other biases and norms, the backbone's,
    the backbone's biases and norms. Biases and norms (one dimension) have no weight decay; parameters whose
    name ``backbone`` accepts have the rate ``lr * backbone_lr_factor``.
    """
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((backbone(name), parameter.ndim <= 1), []).append(parameter)
    groups = []
    for (in_backbone, flat), parameters in sorted(members.items()):
        rate = config.lr * (config.backbone_lr_factor if in_backbone else 1.0)
        decay = 0.0 if flat else config.weight_decay
        groups.append({"params": parameters, "lr": rate, _BASE_RATE: rate, "weight_decay": decay})
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum)
    return AdamW(groups, lr=config.lr)


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Give each group its own highest rate times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group[_BASE_RATE] * factor


def rate(step: int, total_steps: int, config: StepsConfig) -> float:
    """Factor on the highest rate, in (0, 1], of step 0 to ``total_steps - 1``.

    constant, poly, cosine: after ``warmup_steps`` steps of a linear rise the schedule runs from 1 towards its
    end, which the step after the last would reach (0 of poly and cosine). one_cycle (Smith and Topin 2018):
    half a cosine up from 1/25, half a cosine down to 1/1000 at the last step.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is not one of {total_steps} steps")
    if config.schedule == "one_cycle":
        return _one_cycle(step, total_steps, config.warmup_steps)
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    if config.schedule == "poly":
        return (1.0 - done) ** config.poly_power
    if config.schedule == "cosine":
        return _half_cosine(1.0, 0.0, done)
    return 1.0


def _one_cycle(step: int, total_steps: int, warmup_steps: int) -> float:
    last = total_steps - 1
    top = min(warmup_steps or round(_ONE_CYCLE_RISE * total_steps), last)
    if step < top:
        return _half_cosine(_ONE_CYCLE_FIRST, 1.0, step / top)
    return _half_cosine(1.0, _ONE_CYCLE_LAST, (step - top) / max(last - top, 1))


def _half_cosine(first: float, last: float, done: float) -> float:
    # sin^2 keeps the digits of (1 - cos) / 2 near both ends.
    return last + (first - last) * math.sin(math.pi / 2 * (1.0 - done)) ** 2


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state as ``exp_avg/PARAMETER`` and the like: the optimiser's own tensors, not copies.

    Empty before the first step. A parameter that never had a gradient gets zeros, as its state would start.
    """
    if not optimizer.state:
        return {}
    found = {}
    for slot, name, parameter in _slots(optimizer, model):
        value = optimizer.state.get(parameter, {}).get(slot)
        found[f"{slot}/{name}"] = _empty_slot(slot, parameter).zero_() if value is None else value
    return found


def load_optimizer_tensors(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace the state by one from `optimizer_tensors`, copied to the parameters' devices.

    Raises:
        InputError: tensors are missing, not of this optimiser, or of another shape or type; the state is as
            it was.
    """
    slots = list(_slots(optimizer, model)) if tensors else []
    wanted = {f"{slot}/{name}": _empty_slot(slot, parameter) for slot, name, parameter in slots}
    _check_names(wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys())
    for key, value in wanted.items():
        given = tensors[key]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise _misfit(
                f"{key} is {given.dtype} {tuple(given.shape)}, not {value.dtype} {tuple(value.shape)}"
            )
    optimizer.state.clear()
    for slot, name, parameter in slots:
        key = f"{slot}/{name}"
        optimizer.state[parameter][slot] = wanted[key].copy_(tensors[key])


def _slots(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Each tensor of the state: its kind, its parameter's name, the parameter; in the model's order."""
    if isinstance(optimizer, AdamW):
        kinds: tuple[str, ...] = (_STEP, "exp_avg", "exp_avg_sq")
    else:
        kinds = ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in trained:
            yield from ((kind, name, parameter) for kind in kinds)


def _empty_slot(slot: str, parameter: nn.Parameter) -> Tensor:
    # The optimisers keep counters on the CPU, all else in the parameter's own layout.
    return torch.empty((), dtype=torch.float32) if slot == _STEP else torch.empty_like(parameter.detach())


def _check_names(missing: set[str], unexpected: set[str]) -> None:
    if missing:
        raise _misfit(f"{counted(len(missing), 'tensor')} missing: {few(sorted(missing))}")
    if unexpected:
        raise _misfit(
            f"{counted(len(unexpected), 'tensor')} not of this optimiser: {few(sorted(unexpected))}"
        )


def _misfit(what: str) -> InputError:
    return InputError(what, "optimiser state", "Go on with the network and optimiser that it was written by.")
