"""3x3 convolutions on CPU with 2.25 times fewer multiplications: Winograd's F(2x2, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), section 4.1: every 2x2
output pixels follow from 4x4 input pixels by Y = A' [(G g G') * (B' d B)] A, where * multiplies element by
element, so that a layer is 16 matrix products between two cheap transforms. An identity, not an
approximation: all in float32, rounding errors of the size of the direct sum's (filters are transformed in
float64; inside a U-Net, after ReLUs, they were smaller).
Dimensions: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from segpipe.inference import winograd_kernels as kernels

Array = np.ndarray[Any, Any]

_LEAST_CHANNELS: Final = 32
"""Of inputs and outputs; with fewer the transforms cost more than the multiplications that they save."""

_BLOCK_FLOATS: Final = 3 * 2**17
"""Transformed patches and their products at once: what stays in the caches of one core (1.5 MB)."""

_FILTER_TRANSFORM: Final = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""G of the paper's equation 8."""


def suits_winograd(conv: nn.Conv2d) -> bool:
    """Return whether `WinogradConv` computes this layer, and faster: a rule on its shape alone."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding in ((1, 1), "same")
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= _LEAST_CHANNELS
    )


class WinogradConv(nn.Module):
    """A 3x3 convolution of stride 1 and its ReLU. For inference on CPU in float32; holds the GIL little.

    An image's values depend neither on its batch nor on threads: images go one by one, on one core.
    """

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        """Take the weights of a convolution that `suits_winograd`."""
        super().__init__()
        weight = conv.weight.detach().double()
        transform = torch.tensor(_FILTER_TRANSFORM, dtype=torch.float64)
        filters = torch.einsum("au,bv,oiuv->abio", transform, transform, weight)
        self._filters = filters.flatten(0, 1).float().contiguous()
        bias = conv.bias.detach().float() if conv.bias is not None else torch.zeros(conv.out_channels)
        self._bias_C: Array = bias.numpy().copy()
        self._floor = 0.0 if relu else -math.inf

    def forward(self, *parts_BCHW: Tensor) -> Tensor:
        """Return (B, outputs, H, W), channels_last; the inputs are joined along their channels."""
        arrays = [part.permute(0, 2, 3, 1).contiguous().numpy() for part in parts_BCHW]
        batch, height, width = arrays[0].shape[:3]
        out_BHWC = torch.empty(batch, height, width, len(self._bias_C))
        for index in range(batch):
            self._convolve(tuple(array[index] for array in arrays), out_BHWC[index].numpy())
        return out_BHWC.permute(0, 3, 1, 2)

    def _convolve(self, parts: tuple[Array, ...], out_HWC: Array) -> None:
        _, inputs, outputs = self._filters.shape
        rows, cols = -(-out_HWC.shape[0] // 2), -(-out_HWC.shape[1] // 2)
        high, wide = _block_shape(rows, cols, inputs + outputs)
        patches = torch.empty(16 * high * wide * inputs)
        products = torch.empty(16 * high * wide * outputs)
        for left in range(0, cols, wide):
            across = min(wide, cols - left)
            ring = np.empty((4, 4, across, inputs), np.float32)
            scratch = np.empty((2, 4, across * outputs), np.float32)
            for top, down in _steps(rows, high):
                size = 16 * down * across
                patches_16PC = patches[: size * inputs].view(16, down * across, inputs)
                product_16PC = products[: size * outputs].view(16, down * across, outputs)
                kernels.patches_from_pixels(parts, top, left, ring, patches_16PC.numpy())
                torch.bmm(patches_16PC, self._filters, out=product_16PC)
                kernels.pixels_from_products(
                    product_16PC.numpy(), self._bias_C, self._floor, top, left, scratch, out_HWC
                )


def _steps(length: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, size) of the steps along one axis."""
    for start in range(0, length, step):
        yield start, min(step, length - start)


def _block_shape(rows: int, cols: int, channels: int) -> tuple[int, int]:
    """Return patches (down, across) of a block, spread so that the last one is about as large."""
    most = max(16, _BLOCK_FLOATS // (16 * channels))
    across = -(-cols // -(-cols // most))
    down = min(rows, max(1, most // across))
    return -(-rows // -(-rows // down)), across
