"""FCN, DeepLabV3 and LR-ASPP as torchvision builds them: random start, no auxiliary head.

torchvision takes over a second to import, so it is imported when one of these is built.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from segpipe.models.blocks import SegmentationModel


class TorchvisionModel(SegmentationModel):
    """A torchvision network in two parts; logits have 1/8 of the input's size, rounded up."""

    def __init__(self, network: Any, bands: int) -> None:
        super().__init__()
        self.backbone: nn.Module = network.backbone
        self.classifier: nn.Module = network.classifier
        if bands != 3:
            _replace_first_conv(self.backbone, bands)


class SingleFeatureModel(TorchvisionModel):
    """The classifier takes the last features alone (FCN, DeepLabV3)."""

    def forward_low(self, x_BNHW: Tensor) -> Tensor:
        return self.classifier(self.backbone(x_BNHW)["out"])


class TwoFeatureModel(TorchvisionModel):
    """The classifier takes two levels of features (LR-ASPP)."""

    def forward_low(self, x_BNHW: Tensor) -> Tensor:
        return self.classifier(self.backbone(x_BNHW))


def _replace_first_conv(backbone: nn.Module, bands: int) -> None:
    """Exchange the first convolution for one that takes ``bands`` bands and is otherwise the same."""
    name, old = next((name, m) for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        bands,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    owner, _, attribute = name.rpartition(".")
    backbone.get_submodule(owner)._modules[attribute] = new


def build_fcn_resnet50(*, bands: int, classes: int) -> SegmentationModel:
    """Long et al. 2015 on a dilated ResNet-50. No options."""
    from torchvision.models.segmentation import fcn_resnet50

    network = fcn_resnet50(weights=None, weights_backbone=None, num_classes=classes, aux_loss=False)
    return SingleFeatureModel(network, bands)


def build_deeplabv3_resnet50(*, bands: int, classes: int) -> SegmentationModel:
    """Chen et al. 2017 on a dilated ResNet-50. No options."""
    from torchvision.models.segmentation import deeplabv3_resnet50

    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=classes, aux_loss=False)
    return SingleFeatureModel(network, bands)


def build_lraspp_mobilenet_v3_large(*, bands: int, classes: int) -> SegmentationModel:
    """Howard et al. 2019. No options."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)
    return TwoFeatureModel(network, bands)
