"""How samples of a prepared data set become training batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from segpipe.config.model import Section

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
SplitName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class AugmentConfig(Section):
    """Changes of image and label together, drawn anew for each sample and epoch."""

    preset: Literal["street", "aerial", "none"] = "aerial"
    """street: scale, crop, mirror, colour; aerial: 8 symmetries, noise, band dropout too; none: crop only."""
    crop_px: Annotated[int, Field(ge=32, le=4096)] = 256
    """Side of the square that the network is trained on, pixels."""
    scale: tuple[Positive, Positive] | None = None
    """Least and most enlargement of the image; none: the preset's."""
    rotate: bool = False
    """Turn by any angle, not only by the 8 symmetries."""
    colour: Annotated[float, Field(ge=0, le=3)] = 1.0
    """Strength of colour, contrast and brightness changes, as a factor of the preset's; 0 = none."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of added noise at most, as a fraction of a band's own; none: the preset's."""
    band_dropout: Share | None = None
    """Chance that one band is replaced by its mean; none: the preset's."""

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError("scale: the least comes first")
        return self


class DataConfig(Section):
    """Which prepared data set, and how its samples become batches."""

    uri: str = Field(min_length=1)
    """URI of the folder that ``segpipe prepare`` wrote (the one that holds dataset.json)."""
    train_splits: tuple[SplitName, ...] = Field(default=("train",), min_length=1)
    """Splits that are trained on."""
    augment: AugmentConfig = AugmentConfig()
    prefetch_batches: Annotated[int, Field(ge=1, le=64)] = 4
    """Batches that are read, decoded and augmented ahead of the step."""
