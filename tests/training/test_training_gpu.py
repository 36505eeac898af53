"""Training on a GPU: number formats, compiled and sharded networks, resume, validation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import Seen, tiny_config, train
from tiny import tiny_dataset

from segpipe.config.train import ValidationConfig
from segpipe.datasets.prepared import open_dataset
from segpipe.models.file import load_model
from segpipe.pipelines.resources import Hardware
from segpipe.storage import open_storage
from segpipe.training.comm import Comm
from segpipe.training.history import read_steps
from segpipe.training.validate import count_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false here"),
]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_dataset(tmp_path_factory.mktemp("data"), samples=28)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, as Ray Train makes it on GPUs."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


LONG = {"train__steps": 60, "validation__every_steps": 30, "train__ema_decay": 0.9}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_number_format_learns(uri: str, tmp_path: Path, precision: str) -> None:
    seen = Seen()
    done = train(tiny_config(uri, tmp_path / "run", train__precision=precision, **LONG), seen)
    assert seen.steps[-1].loss < 0.5 * seen.steps[0].loss
    assert done.metric is not None
    assert done.metric > 0.5


def test_a_gpu_learns_what_a_cpu_learns(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    losses, cpus = [], Hardware(nodes=1, cpus=2, gpus=0)
    for name in ("gpu", "cpu"):
        if name == "cpu":
            monkeypatch.setattr("segpipe.pipelines.local.this_machine", lambda: cpus)
        sets = {"train__precision": "fp32", "train__batch_norm": "frozen", "train__lr": 1e-3}
        train(tiny_config(uri, tmp_path / name, **sets))
        losses.append(read_steps(open_storage(str(tmp_path / name)))["loss"].to_numpy())
    assert np.abs(losses[0] - losses[1]).max() < 2e-2


def test_a_compiled_network_learns(uri: str, tmp_path: Path) -> None:
    seen = Seen()
    train(tiny_config(uri, tmp_path / "run", train__compile=True, **LONG), seen)
    assert seen.steps[-1].loss < 0.5 * seen.steps[0].loss


def test_sharded_parameters_give_the_losses_of_whole_ones(uri: str, tmp_path: Path, group: None) -> None:
    losses = []
    for parallel in ("ddp", "fsdp"):
        config = tiny_config(
            uri, tmp_path / parallel, train__parallel=parallel, train__precision="fp32", train__ema_decay=0.9
        )
        train(config)
        losses.append(read_steps(open_storage(str(tmp_path / parallel)))["loss"].to_numpy())
    assert np.abs(losses[0] - losses[1]).max() < 2e-2


def test_a_sharded_training_goes_on(uri: str, tmp_path: Path, group: None) -> None:
    config = tiny_config(uri, tmp_path / "run", train__parallel="fsdp", train__ema_decay=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(config, Seen(6))
    seen = Seen()
    assert train(config, seen).steps == 12
    assert seen.steps[0].step == 5


def test_synchronised_batch_norm_learns_and_its_model_file_loads(
    uri: str, tmp_path: Path, group: None
) -> None:
    train(tiny_config(uri, tmp_path / "run", train__batch_norm="sync", **LONG))
    model, _ = load_model(str(tmp_path / "run/model.safetensors"))
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())


def test_an_interrupted_training_goes_on(uri: str, tmp_path: Path) -> None:
    config = tiny_config(uri, tmp_path / "run", train__precision="fp16")
    with pytest.raises(KeyboardInterrupt):
        train(config, Seen(7))
    assert train(config).steps == 12


def test_validation_counts_are_nearly_those_of_a_cpu(uri: str, tmp_path: Path) -> None:
    train(tiny_config(uri, tmp_path / "run", **LONG))
    model, card = load_model(str(tmp_path / "run/model.safetensors"))
    config, dataset = ValidationConfig(splits=("val",), tile_px=64, margin_px=8), open_dataset(uri)
    on_cpu, on_gpu = (
        count_images(model, card, dataset, config, Comm(), device, 1) for device in ("cpu", "cuda:0")
    )
    assert on_cpu.sum() == on_gpu.sum()
    assert np.abs(on_cpu - on_gpu).sum() < 0.02 * on_cpu.sum()
