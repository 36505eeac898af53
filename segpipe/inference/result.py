"""What the engine gives for one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BlockResult:
    """Classes of one block."""

    mask: Any
    """uint8 (out_height, out_width): class index, 255 = no data."""
    tiles_computed: int = 0
    tiles_empty: int = 0
    """Tiles without a valid pixel in their cell: they cost no forward pass."""
