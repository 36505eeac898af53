"""Sizes that ``auto`` stands for. No torch here: the driver asks for them as well."""

from __future__ import annotations

from typing import Final

CPU_BATCH: Final = 1
"""Every compute thread runs batches of its own: one tile fits the caches best."""

CUDA_BATCH: Final = 32
