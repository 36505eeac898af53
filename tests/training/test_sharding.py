"""Every network family goes forward and back with sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from segpipe.models.families import build
from segpipe.training import sharding
from segpipe.training.sharding import shard


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("unet", {"width": 32, "depth": 3}),
        ("unet_mobilenet_v2", {}),
        ("fcn_resnet50", {}),
        ("deeplabv3_resnet50", {}),
        ("lraspp_mobilenet_v3_large", {}),
    ],
)
def test_a_sharded_network_computes_what_a_whole_one_does(
    family: str, options: dict[str, int], group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "_OWN_SHARD_NUMEL", 1 << 16)  # most parts of the small ones too
    torch.manual_seed(0)
    model = build(family, bands=3, classes=2, **options).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    found = model(x)
    assert torch.allclose(found, expected, atol=1e-4)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
