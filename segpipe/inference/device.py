"""What the hardware allows: device, number format and batch size. Answers depend on no timing."""

from __future__ import annotations

from typing import Final, Literal

import torch

from segpipe.inference.defaults import CPU_BATCH, CUDA_BATCH

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: Final[dict[str, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def resolve_precision(device: str) -> Precision:
    """Return the number format that ``auto`` stands for on ``device``.

    GPUs: bf16 where they compute in it, else fp16. CPUs: always fp32, the format in which masks are equal
    bit for bit; bf16 pays there only with bf16 units (it is several times slower without): ask for it.
    """
    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def default_batch_size(device: str) -> int:
    """Return the batch size, in tiles, that ``auto`` stands for."""
    return CUDA_BATCH if torch.device(device).type == "cuda" else CPU_BATCH
