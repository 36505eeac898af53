from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from segpipe.errors import InputError
from segpipe.training.average import RunningAverage


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())


def changed(model: nn.Module, step: int) -> None:
    """Other weights, and other batch-norm statistics by a forward pass."""
    torch.manual_seed(100 + step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model(torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_floats_follow_the_formula_and_counters_are_copied(decay: float) -> None:
    model = network()
    average = RunningAverage(model, decay)
    wanted = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(5):
        changed(model, step)
        average.update(model, step)
        d = min(decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            wanted[name] = d * wanted[name] + (1 - d) * value.double()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)
    assert average.state_dict()["1.num_batches_tracked"] == 5


def test_an_average_shares_nothing_with_the_network_and_is_in_evaluation_mode() -> None:
    model = network()
    average = RunningAverage(model, 0.9)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    places = {name: value.data_ptr() for name, value in average.state_dict().items()}
    changed(model, 0)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    average.update(model, 0)
    assert not torch.equal(average.state_dict()["0.weight"], before["0.weight"])
    assert {name: value.data_ptr() for name, value in average.state_dict().items()} == places
    assert model.training
    assert not any(module.training for module in average.model.modules())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_a_restored_average_goes_on_bit_for_bit() -> None:
    model = network()
    whole = RunningAverage(model, 0.99)
    changed(model, 0)
    whole.update(model, 0)
    stored = safetensors.torch.save(whole.state_dict())
    resumed = RunningAverage(network(seed=5), 0.99)
    resumed.load_state_dict(safetensors.torch.load(stored))
    changed(model, 1)
    for average in (whole, resumed):
        average.update(model, 1)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_state_of_another_network_is_refused(damage: str) -> None:
    average = RunningAverage(network(), 0.9)
    state = {name: value.clone() for name, value in average.state_dict().items()}
    if damage == "missing":
        del state["0.bias"]
    elif damage == "unexpected":
        state["2.bias"] = state["0.bias"]
    else:
        state["0.bias"] = torch.zeros(9)
    with pytest.raises(InputError, match=r"1 tensor not as in the network: [02]\.bias"):
        average.load_state_dict(state)
