"""The engine on a GPU: the CPU's classes, the same bits for every cut, no race between its streams.

Run: python -m pytest --noconftest -m gpu tests/gpu
Needs torch, numpy and numba alone, and torchvision for LR-ASPP. ``SEGPIPE_TEST_DEVICE=cpu`` runs all but the
claims about device memory on a CPU, through the same compute path.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.errors import SegpipeError
from segpipe.geometry.grid import SceneGrid, Window, make_grid
from segpipe.inference.cpu_path import CpuPath
from segpipe.inference.engine import Engine, EngineConfig
from segpipe.inference.torch_path import TorchPath
from segpipe.models.families import build

DEVICE: Final = torch.device(os.environ.get("SEGPIPE_TEST_DEVICE", "cuda:0"))
ON_GPU: Final = DEVICE.type == "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        ON_GPU and not torch.cuda.is_available(), reason="torch.cuda.is_available() is false on this machine"
    ),
]

TILE_PX: Final = 256
MARGIN_PX: Final = 32
BATCH: Final = 4
CLASSES: Final = 3
NETWORKS: Final[dict[str, dict[str, int]]] = {
    "unet": {"width": 16},
    "lraspp_mobilenet_v3_large": {},
    "unet_mobilenet_v2": {},
}

FP32_PPM: Final = 50
"""Pixels in 10^6 that CPU and GPU may class differently in fp32: near ties, tipped by the order of sums.

TF32 keeps 10 bits of 23 and changes thousands.
"""
BLEND_PPM: Final = 100
"""The same where logits are added up over tiles or pixels over groups."""
HALF_AGREEMENT: Final = 0.98

Array = np.ndarray[Any, Any]
MakeEngine = Callable[..., Engine]


def make_card(classes: int = CLASSES, dtype: str = "uint8") -> ModelCard:
    scale = {"uint8": 1.0, "uint16": 200.0, "float32": 0.01}[dtype]
    return ModelCard(
        family="unet",
        bands=("red", "green", "blue"),
        dtype=dtype,
        mean=(scale * 125.0,) * 3,
        std=(scale * 60.0,) * 3,
        tile_px=TILE_PX,
        classes=tuple(ClassInfo(name=f"class {i}", color=(i, i, i)) for i in range(classes)),
    )


def make_network(family: str) -> nn.Module:
    """Return a random network of one of NETWORKS, before any statistics."""
    if family.startswith("lraspp"):
        pytest.importorskip("torchvision", reason="LR-ASPP is made by torchvision, which is not installed")
    torch.manual_seed(0)
    return build(family, bands=3, classes=CLASSES, **NETWORKS[family])


def centred(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and the last layer a bias, so that all classes occur, with many borders."""
    torch.manual_seed(1)
    x = F.interpolate(torch.randn(2, 3, 24, 24), size=(TILE_PX, TILE_PX), mode="bicubic")
    with torch.no_grad():
        settle_norms(model, [x])
        shift = model(x).mean((0, 2, 3))
        heads = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == CLASSES]
        heads[-1].bias -= shift  # LR-ASPP has two heads, whose outputs are added
    return model


def settle_norms(model: nn.Module, batches: list[Tensor]) -> None:
    """Replace the running statistics by the mean over these batches; leaves the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        for x in batches:
            model(x)
    model.eval()


def make_pixels(height: int, width: int, seed: int = 0, dtype: str = "uint8", blobs: int = 11) -> Array:
    """Return smooth texture with a little noise, (3, height, width) in the range that `make_card` says."""
    coarse = torch.rand(1, 3, blobs, blobs, generator=torch.Generator().manual_seed(seed)) * 255
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")[0].numpy()
    noise = np.random.default_rng(seed).integers(-20, 20, (3, height, width))
    values = np.clip(smooth + noise, 0, 255)
    return (values * {"uint8": 1.0, "uint16": 200.0, "float32": 0.01}[dtype]).astype(dtype)


def make_valid(height: int, width: int) -> Array:
    """Return uint8 validity with a rectangle and single pixels without data."""
    valid = (np.random.default_rng(3).random((height, width)) > 0.02).astype(np.uint8)
    valid[height // 3 : height // 2, : width // 2] = 0
    return valid


def grid_of(pixels: Array, block_px: int = 10_000, **more: Any) -> SceneGrid:
    settings = {"tile_px": TILE_PX, "margin_px": MARGIN_PX, "block_px": block_px, **more}
    return make_grid(*pixels.shape[1:], **settings)


def cut(values: Array | None, window: Window) -> Array | None:
    if values is None:
        return None
    return values[..., window.row_off : window.row_stop, window.col_off : window.col_stop].copy()


def segment_scene(engine: Engine, pixels: Array, valid: Array | None, grid: SceneGrid) -> Array:
    """Submit all blocks of a scene at once and put their masks together."""
    scene = Window(0, 0, *pixels.shape[1:])
    mask = np.full(pixels.shape[1:], 77, np.uint8)
    pending = [
        (block, engine.submit(cut(pixels, block.read), cut(valid, block.read), block.tiles))  # type: ignore[arg-type]
        for block in grid.blocks()
    ]
    for block, future in pending:
        mask[block.window.slices_in(scene)] = future.result(300).mask
    return mask


def differing_ppm(mask: Array, other: Array) -> float:
    assert mask.shape == other.shape
    return float((mask != other).mean() * 1e6)


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Make engines on the device, or with ``on_cpu`` on the CPU by its own path; closed at the end."""
    engines: list[Engine] = []

    def make(model: nn.Module, card: ModelCard, *, on_cpu: bool = False, **more: Any) -> Engine:
        settings = {"tile_px": TILE_PX, "batch_size": BATCH, "threads": os.cpu_count() or 1, **more}
        config = EngineConfig(**settings, device="cpu" if on_cpu else str(DEVICE))
        path = (CpuPath if on_cpu else TorchPath)(model, card, config)
        engines.append(Engine(model, card, config, path=path))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(autouse=True)
