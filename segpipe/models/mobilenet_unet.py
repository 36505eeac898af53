"""U-Net decoder on a MobileNetV2 encoder (Sandler et al. 2018): small, and quick on CPUs.

The encoder is cut before MobileNetV2's last, widest layers; the decoder ends at half the input's resolution.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from segpipe.errors import ConfigError
from segpipe.models.blocks import ConvNormAct, InvertedResidual, SegmentationModel, UpBlock, initialise

# expansion, channels, blocks, stride of the first block: table 2 of the paper, without its last row.
STAGES: Final = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
STEM_CHANNELS: Final = 32
SKIPS: Final = (1, 3, 6, 13)
"""Features whose outputs go to the decoder: strides 2, 4, 8, 16."""
SKIP_CHANNELS: Final = (16, 24, 32, 96)
DEEP_CHANNELS: Final = 160
DECODER_CHANNELS: Final = (32, 48, 64, 80)


class MobileNetV2UNet(SegmentationModel):
    """Logits have half the input's size, rounded up.

    ``features`` carries torchvision's names (``features.0`` to ``features.16``): its weights load as is.
    """

    def __init__(self, bands: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        features: list[nn.Module] = [ConvNormAct(bands, STEM_CHANNELS, stride=2, relu6=True)]
        channels = STEM_CHANNELS
        for expansion, outputs, blocks, stride in STAGES:
            for block in range(blocks):
                step = stride if block == 0 else 1
                features.append(InvertedResidual(channels, outputs, stride=step, expansion=expansion))
                channels = outputs
        self.features = nn.Sequential(*features)
        deep = DEEP_CHANNELS
        ups: list[UpBlock] = []
        for skip, outputs in zip(reversed(SKIP_CHANNELS), reversed(DECODER_CHANNELS), strict=True):
            ups.append(UpBlock(deep, skip, outputs))
            deep = outputs
        self.ups = nn.ModuleList(ups)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(deep, classes, 1)
        initialise(self)

    def forward_low(self, x_BNHW: Tensor) -> Tensor:
        x, skips = x_BNHW, []
        for index, feature in enumerate(self.features):
            x = feature(x)
            if index in SKIPS:
                skips.append(x)
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return self.head(self.dropout(x))


def build(*, bands: int, classes: int, dropout: float = 0.0) -> SegmentationModel:
    """Option: ``dropout``, the fraction of decoder channels left out while training (0 to below 1)."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout is {dropout}", fix="Give a fraction from 0 to below 1.")
    return MobileNetV2UNet(bands, classes, dropout)
