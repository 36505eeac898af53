"""Model families and the self-describing model file. torch is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segpipe.models.file import load_model, save_model

__all__ = ["load_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("segpipe.models.file"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
