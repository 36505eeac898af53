"""Losses of a step that is spread over workers and micro-batches. Shapes: b images, C classes, H, W pixels.

Every loss is scaled so that the gradients' mean over the workers, which is what data-parallel training
takes, is the gradient of the loss of the whole global batch; the mean of the values is that loss. Pixels
with the label 255 and lanes that are not real add nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from segpipe.config.card import IGNORE
from segpipe.config.train import LossConfig
from segpipe.errors import InputError

_DICE_SMOOTH_PX: Final = 1.0
# Below it 1 - p counts as 0: its powers under 1 have an infinite slope there.
_LEAST_MISS: Final = 1e-12


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class StepSums:
    """What a worker must know of the whole step, over all workers and micro-batches."""

    valid_px: float
    """Pixels that are not ignored."""
    images: float
    """Images with such a pixel."""
    world: int = 1
    """Workers."""
    all_reduce: Callable[[Tensor], Tensor] = _unchanged
    """Sum over the workers of a tensor without gradient, which it may overwrite. Called once where Dice has
    a weight, so all workers must make the same number of calls."""
    share: float = 1.0
    """Part of the step that this micro-batch is, the same on all workers; of one step they add up to 1."""


@dataclass(frozen=True, slots=True)
class LossValue:
    """Scalars, float32. Summed over micro-batches and averaged over workers they are those of the step."""

    total: Tensor
    """The weighted sum; carries the gradient."""
    parts: dict[str, Tensor]
    """Each loss with a weight above 0, by its name in the config, before its weight; without gradient."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the losses share. Ignored pixels have the label 255 and are not valid."""

    log_probs: Tensor
    """float32 (b, C, H, W)."""
    labels: Tensor
    """int64 (b, H, W)."""
    valid: Tensor
    """bool (b, H, W)."""
    weights: Tensor | None
    """float32 (C,)."""
    sums: StepSums


class Loss:
    """The weighted sum of losses that a config asks for."""

    def __init__(self, config: LossConfig, class_weights: Sequence[float] | None) -> None:
        self._config = config
        self._weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
        terms: dict[str, tuple[float, Callable[[_Batch], Tensor]]] = {
            "cross_entropy": (config.cross_entropy, self._cross_entropy),
            "focal": (config.focal, self._focal),
            "dice": (config.dice, _dice),
            "lovasz": (config.lovasz, _lovasz),
        }
        self._terms = {name: term for name, term in terms.items() if term[0] > 0}

    def __call__(self, logits: Tensor, labels: Tensor, real: Tensor, sums: StepSums) -> LossValue:
        """The loss of one worker's micro-batch.

        Args:
            logits: floats (b, C, H, W); computed in float32 at least, whatever the autocast.
            labels: int64 (b, H, W) on the logits' device, 255 = ignored.
            real: bool (b,); false lanes count as ignored.
            sums: of the whole step. Without any valid pixel the loss is 0, and so are its gradients.
        """
        with torch.autocast(logits.device.type, enabled=False):
            precise = torch.promote_types(logits.dtype, torch.float32)
            labels = labels.where(real[:, None, None], IGNORE)
            log_probs = F.log_softmax(logits, dim=1, dtype=precise)
            if self._weights is not None:
                self._weights = self._weights.to(log_probs)  # moved by the first call only
            batch = _Batch(log_probs, labels, labels != IGNORE, self._weights, sums)
            values = {name: term(batch) for name, (_, term) in self._terms.items()}
            total = torch.stack([self._terms[name][0] * value for name, value in values.items()]).sum()
        return LossValue(total, {name: value.detach() for name, value in values.items()})

    def _cross_entropy(self, batch: _Batch) -> Tensor:
        """Cross-entropy; with label smoothing as torch defines it (Szegedy et al. 2016)."""
        loss = _nll(batch, batch.weights)
        smoothing = self._config.label_smoothing
        if smoothing:
            log_probs, weights = batch.log_probs, batch.weights
            weighted = log_probs if weights is None else log_probs * weights[:, None, None]
            spread = -weighted.mean(dim=1).where(batch.valid, 0.0)
            loss = (1 - smoothing) * loss + smoothing * spread
        return _pixel_mean(loss, batch.sums)

    def _focal(self, batch: _Batch) -> Tensor:
        """Focal loss, softmax form: -w (1 - p)^gamma log p (Lin et al. 2017)."""
        plain = _nll(batch, None)
        weighted = plain if batch.weights is None else _nll(batch, batch.weights)
        miss = -torch.expm1(-plain)  # 1 - p, exact where p is near 1
        return _pixel_mean(miss.clamp(min=_LEAST_MISS) ** self._config.focal_gamma * weighted, batch.sums)


def make_loss(
    config: LossConfig, class_px: tuple[int, ...], present_px: tuple[int, ...] | None = None
) -> Loss:
    """The loss of a config.

    Args:
        config: which losses, and the kind of class weights.
        class_px: pixels of each class in the training splits.
        present_px: of each class the labelled pixels of all images that hold it, for ``median_frequency``;
            none: those of all images (the weights are then those of ``inverse``, which differ by a factor).

    Raises:
        InputError: class weights are asked for, and no class has a pixel.
    """
    if config.class_weights == "none":
        return Loss(config, None)
    return Loss(config, class_weights(config.class_weights, class_px, present_px))


