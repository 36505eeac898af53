"""Winograd's convolution and the rewritten network against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from segpipe.inference.network import LowLogits, fold_batch_norms
from segpipe.inference.rewrite import PointwiseConv, quicken
from segpipe.inference.winograd import WinogradConv, suits_winograd
from segpipe.models.families import build


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (5, 7), (16, 16), (33, 64), (130, 18)])
@pytest.mark.parametrize("relu", [False, True])
def test_winograd_is_exact_to_a_few_roundings(size: tuple[int, int], relu: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(96, 48, 3, padding=1, bias=not relu)
    x = torch.randn(2, 96, *size)
    with torch.inference_mode():
        quick = WinogradConv(conv, relu=relu)(x)
        exact = conv.double()(x.double())
    if relu:
        exact = exact.relu()
    assert (quick - exact).abs().max() < 2e-6
    assert (quick - exact).pow(2).mean().sqrt() < 3e-7


def test_winograd_gives_the_same_bits_for_joined_maps_and_in_any_batch() -> None:
    torch.manual_seed(0)
    layer = WinogradConv(nn.Conv2d(72, 40, 3, padding=1), relu=True)
    x = torch.randn(3, 72, 21, 34)
    with torch.inference_mode():
        whole = layer(x)
        assert torch.equal(whole, layer(x[:, :32], x[:, 32:]))
        assert torch.equal(whole[2:], layer(x[2:]))


@pytest.mark.parametrize(
    "more", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding": 0}, {"padding_mode": "reflect"}]
)
def test_other_convolutions_do_not_suit_winograd(more: dict[str, object]) -> None:
    assert suits_winograd(nn.Conv2d(32, 32, 3, padding=1))
    assert not suits_winograd(nn.Conv2d(32, 32, 3, **{"padding": 1, **more}))  # type: ignore[arg-type]
    assert not suits_winograd(nn.Conv2d(16, 32, 3, padding=1))


@pytest.mark.parametrize("family", ["unet", "unet_mobilenet_v2"])
def test_the_rewritten_network_has_the_same_logits(family: str) -> None:
    torch.manual_seed(0)
    model = build(family, bands=3, classes=5).eval()
    folded = fold_batch_norms(LowLogits(model))
    x = torch.randn(1, 3, 70, 90)
    with torch.inference_mode():
        expected = folded(x)
        quick = quicken(folded)
        kinds = {type(module) for module in quick.modules()}
        torch.testing.assert_close(quick(x), expected, rtol=1e-4, atol=1e-4)
    assert {WinogradConv, PointwiseConv} <= kinds


def test_a_value_with_a_second_reader_is_kept() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            joined = torch.cat((x, -x), dim=1)
            y = self.conv(joined)
            return y.relu() + y + joined[:, :32]

    torch.manual_seed(0)
    model = Twice().eval()
    x = torch.randn(1, 32, 9, 9)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(quicken(torch.fx.symbolic_trace(model))(x), expected)
