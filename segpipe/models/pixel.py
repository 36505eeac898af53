"""A per-pixel classifier: 1x1 convolutions only, the baseline that every network with context must beat."""

from __future__ import annotations

from torch import Tensor, nn

from segpipe.errors import ConfigError
from segpipe.models.blocks import ConvNormAct, SegmentationModel, initialise


class PixelClassifier(SegmentationModel):
    """Each pixel's class from its own bands alone, so a mask does not depend on how a scene is cut."""

    full_size = True

    def __init__(self, bands: int, classes: int, width: int) -> None:
        super().__init__()
        self.hidden = ConvNormAct(bands, width, 1) if width else nn.Identity()
        self.head = nn.Conv2d(width or bands, classes, 1)
        initialise(self)

    def forward_low(self, x_BNHW: Tensor) -> Tensor:
        return self.head(self.hidden(x_BNHW))


def build(*, bands: int, classes: int, width: int = 16) -> SegmentationModel:
    """Option: ``width``, channels of the one hidden layer (at most 1024); 0 = none, a linear classifier."""
    if not 0 <= width <= 1024:
        raise ConfigError(f"pixel classifier of width {width}", fix="Width is 0 to 1024.")
    return PixelClassifier(bands, classes, width)
