"""The network of one worker: built, started, placed on its device, copied or sharded over the workers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segpipe.config.card import ModelCard
from segpipe.config.train import TrainConfig
from segpipe.errors import ConfigError, InputError
from segpipe.models.families import build_of
from segpipe.training.average import RunningAverage
from segpipe.training.checkpoint import Checkpoint
from segpipe.training.comm import Comm
from segpipe.training.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Later versions of torch have another name, and warn of this one.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


class Network:
    """A network with its optimiser and running average.

    ``forward`` is what steps call; ``plain`` has the parameters under the names of the model file.
    """

    def __init__(self, config: TrainConfig, card: ModelCard, comm: Comm, device: str) -> None:
        self._config, self._card, self._comm, self.device = config, card, comm, device
        steps = config.train
        torch.manual_seed(steps.seed)
        model = build_of(card)
        self.start_lines: list[str] = []
        is_backbone = _nothing
        if config.init.weights is not None:
            from segpipe.models.pretrained import load_start

            report = load_start(model, card, config.init)
            self.start_lines = report.lines()
            if report.kind.startswith("torchvision") and config.model.normalise == "dataset":
                self.start_lines.append("these weights expect model.normalise: imagenet (8-bit RGB)")
            is_backbone = report.is_backbone
        self._sharded = steps.parallel == "fsdp"
        plain: nn.Module = model.to(device)
        if not self._sharded:  # FSDP takes contiguous parameters only
            plain = plain.to(memory_format=torch.channels_last)
        if steps.batch_norm == "sync":
            plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain)  # type: ignore[no-untyped-call]
        self.average = RunningAverage(plain, steps.ema_decay) if steps.ema_decay else None
        if self._sharded:
            self._shard(plain)
        self.plain = plain
        self.optimizer = make_optimizer(plain, steps, is_backbone)
        self.forward = self._wrap(plain)
        self.train_mode()

    def train_mode(self) -> None:
        """Make the network ready for steps; validation leaves it in eval mode."""
        self.forward.train()
        self.plain.train()
        if self._config.train.batch_norm == "frozen":
            for module in self.plain.modules():
                if isinstance(module, _BATCH_NORMS):
                    module.eval()

    def no_sync(self) -> AbstractContextManager[None]:
        """Within this no gradients are exchanged: for all backward passes of a step but the last."""
        if isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return _unsynced(self.plain) if self._sharded else nullcontext()

    def update_average(self, step: int) -> None:
        if self.average is not None:
            self.average.update(self.plain, step)

    def network_to_score(self) -> nn.Module:
        """The whole network that is validated and kept, with worker 0's values on every worker.

        Batch norm statistics differ from worker to worker; worker 0's count.
        """
        source = self.plain if self.average is None else self.average.model
        if self._sharded or self._config.train.batch_norm == "sync":
            return self._rebuilt(source)
        self._comm.broadcast(source.state_dict().values())
        if self.device.startswith("cuda"):  # who scores it copies it on a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        return source

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds; every worker must call this."""
        found = _named("model", self.plain.state_dict())
        if self.average is not None:
            found |= _named("average", self.average.state_dict())
        found |= _named("optimizer", optimizer_tensors(self.optimizer, self.plain))
        if self._sharded:
            from segpipe.training.sharding import whole

            return whole(found)
        return found

    def load(self, checkpoint: Checkpoint, where: str) -> None:
        """Go on from a checkpoint. Raises `InputError` for one of another network."""
        model, optimizer = checkpoint.part("model"), checkpoint.part("optimizer")
        average = checkpoint.part("average")
        own = self.plain.state_dict()
        if model.keys() != own.keys() or any(model[name].shape != own[name].shape for name in model):
            raise InputError(
                "the checkpoint holds another network", where, "Choose another --output, or delete it."
            )
        if self._sharded:
            from segpipe.training.sharding import scattered

            model, average, optimizer = (scattered(part, own) for part in (model, average, optimizer))
        self.plain.load_state_dict(model)
        if self.average is not None:
            self.average.load_state_dict(average)
        load_optimizer_tensors(self.optimizer, self.plain, optimizer)

    def _wrap(self, plain: nn.Module) -> nn.Module:
        wrapped: Any = torch.compile(plain) if self._config.train.compile else plain
        if self._comm.world > 1 and not self._sharded:
            ids = [torch.device(self.device).index or 0] if self.device.startswith("cuda") else None
            wrapped = DistributedDataParallel(wrapped, device_ids=ids, **_OWN_BUFFERS)
        return wrapped

    def _shard(self, plain: nn.Module) -> None:
        from segpipe.training.sharding import shard

        shard(plain)
        if self.average is not None:
            shard(self.average.model)

    def _rebuilt(self, source: nn.Module) -> nn.Module:
        """A plain network with the values of one that is sharded or has layers of several workers."""
        from segpipe.training.sharding import whole

        card = self._card
        model = build_of(card)
        values = whole(source.state_dict())
        self._comm.broadcast(values.values())
        model.load_state_dict(values)
        return model.to(self.device)


def check_hardware(config: TrainConfig, device: str) -> None:
    """Refuse what this device cannot do. Raises `ConfigError`."""
    steps = config.train
    if device.startswith("cuda"):
        if steps.parallel == "fsdp" and config.cluster.executor == "local" and not dist.is_initialized():
            raise ConfigError(
                "fsdp shards over workers, and executor local has one", "train.parallel", "Use ddp, or ray."
            )
        return
    for value, wrong, key, fix in (
        (steps.batch_norm, "sync", "train.batch_norm", "Use train, or frozen."),
        (steps.parallel, "fsdp", "train.parallel", "Use ddp."),
        (steps.precision, "fp16", "train.precision", "Use fp32, bf16 or auto."),
    ):
        if value == wrong:
            raise ConfigError(f"{wrong} needs GPUs, and there is none", key, fix)


def evaluation_copy(card: ModelCard, tensors: dict[str, Tensor]) -> nn.Module:
    """A network of the card's family on the CPU, with these weights."""
    model = build_of(card)
    model.load_state_dict(tensors)
    return model.eval()


def _named(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": value for name, value in tensors.items()}


def _nothing(name: str) -> bool:
    return False


@contextmanager
def _unsynced(module: nn.Module) -> Iterator[None]:
    module.set_requires_gradient_sync(False)  # type: ignore[operator]
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)  # type: ignore[operator]