def class_weights(
    kind: str, class_px: Sequence[int], present_px: Sequence[int] | None = None
) -> tuple[float, ...]:
    """Weights of the classes with sum(frequency * weight) = 1, so that they do not change the loss's scale.

    ``inverse``: 1 / frequency. ``median_frequency``: median of the frequencies / frequency, each among the
    images that hold the class (Eigen and Fergus 2015). A class without pixels has the weight 0: it is never
    a label, and label smoothing shall not draw the network to what it cannot learn.
    """
    total = sum(class_px)
    if not total:
        raise InputError(
            "class weights need labelled pixels, and the training splits hold none",
            "train.loss.class_weights",
            "Set it to none, or prepare the data set with labels.",
        )
    within = present_px if kind == "median_frequency" and present_px is not None else [total] * len(class_px)
    rates = [px / of if px else 0.0 for px, of in zip(class_px, within, strict=True)]
    median = statistics.median(rate for rate in rates if rate)
    raw = [median / rate if rate else 0.0 for rate in rates]
    scale = sum(px / total * weight for px, weight in zip(class_px, raw, strict=True))
    return tuple(weight / scale for weight in raw)


def _nll(batch: _Batch, weights: Tensor | None) -> Tensor:
    """-w log p of each pixel's label, (b, H, W), 0 where it is ignored."""
    # Not reduced here: on GPUs torch's own reduction of it adds in any order.
    return F.nll_loss(batch.log_probs, batch.labels, weights, ignore_index=IGNORE, reduction="none")


def _pixel_mean(loss: Tensor, sums: StepSums) -> Tensor:
    return loss.sum() * (sums.world / max(sums.valid_px, 1.0))


def _dice(batch: _Batch) -> Tensor:
    """1 - mean Dice over the classes among the labels, of soft counts over all workers' pixels.

    Dice of a class is (2 I + s) / (P + T + s): I probabilities of the class summed over its own pixels, P
    over all valid pixels, T its pixels, s = 1 pixel (Milletari et al. 2016, with first powers).
    """
    probs, sums = batch.log_probs.exp(), batch.sums
    classes = torch.arange(probs.shape[1], device=probs.device)
    own = batch.labels[:, None] == classes[:, None, None]
    inside = probs.where(own, 0.0).sum(dim=(0, 2, 3))
    guessed = probs.where(batch.valid[:, None], 0.0).sum(dim=(0, 2, 3))
    local = torch.stack((inside, guessed, own.sum(dim=(0, 2, 3)).to(probs)))
    # The value is that of all workers, bit for bit; the gradient goes through this worker's part.
    both = sums.all_reduce(local.detach().clone()) + sums.world * (local - local.detach())
    inside, guessed, labelled = both.unbind()
    score = (2 * inside + _DICE_SMOOTH_PX) / (guessed + labelled + _DICE_SMOOTH_PX)
    present = labelled > 0
    return sums.share * (1 - score).where(present, 0.0).sum() / present.sum().clamp(min=1)


def _lovasz(batch: _Batch) -> Tensor:
    """Lovasz-softmax (Berman et al. 2018) of each image over the classes in it, averaged over images.

    Per class: the errors |label - p| of the valid pixels, sorted downwards, times the steps of the Jaccard
    loss along that order. The order is no function that has a gradient, so the steps are factors of the
    pixels' errors, brought back to their places.
    """
    probs = batch.log_probs.exp()
    count, classes = probs.shape[:2]
    labels, valid = batch.labels.flatten(1), batch.valid.flatten(1)
    rows = torch.arange(count, device=labels.device)[:, None] * classes
    bins = torch.where(valid, rows + labels, count * classes).flatten()
    class_px = torch.bincount(bins, minlength=count * classes + 1)[:-1].view(count, classes)
    in_image = (class_px > 0).sum(dim=1, keepdim=True).clamp(min=1)
    # One answer from the device saves the sort of every class that no image holds.
    in_batch = class_px.any(dim=0).tolist()
    loss = 0.0 * probs.sum()
    for index, prob in enumerate(probs.flatten(2).unbind(1)):
        if in_batch[index]:
            own = labels == index
            errors = torch.where(own, 1 - prob, prob)
            steps = _jaccard_steps(errors.detach(), own, valid, class_px[:, index, None])
            loss = loss + (errors * (steps / in_image)).sum()
    return loss * (batch.sums.world / max(batch.sums.images, 1.0))


def _jaccard_steps(errors: Tensor, own: Tensor, valid: Tensor, class_px: Tensor) -> Tensor:
    """By how much each pixel raises the Jaccard loss of a class if the pixels turn wrong, worst errors first.

    (b, N); 0 for ignored pixels, and in images without the class. ``class_px`` (b, 1): its pixels.
    """
    order = errors.where(valid, -1.0).argsort(dim=1, descending=True, stable=True)
    own_sorted = own.gather(1, order)
    own_wrong = own_sorted.cumsum(dim=1)
    others_wrong = torch.arange(1, errors.shape[1] + 1, device=errors.device) - own_wrong
    left = (class_px - own_wrong).to(errors)
    union = (class_px + others_wrong).to(errors)
    # Differences of the Jaccard index I / U, without the cancellation: own pixels lower I, others raise U.
    steps = torch.where(own_sorted, 1 / union, left / union / (union - 1))
    steps = torch.zeros_like(steps).scatter_(1, order, steps)
    return steps.where(valid & (class_px > 0), 0.0)
