"""The engine's pieces, one by one: kernels, folding, compilation's errors, device facts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from engines import TILE_PX
from torch import Tensor, nn

from segpipe.errors import ConfigError
from segpipe.geometry.grid import make_grid
from segpipe.inference import kernels
from segpipe.inference.device import default_batch_size, resolve_precision
from segpipe.inference.jobs import BlockJob
from segpipe.inference.network import first_call, fold_batch_norms

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("classes", [1, 2, 3, 19])
@pytest.mark.parametrize("low", [(8, 8), (7, 13), (64, 64), (1, 3)])
def test_compiled_upsampling_equals_interpolate_and_argmax(classes: int, low: tuple[int, int]) -> None:
    torch.manual_seed(classes)
    for smooth in (1, 3):
        logits = F.avg_pool2d(torch.randn(1, classes, *low), smooth, 1, smooth // 2)
        expected = (
            F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False).argmax(1)[0].numpy()
        )
        low_logits = logits[0].permute(1, 2, 0).contiguous().numpy()
        mask = np.full((70, 70), 9, np.uint8)
        kernels.classes_from_low(low_logits, 64, (5, 64, 0, 50), mask, 2, 3)
        np.testing.assert_array_equal(mask[2:61, 3:53], expected[5:, :50])
        mask[2:61, 3:53] = 9
        assert (mask == 9).all(), "written outside of the cell"


@pytest.mark.parametrize("classes", [2, 3])
def test_equal_logits_go_to_the_first_class(classes: int) -> None:
    low_logits = np.zeros((4, 4, classes), np.float32)
    low_logits[2:] = np.arange(classes, 0, -1, dtype=np.float32) % classes
    mask = np.full((32, 32), 9, np.uint8)
    kernels.classes_from_low(low_logits, 32, (0, 32, 0, 32), mask, 0, 0)
    logits = torch.from_numpy(low_logits).permute(2, 0, 1)[None]
    expected = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(mask, expected.argmax(1)[0].numpy())
    kernels.classes_from_full(np.zeros((32, 32, classes), np.float32), (0, 32, 0, 32), mask, 0, 0)
    assert (mask == 0).all()


def test_folding_keeps_the_logits_and_leaves_the_model_alone(unet: nn.Module) -> None:
    x = torch.randn(1, 3, TILE_PX, TILE_PX)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    folded = fold_batch_norms(unet)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), unet(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())


class Awkward(nn.Module):
    """Batch norms that may not be folded.

    Of a convolution that is called twice, or whose result or weights something else reads, and one without
    statistics of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.plain, self.unknown = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)
        self.seen, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.bias = nn.Parameter(torch.randn(8, 1, 1))
        for norm in (*self.norms, self.norm):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.norms[0](self.conv(x))
        y = self.norms[2](self.shared(self.norms[1](self.shared(first))))
        y = self.norm(self.seen(y)) + self.seen.weight.mean()
        read_twice = self.plain(y)
        return self.unknown(self.norms[3](read_twice) + read_twice + self.bias)


def test_only_what_a_batch_norm_has_for_itself_is_folded_into() -> None:
    torch.manual_seed(0)
    model = Awkward().eval()
    x = torch.randn(1, 3, 9, 9)
    folded = fold_batch_norms(model)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 5
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded.half()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_folding_changes_no_function_that_other_threads_may_be_compiling() -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(vars(math) == before)
            return self.conv(x)

    seen: list[bool] = []
    before = dict(vars(math))
    fold_batch_norms(Watching().eval())
    assert seen == [True]


def test_failing_compilation_says_what_to_install() -> None:
    def no_compiler(x: Tensor) -> Tensor:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    with pytest.raises(ConfigError, match=r"inference\.compile.*No working C\+\+ compiler.*Install"):
        first_call(no_compiler, torch.zeros(1), compile_network=True)
    with pytest.raises(RuntimeError, match="No working"):
        first_call(no_compiler, torch.zeros(1), compile_network=False)


def test_device_facts_follow_from_the_hardware(monkeypatch: Any) -> None:
    assert resolve_precision("cpu") == "fp32"
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, s=supported, **__: s)
        assert resolve_precision("cuda:0") == expected
    assert default_batch_size("cpu") < default_batch_size("cuda:0")


def test_a_block_job_counts_its_reduced_size_up() -> None:
    plan = make_grid(7, 10, tile_px=64, margin_px=8, block_px=99, downsample=4).block(0).tiles
    assert BlockJob(np.zeros((3, 7, 10), np.uint8), None, plan).reduced_shape == (2, 3)
