from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segpipe.config.train import LossConfig
from segpipe.errors import InputError
from segpipe.training.losses import LossValue, StepSums, class_weights, make_loss

CLASSES = 4
CLASS_PX = (50, 20, 5, 25)
CONFIGS = {
    "cross_entropy": LossConfig(),
    "cross_entropy_smooth": LossConfig(label_smoothing=0.1, class_weights="inverse"),
    "focal": LossConfig(cross_entropy=0, focal=1, class_weights="inverse"),
    "focal_root": LossConfig(cross_entropy=0, focal=1, focal_gamma=0.5),
    "dice": LossConfig(cross_entropy=0, dice=1),
    "lovasz": LossConfig(cross_entropy=0, lovasz=1),
    "all": LossConfig(cross_entropy=0.5, focal=2, dice=1.5, lovasz=0.7, label_smoothing=0.05),
}
each_loss = pytest.mark.parametrize("name", CONFIGS)


def batch_of(seed: int, images: int = 6, side: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and real lanes; a third of the pixels, one whole image and one lane are ignored."""
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(images, 3, side, side)))
    labels = rng.integers(0, CLASSES, (images, side, side))
    labels[rng.random(labels.shape) < 0.3] = 255
    labels[rng.integers(images)] = 255
    real = np.ones(images, bool)
    real[rng.integers(images)] = False
    return features, torch.from_numpy(labels), torch.from_numpy(real)


def sums_of(labels: Tensor, real: Tensor, **more: Any) -> StepSums:
    valid = (labels != 255) & real[:, None, None]
    return StepSums(float(valid.sum()), float(valid.flatten(1).any(1).sum()), **more)


def one_worker(name: str, logits: Tensor, labels: Tensor, real: Tensor) -> LossValue:
    return make_loss(CONFIGS[name], CLASS_PX)(logits, labels, real, sums_of(labels, real))


class Workers:
    """Sums over simulated workers: the first round records each worker's tensor, the second returns sums."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def record(self, tensor: Tensor) -> Tensor:
        self.total = tensor.clone() if self.total is None else self.total + tensor
        return tensor

    def answer(self, tensor: Tensor) -> Tensor:
        assert self.total is not None
        assert not tensor.requires_grad
        return tensor.copy_(self.total)  # in place, as torch.distributed does


def gradient_of(total: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad(total, weights)[0]


def logits_of(features: Tensor, weights: Tensor) -> Tensor:
    return F.conv2d(features, weights[:, :, None, None])


# The definitions once more, pixel by pixel.


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def pixels_of(logits: Tensor, labels: Tensor, real: Tensor) -> list[list[tuple[Any, int]]]:
    """For each real image its valid pixels: probabilities of all classes, label."""
    probs = softmax(logits.double().numpy())
    images: list[list[tuple[Any, int]]] = []
    for image in range(len(probs)):
        if real[image]:
            places = [(y, x) for y, x in np.ndindex(*labels.shape[1:]) if labels[image, y, x] != 255]
            images.append([(probs[image, :, y, x], int(labels[image, y, x])) for y, x in places])
    return images


def expected_cross_entropy(images: list[list[tuple[Any, int]]], config: LossConfig) -> float:
    weights = weights_of(config)
    total, count = 0.0, 0
    for pixels in images:
        for probs, label in pixels:
            truth = np.full(CLASSES, config.label_smoothing / CLASSES)
            truth[label] += 1 - config.label_smoothing
            total -= sum(truth[c] * weights[c] * math.log(probs[c]) for c in range(CLASSES))
            count += 1
    return total / count


def expected_focal(images: list[list[tuple[Any, int]]], config: LossConfig) -> float:
    weights = weights_of(config)
    losses = [
        -weights[label] * (1 - probs[label]) ** config.focal_gamma * math.log(probs[label])
        for pixels in images
        for probs, label in pixels
    ]
    return sum(losses) / len(losses)


def expected_dice(images: list[list[tuple[Any, int]]], config: LossConfig) -> float:
    pixels = [pixel for image in images for pixel in image]
    scores = []
    for c in range(CLASSES):
        own = [probs[c] for probs, label in pixels if label == c]
        if own:
            guessed = sum(probs[c] for probs, _ in pixels)
            scores.append((2 * sum(own) + 1) / (guessed + len(own) + 1))
    return 1 - sum(scores) / len(scores)


def expected_lovasz(images: list[list[tuple[Any, int]]], config: LossConfig) -> float:
    """By the definition: the Jaccard loss of the k worst pixels being wrong, k = 0, 1, ..."""
    losses = []
    for pixels in images:
        per_class = []
        for c in sorted({label for _, label in pixels}):
            errors = [(1 - probs[c] if label == c else probs[c], label == c) for probs, label in pixels]
            errors.sort(key=lambda pair: -pair[0])
            size = sum(own for _, own in errors)
            jaccard = []
            for k in range(len(errors) + 1):
                wrong = errors[:k]
                missed = sum(own for _, own in wrong)
                jaccard.append(1 - (size - missed) / (size + len(wrong) - missed))
            per_class.append(sum(e * (jaccard[i + 1] - jaccard[i]) for i, (e, _) in enumerate(errors)))
        if per_class:
            losses.append(sum(per_class) / len(per_class))
    return sum(losses) / len(losses)


def weights_of(config: LossConfig) -> tuple[float, ...]:
    return (1.0,) * CLASSES if config.class_weights == "none" else class_weights("inverse", CLASS_PX)


EXPECTED: dict[str, Callable[[list[list[tuple[Any, int]]], LossConfig], float]] = {
    "cross_entropy": expected_cross_entropy,
    "focal": expected_focal,
    "dice": expected_dice,
    "lovasz": expected_lovasz,
}


@each_loss
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_values_are_those_of_the_definitions(name: str, seed: int) -> None:
    features, labels, real = batch_of(seed)
    logits = 2 * logits_of(features, torch.randn(CLASSES, 3, dtype=torch.float64))
    config = CONFIGS[name]
    value = one_worker(name, logits.float(), labels, real)
    images = pixels_of(logits, labels, real)
    wanted = {part: EXPECTED[part](images, config) for part in EXPECTED if getattr(config, part)}
    assert {part: tensor.item() for part, tensor in value.parts.items()} == pytest.approx(wanted, rel=1e-5)
    total = sum(getattr(config, part) * expected for part, expected in wanted.items())
    assert value.total.item() == pytest.approx(total, rel=1e-5)
    assert value.total.dtype == torch.float32


@pytest.mark.parametrize("kind", ["none", "inverse"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_that_of_torch(kind: Any, smoothing: float) -> None:
    features, labels, _ = batch_of(4)
    real = torch.ones(len(labels), dtype=torch.bool)
    logits = logits_of(features, torch.randn(CLASSES, 3, dtype=torch.float64)).float().requires_grad_()
    config = LossConfig(class_weights=kind, label_smoothing=smoothing)
    sums = sums_of(labels, real)
    value = make_loss(config, CLASS_PX)(logits, labels, real, sums).total
    weights = torch.tensor(weights_of(config), dtype=torch.float32)
    wanted = F.cross_entropy(
        logits, labels, weights, ignore_index=255, reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(value, wanted / sums.valid_px)
    torch.testing.assert_close(gradient_of(value, logits), gradient_of(wanted / sums.valid_px, logits))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_of_gamma_0_is_cross_entropy(gamma: float) -> None:
    features, labels, real = batch_of(5)
    logits = logits_of(features, torch.randn(CLASSES, 3, dtype=torch.float64))
    config = LossConfig(focal=1, focal_gamma=gamma)
    parts = make_loss(config, CLASS_PX)(logits, labels, real, sums_of(labels, real)).parts
    assert torch.allclose(parts["focal"], parts["cross_entropy"]) == (gamma == 0)


@each_loss
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), world=st.integers(1, 3))
def test_mean_over_workers_is_the_loss_and_gradient_of_the_whole_batch(
    name: str, seed: int, world: int
) -> None:
    features, labels, real = batch_of(seed)
    rng = np.random.default_rng(seed)
    weights = torch.from_numpy(rng.normal(size=(CLASSES, 3))).requires_grad_()
    loss = make_loss(CONFIGS[name], CLASS_PX)
    whole = loss(logits_of(features, weights), labels, real, sums_of(labels, real)).total
    ranks = torch.from_numpy(rng.permutation(np.arange(len(labels)) % world))
    shares = [torch.nonzero(ranks == rank)[:, 0] for rank in range(world)]
    workers = Workers()
    for all_reduce in (workers.record, workers.answer):
        sums = sums_of(labels, real, world=world, all_reduce=all_reduce)
        totals = [loss(logits_of(features[i], weights), labels[i], real[i], sums).total for i in shares]
    mean = torch.stack(totals).mean()
    assert mean.item() == pytest.approx(whole.item(), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient_of(mean, weights), gradient_of(whole, weights), rtol=1e-6, atol=1e-9)


def test_every_worker_has_the_same_dice() -> None:
    features, labels, real = batch_of(7)
    logits = logits_of(features, torch.randn(CLASSES, 3, dtype=torch.float64)).float()
    loss, workers = make_loss(CONFIGS["dice"], CLASS_PX), Workers()
    halves = (slice(0, 3), slice(3, 6))
    for all_reduce in (workers.record, workers.answer):
        sums = sums_of(labels, real, world=2, all_reduce=all_reduce)
        values = [loss(logits[half], labels[half], real[half], sums).total.item() for half in halves]
    assert values[0] == values[1]


@pytest.mark.parametrize("name", ["cross_entropy_smooth", "focal", "lovasz"])
def test_micro_batches_add_up_to_the_step(name: str) -> None:
    features, labels, real = batch_of(8)
    weights = torch.randn(CLASSES, 3, dtype=torch.float64, requires_grad=True)
    loss, sums = make_loss(CONFIGS[name], CLASS_PX), sums_of(labels, real)
    whole = loss(logits_of(features, weights), labels, real, sums).total
    micro = [slice(0, 2), slice(2, 6)]
    parts = [loss(logits_of(features[i], weights), labels[i], real[i], sums).total for i in micro]
    torch.testing.assert_close(gradient_of(sum(parts), weights), gradient_of(whole, weights))  # type: ignore[arg-type]


def test_dice_of_micro_batches_is_their_mean_by_share() -> None:
    features, labels, real = batch_of(9)
    logits = logits_of(features, torch.randn(CLASSES, 3, dtype=torch.float64))
    loss = make_loss(CONFIGS["dice"], CLASS_PX)
    args = (logits, labels, real)
    alone, part = (loss(*args, sums_of(labels, real, share=share)).total.item() for share in (1.0, 0.25))
    assert part == pytest.approx(0.25 * alone)


@each_loss
@pytest.mark.parametrize("how", ["labels", "lanes"])
def test_a_step_without_labels_has_loss_0_and_gradients_0(name: str, how: str) -> None:
    logits = torch.randn(2, CLASSES, 3, 3, requires_grad=True)
    labels = torch.full((2, 3, 3), 255 if how == "labels" else 1)
    real = torch.full((2,), how == "labels")
    value = one_worker(name, logits, labels, real).total
    assert value.item() == 0
    assert torch.equal(gradient_of(value, logits), torch.zeros_like(logits))


@each_loss
def test_ignored_pixels_and_lanes_change_nothing(name: str) -> None:
    features, labels, real = batch_of(10)
    logits = logits_of(features, torch.randn(CLASSES, 3, dtype=torch.float64)).float()
    ignored = (labels == 255) | ~real[:, None, None]
    other = torch.where(ignored[:, None], torch.randn_like(logits) * 10, logits).requires_grad_()
    value = one_worker(name, other, labels, real).total
    assert value.item() == one_worker(name, logits, labels, real).total.item()
    assert not gradient_of(value, other).abs().sum(dim=1)[ignored].any()


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    high = 1e30 if dtype == torch.bfloat16 else 6e4
    logits = torch.tensor([0.0, high, -high, 0.0]).view(1, CLASSES, 1, 1).repeat(2, 1, 2, 2)
    logits = logits.to(dtype).requires_grad_()
    labels = torch.tensor([[[0, 1], [2, 255]], [[1, 1], [1, 1]]])
    value = one_worker(name, logits, labels, torch.ones(2, dtype=torch.bool)).total
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert gradient_of(value, logits).isfinite().all()


def test_half_precision_logits_are_computed_in_float32_under_autocast() -> None:
    features, labels, real = batch_of(11)
    logits = logits_of(features, torch.randn(CLASSES, 3, dtype=torch.float64)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = one_worker("all", logits, labels, real).total
    assert torch.equal(mixed, one_worker("all", logits.float(), labels, real).total)


@each_loss
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    features, labels, real = batch_of(12, images=3, side=2)
    logits = logits_of(features, torch.randn(CLASSES, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: one_worker(name, x, labels, real).total, logits, fast_mode=True)


def test_inverse_weights_are_proportional_to_1_over_frequency() -> None:
    weights = class_weights("inverse", (60, 30, 10))
    assert weights == pytest.approx((1 / 1.8, 1 / 0.9, 1 / 0.3))


def test_median_frequency_counts_only_images_that_hold_the_class() -> None:
    # Two images of 100 px; the third class is in one of them only.
    px, present = (120, 60, 20), (200, 200, 100)
    raw = np.median([0.6, 0.3, 0.2]) / np.array([0.6, 0.3, 0.2])
    wanted = raw / (np.array(px) / 200 @ raw)
    assert class_weights("median_frequency", px, present) == pytest.approx(tuple(wanted))
    assert class_weights("median_frequency", px) == pytest.approx(class_weights("inverse", px))


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=30).filter(any))
def test_weights_times_frequencies_are_1_and_absent_classes_weigh_0(px: list[int]) -> None:
    for kind in ("inverse", "median_frequency"):
        weights = class_weights(kind, px)
        assert sum(w * n / sum(px) for w, n in zip(weights, px, strict=True)) == pytest.approx(1)
        assert all((weight > 0) == (count > 0) for weight, count in zip(weights, px, strict=True))


def test_weights_without_labelled_pixels_are_refused() -> None:
    with pytest.raises(InputError, match="hold none"):
        make_loss(LossConfig(class_weights="inverse"), (0, 0))
