from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from segpipe.config.train import StepsConfig
from segpipe.errors import InputError
from segpipe.training.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    rate,
    set_rate,
)

SCHEDULES = ("constant", "poly", "cosine", "one_cycle")
OPTIMIZERS = {
    "adamw": StepsConfig(steps=9, lr=0.01),
    "sgd": StepsConfig(steps=9, lr=0.01, optimizer="sgd"),
    "sgd_plain": StepsConfig(steps=9, lr=0.01, optimizer="sgd", momentum=0.0),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def no_backbone(name: str) -> bool:
    return False


def first_layer(name: str) -> bool:
    return name.startswith("0.")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        set_rate(optimizer, rate(step, 9, OPTIMIZERS["adamw"]))
        optimizer.step()


def rates(schedule: Any, total: int, **more: Any) -> list[float]:
    config = StepsConfig(steps=10_000, schedule=schedule, **more)
    return [rate(step, total, config) for step in range(total)]


@each_optimizer
def test_a_restored_state_goes_on_bit_for_bit(name: str) -> None:
    config = OPTIMIZERS[name]
    whole = network()
    train(whole, make_optimizer(whole, config, first_layer), range(4))

    begun = network()
    optimizer = make_optimizer(begun, config, first_layer)
    train(begun, optimizer, range(2))
    stored = safetensors.torch.save(optimizer_tensors(optimizer, begun))

    resumed = network(seed=1)
    resumed.load_state_dict(begun.state_dict())
    optimizer = make_optimizer(resumed, config, first_layer)
    load_optimizer_tensors(optimizer, resumed, safetensors.torch.load(stored))
    train(resumed, optimizer, range(2, 4))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@each_optimizer
def test_before_the_first_step_there_is_no_state(name: str) -> None:
    model = network()
    optimizer = make_optimizer(model, OPTIMIZERS[name], no_backbone)
    assert optimizer_tensors(optimizer, model) == {}
    load_optimizer_tensors(optimizer, model, {})
    assert not optimizer.state


def test_the_state_before_the_first_step_can_be_restored_too() -> None:
    model = network()
    optimizer = make_optimizer(model, OPTIMIZERS["adamw"], no_backbone)
    train(model, optimizer, range(2))
    load_optimizer_tensors(optimizer, model, {})
    assert optimizer_tensors(optimizer, model) == {}


def test_state_names_are_kind_and_parameter() -> None:
    model = network()
    optimizer = make_optimizer(model, OPTIMIZERS["adamw"], no_backbone)
    train(model, optimizer, range(1))
    names = [name for name, _ in model.named_parameters()]
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert set(optimizer_tensors(optimizer, model)) == {f"{kind}/{name}" for kind in kinds for name in names}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_parameter_that_had_no_gradient_can_be_restored(name: str) -> None:
    model = network()
    optimizer = make_optimizer(model, OPTIMIZERS[name], no_backbone)
    model[3].bias.register_hook(torch.zeros_like)
    loss = model[1](model[0](torch.randn(2, 3, 6, 6))).square().mean()
    loss.backward()
    optimizer.step()
    stored = optimizer_tensors(optimizer, model)
    other = make_optimizer(model, OPTIMIZERS[name], no_backbone)
    load_optimizer_tensors(other, model, stored)
    assert all(torch.equal(value, stored[key]) for key, value in optimizer_tensors(other, model).items())
    last = [value for key, value in stored.items() if key.endswith("/3.weight")]
    assert last
    assert not any(value.any() for value in last)


def without(tensors: dict[str, Tensor]) -> None:
    del tensors["exp_avg/0.weight"]


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg/7.weight"] = tensors["exp_avg/0.weight"]


def reshaped(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg/0.weight"] = tensors["exp_avg/0.weight"][:1]


def retyped(tensors: dict[str, Tensor]) -> None:
    tensors["exp_avg/0.weight"] = tensors["exp_avg/0.weight"].half()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without, "1 tensor missing: exp_avg/0.weight"),
        (renamed, "not of this optimiser: exp_avg/7.weight"),
        (reshaped, r"exp_avg/0.weight is torch.float32 \(1, 3, 3, 3\)"),
        (retyped, "exp_avg/0.weight is torch.float16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(damage: Any, message: str) -> None:
    model = network()
    optimizer = make_optimizer(model, OPTIMIZERS["adamw"], no_backbone)
    train(model, optimizer, range(2))
    before = {key: value.clone() for key, value in optimizer_tensors(optimizer, model).items()}
    damaged = dict(before)
    damage(damaged)
    with pytest.raises(InputError, match=message):
        load_optimizer_tensors(optimizer, model, damaged)
    after = optimizer_tensors(optimizer, model)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_a_state_of_another_optimiser_is_refused() -> None:
    model = network()
    sgd = make_optimizer(model, OPTIMIZERS["sgd"], no_backbone)
    train(model, sgd, range(1))
    plain = make_optimizer(model, OPTIMIZERS["sgd_plain"], no_backbone)
    with pytest.raises(InputError, match="not of this optimiser"):
        load_optimizer_tensors(plain, model, optimizer_tensors(sgd, model))


def test_biases_and_norms_do_not_decay_and_the_backbone_has_its_own_rate() -> None:
    model = network()
    config = StepsConfig(steps=9, lr=0.01, backbone_lr_factor=0.1, weight_decay=0.05)
    groups = make_optimizer(model, config, first_layer).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names[id(p)] for p in group["params"]] for group in groups]
    assert found == [["3.weight"], ["1.weight", "1.bias", "3.bias"], ["0.weight"], ["0.bias"]]
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0, 0.05, 0.0]


