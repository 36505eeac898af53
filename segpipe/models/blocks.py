"""The base of all networks and the layers that families share. Shapes: B batch, C classes, H, W pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class SegmentationModel(nn.Module):
    """A network that turns pixels into class logits.

    ``forward`` is ``forward_low`` brought to the input's size bilinearly (``align_corners=False``), or
    ``forward_low`` itself where ``full_size`` is true. Both take float32 (B, bands, H, W), normalised as the
    model card says, of any H and W (the torchvision families need at least 32 px).
    """

    full_size: bool = False
    """True where ``forward_low`` already gives (B, C, H, W)."""

    def forward_low(self, x_BNHW: Tensor) -> Tensor:
        """Logits (B, C, h, w) at the resolution that the last layer works at."""
        raise NotImplementedError

    def forward(self, x_BNHW: Tensor) -> Tensor:
        """Logits (B, C, H, W)."""
        low = self.forward_low(x_BNHW)
        if self.full_size:
            return low
        return F.interpolate(low, size=x_BNHW.shape[-2:], mode="bilinear", align_corners=False)


class ConvNormAct(nn.Sequential):
    """Same-size convolution without bias, batch norm, ReLU (or ReLU6), in the order that folds."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        relu6: bool = False,
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True) if relu6 else nn.ReLU(inplace=True),
        )


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018): expand 1x1, depthwise 3x3, project 1x1, then add if it can.

    Sub-modules are named as torchvision names them, so that its published weights fit key by key.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormAct(inputs, hidden, 1, relu6=True))
        layers.append(ConvNormAct(hidden, hidden, 3, stride=stride, groups=hidden, relu6=True))
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class UpBlock(nn.Module):
    """Bring the deeper features to the skip's size (nearest), join both, two 3x3 convolutions."""

    def __init__(self, deep: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNormAct(deep + skip, outputs), ConvNormAct(outputs, outputs))

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        raised = F.interpolate(deep, size=skip.shape[-2:], mode="nearest")
        return self.convs(torch.cat((raised, skip), dim=1))


def initialise(model: nn.Module) -> None:
    """He initialisation of all convolutions, batch norms at one; random numbers from torch's global state."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
