"""Augmentation of image and label together: one resampling, then colour, noise and band dropout.

Plain arrays and compiled kernels, no torch and no BLAS: it runs in loader threads beside the network, must
not take its thread pool, and every random number comes from the sample's own generator. An image is sampled
bilinearly, its label takes the nearest pixel; what lies outside the image is mirrored and has the label 255.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from segpipe.config.train import AugmentConfig
from segpipe.datasets.augment_kernels import tint, warp

Array = np.ndarray[Any, Any]

RGB_TO_YIQ: Final = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True, slots=True)
class _Preset:
    """Strengths: standard deviations, or the least and most of a uniform draw."""

    symmetries: bool
    mirror: bool
    scale: tuple[float, float]
    stretch: float
    gamma: float
    contrast: tuple[float, float]
    brightness: float
    saturation: tuple[float, float]
    hue: float
    gain: float
    blur: float
    noise: float
    band_dropout: float


_PRESETS: Final = {
    "none": _Preset(False, False, (1, 1), 0, 0, (1, 1), 0, (1, 1), 0, 0, 0, 0, 0),
    "street": _Preset(
        False, True, (0.5, 2.0), 0, 0.1, (0.7, 1.3), 0.08, (0.7, 1.3), 0.05, 0.03, 0.0, 0.0, 0.0
    ),
    "aerial": _Preset(
        True, True, (0.65, 1.5), 0.08, 0.25, (0.65, 1.4), 0.08, (0.4, 1.5), 0.15, 0.08, 0.3, 0.2, 0.02
    ),
}


def rng_of(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """The generator of one sample in one epoch; it depends on nothing else."""
    digest = hashlib.blake2b(repr((seed, epoch, sample_id)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))


def augment(
    pixels: Array,
    label: Array,
    config: AugmentConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """A training sample: a square of the image, changed as the config says, and its label.

    Args:
        pixels: (bands, h, w) of any real type.
        label: uint8 (h, w).
        mean, std: Per band, in pixel values.

    Returns:
        float32 (bands, crop, crop), normalised to (value - mean) / std, and uint8 (crop, crop).
    """
    preset = _PRESETS[config.preset]
    matrix = _place(pixels.shape[1:], config, preset, rng)
    image, target = warp(np.ascontiguousarray(pixels), label, matrix, config.crop_px)
    if config.colour and config.preset != "none":
        if len(image) == 3 and pixels.dtype == np.uint8:
            image = _recolour(image, preset, config.colour, rng)
        else:
            image = _regain(image, preset, config.colour, rng, mean, std)
    image -= np.asarray(mean, np.float32)[:, None, None]
    image /= np.asarray(std, np.float32)[:, None, None]
    noise = preset.noise if config.noise is None else config.noise
    if noise and rng.random() < 0.5:
        image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, noise))
    chance = preset.band_dropout if config.band_dropout is None else config.band_dropout
    if chance and rng.random() < chance:
        image[rng.integers(len(image))] = 0
    return image, target


def _place(size: tuple[int, ...], config: AugmentConfig, preset: _Preset, rng: np.random.Generator) -> Array:
    """The affine map (2, 3) from pixel centres of the crop, seen from its middle, to image row and column."""
    height, width = size
    low, high = config.scale or preset.scale
    enlarge = math.exp(rng.uniform(math.log(low), math.log(high)))
    stretch = math.exp(rng.normal(0, preset.stretch)) if preset.stretch else 1.0
    angle = 0.0
    if config.rotate:
        angle = rng.uniform(0, 2 * math.pi)
    elif preset.symmetries:
        angle = math.pi / 2 * int(rng.integers(4))
    mirror = float(rng.choice((-1.0, 1.0))) if preset.mirror else 1.0
    cosine, sine = math.cos(angle), math.sin(angle)
    if not config.rotate:  # exact, so that a quarter turn does not blur
        cosine, sine = round(cosine), round(sine)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    linear = turn @ np.diag([1 / stretch, stretch * mirror]) / enlarge
    half_px = config.crop_px / 2 * np.abs(linear).sum(axis=1)
    centre = [_centre(n, reach, rng) for n, reach in zip((height, width), half_px, strict=True)]
    exact = low == high == 1 and stretch == 1 and not config.rotate
    if exact:  # whole pixels: the crop then is a copy
        centre = [round(value - config.crop_px / 2) + config.crop_px / 2 for value in centre]
    return np.column_stack((linear, centre))


def _centre(n: int, reach: float, rng: np.random.Generator) -> float:
    """Middle of the crop along an axis: anywhere that keeps it inside; the middle where it is larger."""
    if reach >= n / 2:
        return n / 2
    return float(rng.uniform(reach, n - reach))


def _recolour(image: Array, preset: _Preset, strength: float, rng: np.random.Generator) -> Array:
    """Hue, saturation, band gains, gamma, contrast, brightness and blur of an RGB image of 0 to 255."""
    hue = rng.normal(0, preset.hue) * strength
    saturation = _between(preset.saturation, strength, rng)
    rotation = np.eye(3)
    rotation[1:, 1:] = saturation * np.array(
        [[math.cos(hue), -math.sin(hue)], [math.sin(hue), math.cos(hue)]]
    )
    gains = np.diag(np.exp(rng.normal(0, preset.gain * strength, 3)))
    matrix = gains @ np.linalg.inv(RGB_TO_YIQ) @ rotation @ RGB_TO_YIQ / 255
    gamma = math.exp(rng.normal(0, preset.gamma) * strength)
    # Not numpy's matmul: BLAS takes 30 times as long for so flat a matrix, and threads of its own.
    x: Array = tint(image, matrix.astype(np.float32), np.float32(gamma))
    middle = x.mean(dtype=np.float64)
    contrast = _between(preset.contrast, strength, rng)
    offset = middle * (1 - contrast) + rng.normal(0, preset.brightness) * strength
    x *= np.float32(contrast)
    x += np.float32(offset)
    if preset.blur and rng.random() < preset.blur:
        x += np.float32(rng.uniform(0, 1)) * (_box(x) - x)
    np.clip(x, 0, 1, out=x)
    x *= 255
    return x


def _regain(
    image: Array,
    preset: _Preset,
    strength: float,
    rng: np.random.Generator,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Array:
    """Gain and offset of each band and of all together, in units of the band's own spread."""
    bands = len(image)
    together = _between(preset.contrast, strength, rng)
    gain = together * np.exp(rng.normal(0, preset.gain * strength, bands))
    shift = rng.normal(0, 2 * preset.brightness * strength) + rng.normal(0, preset.gain * strength, bands)
    middle = np.asarray(mean)
    offset = middle * (1 - gain) + shift * np.asarray(std)
    image *= gain.astype(np.float32)[:, None, None]
    image += offset.astype(np.float32)[:, None, None]
    return image


def _between(limits: tuple[float, float], strength: float, rng: np.random.Generator) -> float:
    """A factor between two limits, brought nearer to or farther from 1 by ``strength``."""
    drawn: float = rng.uniform(*limits)
    return max(0.0, 1 + (drawn - 1) * strength)


def _box(x: Array) -> Array:
    """Mean of 3 x 3 pixels, edges repeated."""
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) * np.float32(1 / 9)