def test_parameters_that_are_frozen_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model, OPTIMIZERS["adamw"], no_backbone)
    train(model, optimizer, range(1))
    assert not any(key.split("/")[1].startswith("0.") for key in optimizer_tensors(optimizer, model))
    assert torch.equal(model[0].weight, network()[0].weight)


def test_a_set_rate_is_a_factor_on_each_groups_own_rate() -> None:
    model = network()
    config = StepsConfig(steps=9, lr=0.01, backbone_lr_factor=0.1)
    optimizer = make_optimizer(model, config, first_layer)
    for factor in (0.3, 0.5):
        set_rate(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005] * 2 + [0.0005] * 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 400])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 101])
def test_rates_rise_to_1_and_then_fall_and_stay_above_0(schedule: str, warmup: int, total: int) -> None:
    found = rates(schedule, total, warmup_steps=warmup)
    assert all(0 < value <= 1 for value in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    if warmup < total:
        assert max(found) == 1


def test_schedules_have_their_known_values() -> None:
    assert rates("constant", 4) == [1, 1, 1, 1]
    assert rates("poly", 4, poly_power=2.0) == [1, 0.5625, 0.25, 0.0625]
    assert rates("cosine", 4) == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])
    assert rates("constant", 5, warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1]
    assert rates("cosine", 6, warmup_steps=2)[:3] == pytest.approx([1 / 3, 2 / 3, 1])


def test_one_cycle_starts_at_1_over_25_peaks_after_its_rise_and_ends_at_1_over_1000() -> None:
    assert rates("one_cycle", 101)[0] == pytest.approx(1 / 25)
    assert rates("one_cycle", 101)[-1] == pytest.approx(1 / 1000)
    assert rates("one_cycle", 100).index(1.0) == 30
    assert rates("one_cycle", 100, warmup_steps=5).index(1.0) == 5
    falling = rates("one_cycle", 101, warmup_steps=20)[20:]
    assert falling[40] == pytest.approx((1 + 1 / 1000) / 2)


@pytest.mark.parametrize("step", [-1, 5])
def test_steps_outside_the_training_have_no_rate(step: int) -> None:
    with pytest.raises(ValueError, match="5 steps"):
        rate(step, 5, StepsConfig(steps=5))
