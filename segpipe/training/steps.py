"""One optimiser step over a global batch, the same for every number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from segpipe.config.card import IGNORE
from segpipe.config.train import TrainConfig
from segpipe.datasets.batches import TrainBatch
from segpipe.inference.device import DTYPES
from segpipe.inference.network import first_call
from segpipe.training.comm import Comm
from segpipe.training.losses import Loss, StepSums
from segpipe.training.network import Network
from segpipe.training.optimizer import rate, set_rate
from segpipe.training.passes import passes


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step did, still on the device: reading it waits for the device."""

    step: int
    """Steps done, this one included."""
    epoch: int
    values: Tensor
    """float64: loss, then its parts in the order of ``names``; over all workers."""
    names: tuple[str, ...]
    valid_px: int
    grad_norm: Tensor
    lr: float
    sample_ids: tuple[str, ...]


class Stepper:
    """Runs steps of one worker. Its random numbers (dropout) follow from seed, step and rank alone."""

    def __init__(
        self, config: TrainConfig, network: Network, loss: Loss, comm: Comm, total_steps: int, precision: str
    ) -> None:
        self._config, self._network, self._loss, self._comm = config.train, network, loss, comm
        self._total_steps = total_steps
        self._device = torch.device(network.device)
        self._dtype = DTYPES[precision]
        self.scaler = torch.amp.GradScaler(self._device.type) if precision == "fp16" else None
        self._builds = self._config.compile
        """torch.compile builds in the next forward pass, the first."""

    def restore_scale(self, scale: float) -> None:
        """Go on with a loss scale of fp16."""
        if self.scaler is not None:
            self.scaler = torch.amp.GradScaler(self._device.type, init_scale=scale)

    def run(self, batch: TrainBatch) -> StepOutcome:
        """One step: forward, backward, optimiser, running average.

        Raises `ConfigError` where torch.compile cannot build the network.
        """
        config = self._config
        torch.manual_seed(((config.seed * 1_000_003 + batch.step) * 65_537 + self._comm.rank) % 2**63)
        factor = rate(batch.step, self._total_steps, config)
        set_rate(self._network.optimizer, factor)
        self._network.optimizer.zero_grad(set_to_none=True)
        batch = self._filled(batch)
        valid_px, images = self._count(batch)
        values, names = self._backward(batch, valid_px, images)
        grad_norm = self._apply()
        self._network.update_average(batch.step)
        return StepOutcome(
            step=batch.step + 1,
            epoch=batch.epoch,
            values=values,
            names=names,
            valid_px=int(valid_px),
            grad_norm=grad_norm,
            lr=config.lr * factor,
            sample_ids=batch.sample_ids,
        )

    def _filled(self, batch: TrainBatch) -> TrainBatch:
        """The batch with as many lanes as the largest share has: workers must agree on forward passes."""
        lacking = -(-self._config.global_batch // self._comm.world) - len(batch.real)
        if lacking <= 0:
            return batch
        first = torch.zeros(lacking, dtype=torch.long)
        places = torch.cat((torch.arange(len(batch.real)), first))
        labels, real = batch.labels[places], batch.real[places]
        labels[-lacking:], real[-lacking:] = IGNORE, False
        return replace(batch, images=batch.images[places], labels=labels, real=real)

    def _count(self, batch: TrainBatch) -> tuple[float, float]:
        """Valid pixels, and images that have any, of the whole step. On the CPU: no GPU is waited for."""
        valid = (batch.labels != IGNORE).flatten(1).sum(1)
        valid_px, images = self._comm.all_reduce(torch.stack((valid.sum(), (valid > 0).sum())).double())
        return float(valid_px), float(images)

    def _backward(self, batch: TrainBatch, valid_px: float, images: float) -> tuple[Tensor, tuple[str, ...]]:
        """Gradients of the step's loss; its value and parts over all workers, float64."""
        parts = list(self._micro_batches(batch))
        total, names = torch.zeros(0), tuple[str, ...]()
        for number, (x, labels, real) in enumerate(parts):
            sums = StepSums(
                valid_px=valid_px,
                images=images,
                world=self._comm.world,
                all_reduce=self._comm.all_reduce,
                share=1 / len(parts),
            )
            last = number == len(parts) - 1
            with nullcontext() if last else self._network.no_sync():
                with self._autocast():
                    logits = first_call(
                        self._network.forward, x, compile_network=self._builds, key="train.compile"
                    )
                    self._builds = False
                result = self._loss(logits, labels, real, sums)
                scaled = result.total if self.scaler is None else self.scaler.scale(result.total)
                scaled.backward()  # type: ignore[no-untyped-call]
            names = ("loss", *result.parts)
            one = torch.stack([result.total.detach(), *result.parts.values()]).double()
            total = one if number == 0 else total + one
        return self._comm.all_reduce(total) / self._comm.world, names

    def _micro_batches(self, batch: TrainBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start, stop in passes(len(batch.labels), self._config.micro_batch):
            x = self._moved(batch.images[start:stop]).contiguous(memory_format=torch.channels_last)
            yield x, self._moved(batch.labels[start:stop]), self._moved(batch.real[start:stop])

    def _moved(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def _apply(self) -> Tensor:
        """Clip and step. Returns the norm of all gradients, before they were clipped."""
        optimizer, clip = self._network.optimizer, self._config.clip_norm
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        parameters = list(self._network.plain.parameters())
        # Taken without clipping too, since it tells in which step gradients stop being finite.
        grad_norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, grad_norm)
        if hasattr(grad_norm, "full_tensor"):  # of sharded parameters: each worker holds a part
            grad_norm = grad_norm.full_tensor()
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        return grad_norm
