"""What a model says about itself: the model card, stored as JSON in ``model.safetensors`` and in run.json."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IGNORE: Final = 255
"""Class byte of a pixel without data (masks) or without truth (labels)."""

MAX_CLASSES: Final = 255

PIXEL_DTYPES: Final = ("uint8", "uint16", "int16", "float32", "float64")

Byte = Annotated[int, Field(ge=0, le=255)]


class ClassInfo(BaseModel):
    """One class: its index is its place in ``ModelCard.classes``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    color: tuple[Byte, Byte, Byte]
    """Red, green, blue, 0 to 255."""


class ModelCard(BaseModel):
    """Everything that ``predict`` must know of a model besides its weights."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    family: str
    """Key of ``segpipe.models.families.FAMILIES``."""
    options: dict[str, Any] = {}
    """Options that the family's ``build`` was called with."""
    bands: tuple[str, ...] = Field(min_length=1)
    """Band names in input order, such as ("red", "green", "blue")."""
    dtype: str = "uint8"
    """Pixel type that the model was trained on, one of PIXEL_DTYPES."""
    mean: tuple[float, ...]
    """Per band, in pixel values: the network sees (value - mean) / std."""
    std: tuple[float, ...]
    pixel_m: float | None = Field(default=None, gt=0)
    """Ground pixel size that the model was trained at, metres; None = unknown."""
    tile_px: int = Field(default=512, ge=32)
    """Tile side that the model was trained or tuned for, pixels."""
    classes: tuple[ClassInfo, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    ignore_value: Literal[255] = IGNORE
    training: dict[str, Any] = {}
    """Training facts: data, places, licence, recipe, scores. Free form, shown as they are."""

    @model_validator(mode="after")
    def _check(self) -> ModelCard:
        if not len(self.mean) == len(self.std) == len(self.bands):
            raise ValueError("mean and std need one value per band")
        if any(not value > 0 for value in self.std):
            raise ValueError("std must be positive")
        if self.dtype not in PIXEL_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(PIXEL_DTYPES)}")
        names = [info.name for info in self.classes]
        if len(set(names)) != len(names):
            raise ValueError("class names must differ")
        return self

    @property
    def num_classes(self) -> int:
        return len(self.classes)
