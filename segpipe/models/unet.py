"""The U-Net of Ronneberger et al. 2015, with batch norm and same-size padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segpipe.errors import ConfigError
from segpipe.models.blocks import ConvNormAct, SegmentationModel, initialise


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvNormAct(inputs, outputs), ConvNormAct(outputs, outputs))


class _Up(nn.Module):
    """Transposed 2x2 convolution, cut to the skip's size, joined, two 3x3 convolutions."""

    def __init__(self, deep: int, skip: int) -> None:
        super().__init__()
        self.raise_2x = nn.ConvTranspose2d(deep, skip, 2, stride=2)
        self.convs = _double(2 * skip, skip)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        # Pooling rounds sides up, so the raised map has the skip's size or one pixel more.
        raised = self.raise_2x(deep)[:, :, : skip.shape[2], : skip.shape[3]]
        return self.convs(torch.cat((skip, raised), dim=1))


class UNet(SegmentationModel):
    """``width`` channels at full size, doubled at each of ``depth`` halvings; logits of full size."""

    full_size = True

    def __init__(self, bands: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.downs = nn.ModuleList(
            _double(inputs, outputs) for inputs, outputs in zip([bands, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.ups = nn.ModuleList(_Up(widths[level + 1], widths[level]) for level in reversed(range(depth)))
        self.head = nn.Conv2d(width, classes, 1)
        initialise(self)

    def forward_low(self, x_BNHW: Tensor) -> Tensor:
        x, skips = x_BNHW, []
        for level, down in enumerate(self.downs):
            x = down(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        return self.head(x)


def build(*, bands: int, classes: int, width: int = 32, depth: int = 4) -> SegmentationModel:
    """Options: ``width``, channels of the first level (1 to 512); ``depth``, halvings (1 to 6)."""
    if not (1 <= width <= 512 and 1 <= depth <= 6):
        raise ConfigError(f"U-Net of width {width} and depth {depth}", fix="Width is 1 to 512, depth 1 to 6.")
    return UNet(bands, classes, width, depth)
