"""Rates of the counting loops and of the mask codec on one core, interleaved with other ways of doing it.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_counts_speed.py
Targets: confusion >= 1,000 Mpx/s, encode_mask >= 300 Mpx/s of building masks.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from segpipe.masks.codec import decode_mask, encode_mask
from segpipe.metrics import class_counts, confusion

SIDE_PX = 4096
ROUNDS = 5


def rates_mpx_s(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median rate of each way, by processor time, over rounds in turn after an untimed one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for timed in [False] + [True] * ROUNDS:
        for name, way in ways.items():
            start = time.thread_time()
            way()
            if timed:
                seconds[name].append(time.thread_time() - start)
    return {name: SIDE_PX**2 / statistics.median(values) / 1e6 for name, values in seconds.items()}


def blocky(num_classes: int, block_px: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, num_classes, (SIDE_PX // block_px,) * 2, dtype=np.uint8)
    return cells.repeat(block_px, 0).repeat(block_px, 1)


def speckled(mask: np.ndarray, num_classes: int, share: float) -> np.ndarray:
    rng = np.random.default_rng(9)
    out, noise = mask.copy(), rng.random(mask.shape) < share
    out[noise] = rng.integers(0, num_classes, int(noise.sum()))
    return out


def bincount_uint16(label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    pairs = np.stack((predicted, label), axis=-1).view(np.uint16)
    return np.bincount(pairs.ravel(), minlength=65536).reshape(256, 256)


@pytest.mark.benchmark
def test_counting_rates() -> None:
    for name, num_classes, share in (("19 classes, 5 % speckle", 19, 0.05), ("buildings, clean", 2, 0.0)):
        label = blocky(num_classes, 64, 0)
        label[:256] = 255
        predicted = speckled(np.roll(blocky(num_classes, 64, 0), 3, axis=1), num_classes, share)
        ways = {
            "confusion": lambda a=label, b=predicted, n=num_classes: confusion(a, b, n),
            "np.bincount of uint16 pairs": lambda a=label, b=predicted: bincount_uint16(a, b),
            "class_counts": lambda b=predicted, n=num_classes: class_counts(b, n),
        }
        for way, rate in rates_mpx_s(ways).items():
            print(f"{name}: {way} {rate:,.0f} Mpx/s")
        counts = bincount_uint16(label, predicted)[:num_classes, :num_classes]
        np.testing.assert_array_equal(confusion(label, predicted, num_classes), counts)


@pytest.mark.benchmark
def test_codec_rates() -> None:
    for name, mask in (
        ("buildings", speckled(blocky(2, 32, 1), 2, 0.002)),
        ("19 classes", speckled(blocky(19, 32, 1), 19, 0.005)),
    ):
        data = encode_mask(mask)
        ways = {
            "encode": lambda m=mask: encode_mask(m),
            "encode by Pillow, level 1": lambda m=mask: Image.fromarray(m).save(
                io.BytesIO(), "PNG", compress_level=1
            ),
            "decode": lambda d=data: decode_mask(d),
            "decode by Pillow": lambda d=data: np.asarray(Image.open(io.BytesIO(d))),
        }
        print(f"{name}: {len(data) / mask.size:.3f} bytes a pixel")
        for way, rate in rates_mpx_s(ways).items():
            print(f"{name}: {way} {rate:,.0f} Mpx/s")
        np.testing.assert_array_equal(decode_mask(data), mask)