def tf32_allowed() -> Iterator[None]:
    """Torch's default, whatever ran before: fp32 is fp32 by the engine's doing, not by luck."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


# ---- the CPU's classes


@pytest.mark.parametrize("family", NETWORKS)
def test_fp32_classes_are_those_of_the_cpu_path_but_for_near_ties(
    family: str, make_engine: MakeEngine
) -> None:
    pixels, card, model = make_pixels(1024, 1000), make_card(), centred(make_network(family))
    grid = grid_of(pixels, block_px=512)
    mask = segment_scene(make_engine(model, card), pixels, None, grid)
    expected = segment_scene(make_engine(model, card, on_cpu=True), pixels, None, grid)
    assert set(np.unique(expected)) == set(range(CLASSES))
    assert differing_ppm(mask, expected) <= FP32_PPM


@pytest.mark.parametrize("blend", ["crop", "linear"])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_blend_reduction_no_data_and_pixel_types_agree_with_the_cpu_path(
    blend: str, factor: int, dtype: str, make_engine: MakeEngine
) -> None:
    pixels, valid = make_pixels(701, 830, dtype=dtype), make_valid(701, 830)
    card, model = make_card(dtype=dtype), centred(make_network("unet"))
    grid = grid_of(pixels, block_px=400, blend=blend, downsample=factor)
    mask = segment_scene(make_engine(model, card, blend=blend), pixels, valid, grid)
    expected = segment_scene(make_engine(model, card, blend=blend, on_cpu=True), pixels, valid, grid)
    assert set(np.unique(expected)) == {*range(CLASSES), 255}
    np.testing.assert_array_equal(mask == 255, valid == 0)
    assert differing_ppm(mask, expected) <= BLEND_PPM


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 3), (255, 256)])
def test_scenes_smaller_than_a_tile_agree_with_the_cpu_path(
    size: tuple[int, int], dtype: str, make_engine: MakeEngine
) -> None:
    pixels, card = make_pixels(*size, dtype=dtype), make_card(dtype=dtype)
    model, grid = centred(make_network("unet")), grid_of(pixels)
    mask = segment_scene(make_engine(model, card), pixels, None, grid)
    expected = segment_scene(make_engine(model, card, on_cpu=True), pixels, None, grid)
    assert (mask != expected).sum() <= 1 + mask.size * BLEND_PPM / 1e6


def test_values_that_are_not_finite_enter_as_the_mean_of_their_band(make_engine: MakeEngine) -> None:
    card, model = make_card(dtype="float32"), centred(make_network("unet"))
    pixels = make_pixels(300, 300, dtype="float32")
    plain = pixels.copy()
    for value, place in ((np.nan, 50), (np.inf, 120), (-np.inf, 220)):
        pixels[1, place : place + 9, 20:90] = value
        plain[1, place : place + 9, 20:90] = card.mean[1]
    engine, grid = make_engine(model, card), grid_of(pixels)
    masks = [segment_scene(engine, scene, None, grid) for scene in (pixels, plain)]
    np.testing.assert_array_equal(*masks)


# ---- the same bits


@pytest.mark.parametrize("blend", ["crop", "linear"])
@pytest.mark.parametrize("family", NETWORKS)
def test_fp32_mask_is_the_same_bits_for_every_block_size(
    family: str, blend: str, make_engine: MakeEngine
) -> None:
    pixels, valid = make_pixels(1000, 900), make_valid(1000, 900)
    card, model = make_card(), centred(make_network(family))
    masks = []
    for block_px in (10_000, 450, 200):
        engine = make_engine(model, card, blend=blend)
        masks.append(segment_scene(engine, pixels, valid, grid_of(pixels, block_px, blend=blend)))
        engine.close()
    for other in masks[1:]:
        np.testing.assert_array_equal(masks[0], other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_second_run_gives_the_same_bits(precision: str, make_engine: MakeEngine) -> None:
    pixels, card, model = make_pixels(900, 900), make_card(), centred(make_network("unet"))
    masks = []
    for _ in range(2):
        engine = make_engine(model, card, precision=precision)
        masks.append(segment_scene(engine, pixels, None, grid_of(pixels, 300)))
        engine.close()
    np.testing.assert_array_equal(*masks)


# ---- streams and threads


def whole_number_model() -> tuple[nn.Module, ModelCard]:
    """Return a 1x1 convolution of small whole numbers: exact in float32, so its classes are known."""
    model = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.randint(-9, 9, (4, 3, 1, 1), generator=torch.Generator().manual_seed(3)))
        model.bias.copy_(torch.tensor([0.0, 300.0, -200.0, 100.0]))
    card = make_card(4).model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    return model, card


def exact_classes(model: nn.Module, pixels: Array) -> Array:
    logits = np.tensordot(model.weight.detach().numpy()[:, :, 0, 0], pixels.astype(np.float32), 1)  # type: ignore[union-attr]
    return (logits + model.bias.detach().numpy()[:, None, None]).argmax(0).astype(np.uint8)  # type: ignore[union-attr]


@pytest.mark.parametrize("blend", ["crop", "linear"])
def test_no_block_sees_the_pixels_or_the_mask_of_another(blend: str, make_engine: MakeEngine) -> None:
    """Noise, exact classes, blocks of changing size, every mask kept to the end: a reused buffer shows."""
    model, card = whole_number_model()
    engine = make_engine(model, card, blend=blend)
    rng = np.random.default_rng(0)
    scenes = [
        rng.integers(0, 256, (3, int(h), int(w)), dtype=np.uint8) for h, w in rng.integers(300, 900, (48, 2))
    ]
    pending = []
    for pixels in scenes:
        pending.append(engine.submit(pixels.copy(), None, grid_of(pixels, blend=blend).block(0).tiles))
        if len(pending) % 8 == 0:
            pending[-5].result(300)  # frees buffers, which the next blocks take over
    masks = [future.result(300).mask for future in pending]
    for pixels, mask in zip(scenes, masks, strict=True):
        np.testing.assert_array_equal(mask, exact_classes(model, pixels))


def test_blocks_from_two_threads_at_once_give_the_same_as_one_by_one(make_engine: MakeEngine) -> None:
    card, model = make_card(), centred(make_network("unet"))
    engine = make_engine(model, card)
    sizes = [(400 + 37 * i, 900 - 29 * i) for i in range(12)]
    scenes = [make_pixels(*size, seed=i) for i, size in enumerate(sizes)]
    grids = [grid_of(pixels, block_px=380) for pixels in scenes]
    valids = [make_valid(*size) if i % 2 else None for i, size in enumerate(sizes)]
    work = list(zip(scenes, valids, grids, strict=True))
    one_by_one = [segment_scene(engine, *item) for item in work]
    with ThreadPoolExecutor(2) as pool, engine.reading():
        together = list(pool.map(lambda item: segment_scene(engine, *item), work))
    for alone, mask in zip(one_by_one, together, strict=True):
        np.testing.assert_array_equal(alone, mask)


class LostDevice(TorchPath):
    """Every call to the device fails once it is lost, the one that waits for it at the end too."""

    def close(self) -> None:
        super().close()
        raise RuntimeError("CUDA error: unspecified launch failure")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_blocks_that_wait_fail_and_do_not_hang_where_the_device_is_lost() -> None:
    card, model, pixels = make_card(), centred(make_network("unet")), make_pixels(100, 100)
    config = EngineConfig(tile_px=TILE_PX, batch_size=BATCH, device=str(DEVICE))
    engine = Engine(model, card, config, path=LostDevice(model, card, config))
    engine.start().result(300)
    with engine.reading():  # so that the batch of one tile waits for more
        future = engine.submit(pixels, None, grid_of(pixels).block(0).tiles)
        engine.close()
    with pytest.raises(SegpipeError, match="closed before"):
        future.result(30)


# ---- half precision and torch.compile


def trained(family: str) -> nn.Module:
    """Return a network that has learnt, in some 60 steps, which band is brightest in smooth texture."""
    model = make_network(family).to(DEVICE).train()
    torch.manual_seed(2)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = [smooth_batch() for _ in range(60)]
    for x, labels in batches:
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    settle_norms(model, [tiles for tiles, _ in batches[-8:]])
    return model.cpu()


def smooth_batch(tiles: int = 4, side: int = 128) -> tuple[Tensor, Tensor]:
    """Return normalised tiles (B, 3, side, side) and the band that is brightest in the smooth part."""
    coarse = torch.rand(tiles, 3, 5, 5)
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear").to(DEVICE)
    noise = torch.rand(tiles, 3, side, side).to(DEVICE) * 40 - 20
    return (smooth * 255 + noise - 125) / 60, smooth.argmax(1)


@pytest.mark.parametrize("family", NETWORKS)
def test_half_precision_agrees_with_fp32_for_a_trained_network(family: str, make_engine: MakeEngine) -> None:
    model, card, pixels = trained(family), make_card(), make_pixels(1000, 1000, blobs=30)
    grid = grid_of(pixels, block_px=512)
    precisions = ["fp32", "bf16", "fp16"] if ON_GPU else ["fp32", "bf16"]
    masks = {
        name: segment_scene(make_engine(model, card, precision=name), pixels, None, grid)
        for name in precisions
    }
    truth = make_pixels(1000, 1000, blobs=30).astype(np.float32)
    truth = F.avg_pool2d(torch.from_numpy(truth)[None], 9, 1, 4)[0].argmax(0).numpy()
    assert (masks["fp32"] == truth).mean() > 0.7, "the network has learnt nothing, so this would show nothing"
    for name in precisions[1:]:
        assert (masks[name] == masks["fp32"]).mean() >= HALF_AGREEMENT, name


@pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="torch.compile needs a C compiler"
)
@pytest.mark.skipif(
    ON_GPU and importlib.util.find_spec("triton") is None, reason="torch.compile on a GPU needs triton"
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_network_gives_the_classes_of_the_plain_one(precision: str, make_engine: MakeEngine) -> None:
    model, card, pixels = trained("unet"), make_card(), make_pixels(600, 700, blobs=20)
    grid = grid_of(pixels, block_px=300)
    masks = []
    for compiled in (False, True):
        engine = make_engine(model, card, precision=precision, compile=compiled)
        masks.append(segment_scene(engine, pixels, None, grid))
    assert len(np.unique(masks[0])) == CLASSES
    if precision == "fp32":
        assert differing_ppm(*masks) <= FP32_PPM
    else:
        assert (masks[0] == masks[1]).mean() >= HALF_AGREEMENT


# ---- memory


@pytest.mark.skipif(not ON_GPU, reason="there is no device memory to look at")
def test_device_memory_is_given_back_when_the_engine_is_closed(make_engine: MakeEngine) -> None:
    card, model = make_card(), centred(make_network("unet"))
    pixels = make_pixels(2000, 2000)
    grid = grid_of(pixels)
    left, used = [], 0
    for _ in range(3):
        engine = make_engine(model, card, batch_size=32)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        engine.segment(pixels, None, grid.block(0).tiles)
        used = torch.cuda.max_memory_allocated(DEVICE)
        engine.close()
        gc.collect()
        left.append(torch.cuda.memory_allocated(DEVICE))
    assert left[2] - left[1] <= 2**20, "every engine leaves something behind"
    # What stays of the first is the workspaces of cuBLAS and cuDNN, one a stream.
    assert left[0] <= 0.1 * used + 64 * 2**20


@pytest.mark.skipif(not ON_GPU, reason="there is no device memory to look at")
def test_device_memory_does_not_grow_with_the_number_of_blocks(make_engine: MakeEngine) -> None:
    card, model = make_card(), centred(make_network("unet"))
    engine, pixels = make_engine(model, card), make_pixels(1000, 1000)
    plan = grid_of(pixels).block(0).tiles
    peaks = []
    for blocks in (8, 64):
        torch.cuda.reset_peak_memory_stats(DEVICE)
        for _ in range(blocks // 4):
            for future in [engine.submit(pixels, None, plan) for _ in range(4)]:
                future.result(300)
        peaks.append(torch.cuda.max_memory_allocated(DEVICE))
    assert peaks[1] <= 1.1 * peaks[0]
