"""The contract of every model family, and what ``build`` refuses."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from segpipe.errors import ConfigError
from segpipe.models.blocks import SegmentationModel
from segpipe.models.families import FAMILIES, build
from segpipe.models.state_keys import KEY_MAPS, LAST_LAYERS

OPTIONS: dict[str, dict[str, Any]] = {"unet": {"width": 4, "depth": 3}}
LIGHT = ("unet", "unet_mobilenet_v2", "lraspp_mobilenet_v3_large")


@cache
def model_of(family: str, bands: int, classes: int) -> SegmentationModel:
    torch.manual_seed(3)
    model = build(family, bands=bands, classes=classes, **OPTIONS.get(family, {}))
    for module in model.modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # not the identity, or folding would be tested with nothing to fold
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.8, 1.2)  # type: ignore[arg-type]
    return model.eval()


def pixels(bands: int, height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, bands, height, width, generator=torch.Generator().manual_seed(5))


class Low(nn.Module):
    """What an engine traces: the network without its last upsampling."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_low(x)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_have_the_inputs_size_for_odd_sides(family: str) -> None:
    model = model_of(family, 3, 2)
    assert model(pixels(3, 45, 83)).shape == (1, 2, 45, 83)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_forward_is_forward_low_upsampled(family: str) -> None:
    model, x = model_of(family, 3, 2), pixels(3, 64, 96)
    low = model.forward_low(x)
    if model.full_size:
        assert low.shape[-2:] == x.shape[-2:]
        assert torch.equal(model(x), low)
    else:
        assert low.shape[-2] < 64
        assert low.shape[-1] < 96
        assert torch.equal(model(x), F.interpolate(low, size=(64, 96), mode="bilinear", align_corners=False))


@pytest.mark.parametrize("family", LIGHT)
@pytest.mark.parametrize(("bands", "classes"), [(1, 2), (4, 19), (5, 2)])
@torch.inference_mode()
def test_light_families_take_any_band_and_class_count(family: str, bands: int, classes: int) -> None:
    assert model_of(family, bands, classes)(pixels(bands, 64, 64, batch=2)).shape == (2, classes, 64, 64)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(LIGHT)))
@torch.inference_mode()
def test_heavy_families_take_five_bands_and_nineteen_classes(family: str) -> None:
    assert model_of(family, 5, 19)(pixels(5, 33, 32)).shape == (1, 19, 33, 32)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_batch_norms_fold_away_without_changing_the_logits(family: str) -> None:
    low, x = Low(model_of(family, 3, 2)).eval(), pixels(3, 64, 64)
    folded = fuse(low)
    assert any(isinstance(m, nn.BatchNorm2d) for m in low.modules())
    assert not any(
        node.op == "call_module" and isinstance(folded.get_submodule(node.target), nn.BatchNorm2d)
        for node in folded.graph.nodes
    )
    torch.testing.assert_close(folded(x), low(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", LIGHT)
@torch.inference_mode()
def test_a_folded_network_takes_other_sizes_than_the_first(family: str) -> None:
    low = Low(model_of(family, 3, 2)).eval()
    folded = fuse(low)
    for sides in ((64, 64), (47, 65)):
        x = pixels(3, *sides)
        torch.testing.assert_close(folded(x), low(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", LIGHT)
@torch.inference_mode()
def test_every_band_reaches_the_logits(family: str) -> None:
    model, x = model_of(family, 4, 3), pixels(4, 64, 64)
    before = model(x)
    for band in range(4):
        changed = x.clone()
        changed[:, band] += 1
        assert not torch.allclose(model(changed), before)


@pytest.mark.parametrize("family", ["unet", "unet_mobilenet_v2"])
def test_every_weight_gets_a_gradient(family: str) -> None:
    torch.manual_seed(1)
    model = build(family, bands=2, classes=3, **OPTIONS.get(family, {}))
    model(pixels(2, 64, 64, batch=2)).square().mean().backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


def test_the_mobilenet_unet_computes_what_torchvisions_encoder_computes() -> None:
    torchvision_models = pytest.importorskip("torchvision.models")
    torch.manual_seed(2)
    theirs = torchvision_models.mobilenet_v2(weights=None).features[:17].eval()
    ours = model_of("unet_mobilenet_v2", 3, 2).features
    ours_again = build("unet_mobilenet_v2", bands=3, classes=2).features.eval()  # type: ignore[union-attr, operator]
    assert ours.state_dict().keys() == theirs.state_dict().keys()  # type: ignore[union-attr, operator]
    ours_again.load_state_dict(theirs.state_dict())
    x = pixels(3, 64, 64)
    assert torch.equal(ours_again(x), theirs(x))


def test_width_and_depth_shape_the_unet() -> None:
    model = build("unet", bands=3, classes=2, width=8, depth=2)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert max(widths) == 32


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(1)
    model, x = build("unet_mobilenet_v2", bands=3, classes=2, dropout=0.5), pixels(3, 64, 64, batch=2)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_every_family_has_its_key_maps() -> None:
    assert FAMILIES.keys() == LAST_LAYERS.keys() == KEY_MAPS.keys()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("unett", {}, "no model family 'unett'. Did you mean 'unet'"),
        ("deeplab", {}, "Did you mean 'deeplabv3_resnet50'"),
        ("zzz", {}, "There are: unet, "),
        ("unet", {"widht": 16}, "has no option 'widht'. Did you mean 'width'"),
        ("fcn_resnet50", {"width": 16}, "has no option 'width'. There are: none"),
        ("unet", {"bands_": 3}, "has no option 'bands_'. There are: width, depth"),
        ("unet", {"width": "16"}, "option 'width' of model family 'unet' is '16'"),
        ("unet", {"depth": True}, "option 'depth' of model family 'unet' is True"),
        ("unet", {"depth": 9}, "depth 1 to 6"),
        ("unet", {"width": 0}, "Width is 1 to 512"),
        ("unet_mobilenet_v2", {"dropout": 1}, "Give a fraction"),
    ],
)
def test_a_wrong_family_or_option_is_refused_with_what_there_is(
    family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(family, bands=3, classes=2, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("numbers", [{"bands": 0, "classes": 2}, {"bands": 3, "classes": 0}])
def test_no_bands_or_no_classes_is_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        build("unet", **numbers)


def test_the_unets_and_the_registry_do_not_import_torchvision() -> None:
    code = (
        "import sys; from segpipe.models.families import build\n"
        "for name in ('unet', 'unet_mobilenet_v2'): build(name, bands=3, classes=2)\n"
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
