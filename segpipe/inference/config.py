"""How an engine computes: what `auto` became, nothing left open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from segpipe.errors import ConfigError
from segpipe.inference.device import DTYPES


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Fixed for the life of an engine; masks depend on all of it."""

    tile_px: int
    batch_size: int
    """Tiles in a batch. A GPU, or a compiled network, computes it in one forward pass of this fixed size;
    a CPU in passes of as many tiles as make up 512 x 512 pixels."""
    threads: int = 1
    """Compute threads on CPU."""
    precision: str = "fp32"
    """fp32, bf16 or fp16."""
    compile: bool = False
    """Use torch.compile."""
    device: str = "cpu"
    """A torch device: "cpu" or "cuda:0"."""
    blend: Literal["crop", "linear"] = "crop"

    def __post_init__(self) -> None:
        for name in ("tile_px", "batch_size", "threads"):
            if getattr(self, name) < 1:
                what = f"{name} must be at least 1, not {getattr(self, name)}"
                raise ConfigError(what, f"inference.{name}", "Give a larger number, or leave it out.")
        if self.precision not in DTYPES:
            raise ConfigError(
                f"unknown precision {self.precision!r}", "inference.precision", f"Use {', '.join(DTYPES)}."
            )
        if self.precision == "fp16" and self.device == "cpu":
            raise ConfigError("fp16 needs a GPU", "inference.precision", "Use fp32 (or auto) on CPU.")
