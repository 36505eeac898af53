"""Classes of the engine against the usual loop, with a U-Net trained for a moment on real images.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_engine_agreement.py
Target: at most 1 pixel in 10^6. The networks of test_engine_speed.py are random, with classes about equally
likely: many pixels lie near a border there, and the usual loop itself does not keep to the target, as the
second test shows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import engine_loops
import numpy as np
import pytest
import rasterio
import torch
from engine_loops import Array, naive_loop, one_block, tuned_loop

import segpipe
from segpipe.config.card import ClassInfo, ModelCard
from segpipe.geometry.grid import TilePlan
from segpipe.inference.engine import Engine, EngineConfig
from segpipe.models.families import build_of

pytestmark = pytest.mark.benchmark

DATA = Path(segpipe.__file__).parent / "demo" / "data"
STEPS: Final = 120
CROP_PX: Final = 256
BATCH: Final = 4


def scenes(folder: str) -> list[Array]:
    """All bands of the demo's scenes or labels, each (bands, 1024, 1024)."""
    found = []
    for path in sorted((DATA / folder).glob("*.tif")):
        with rasterio.open(path) as source:
            found.append(source.read())
    return found


def train(model: torch.nn.Module) -> None:
    images, labels = scenes("scenes"), scenes("labels")
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        crops: list[Array] = []
        targets: list[Array] = []
        for _ in range(BATCH):
            scene = int(rng.integers(len(images)))
            row, col = (int(place) for place in rng.integers(0, 1024 - CROP_PX, 2))
            window = np.s_[:, row : row + CROP_PX, col : col + CROP_PX]
            crops.append(images[scene][:3][window])
            targets.append(labels[scene][:1][window][0])
        target = torch.from_numpy(np.stack(targets)).long()
        loss = torch.nn.functional.cross_entropy(
            model(engine_loops.normalised(crops)), target, ignore_index=255
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"\nstep {step}: loss {loss.item():.3f}", end="")


def wrong_ppm(mask: Array, other: Array) -> Any:
    return (mask != other).mean() * 1e6


def masks_of(model: torch.nn.Module, card: ModelCard, pixels: Array, plan: TilePlan) -> tuple[Array, ...]:
    """Masks of the engine, of the usual loop, and of the usual loop in float64."""
    config = EngineConfig(
        tile_px=card.tile_px, batch_size=1, threads=torch.get_num_threads(), compile=False, precision="fp32"
    )
    engine = Engine(model, card, config)
    mask = tuned_loop(engine, pixels, plan)
    engine.close()
    exact = naive_loop(copy.deepcopy(model).double(), pixels, plan, BATCH)
    return mask, naive_loop(model, pixels, plan, BATCH), exact


def test_a_trained_unet_gives_the_classes_of_the_usual_loop() -> None:
    torch.manual_seed(0)
    card = ModelCard(
        family="unet",
        options={"width": 16},
        bands=("red", "green", "blue"),
        mean=engine_loops.MEAN,
        std=engine_loops.STD,
        tile_px=engine_loops.TILE_PX,
        classes=(ClassInfo(name="ground", color=(0, 0, 0)), ClassInfo(name="building", color=(255, 0, 0))),
    )
    model = build_of(card).train()
    train(model)
    model.eval()
    pixels = np.concatenate([scene[:3] for scene in scenes("scenes")], axis=2)
    plan = one_block(*pixels.shape[1:])
    mask, naive, exact = masks_of(model, card, pixels, plan)
    shares = np.bincount(mask.ravel(), minlength=2) / mask.size
    print(
        f"\n{mask.size / 1e6:.1f} Mpx, building {shares[1]:.0%}: engine and naive loop differ in "
        f"{wrong_ppm(mask, naive):.2f} px in 10^6 (target 1); against float64 the engine is wrong in "
        f"{wrong_ppm(mask, exact):.2f}, the naive loop in {wrong_ppm(naive, exact):.2f}"
    )
    assert 0.05 < shares[1] < 0.95
    assert wrong_ppm(mask, naive) <= 1.0


class ChannelsLast(torch.nn.Module):
    """The same network on the layout that PyTorch's guides advise for CPUs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def forward(self, x_BNHW: torch.Tensor) -> Any:  # noqa: N803
        return self.model(x_BNHW.contiguous(memory_format=torch.channels_last))


def test_with_random_weights_the_engine_is_nearer_to_float64_than_the_usual_loop() -> None:
    pixels = engine_loops.mosaic(2 * 448 + 64, 4 * 448 + 64)
    model, card = engine_loops.trained_like("unet:16", 2, pixels)
    plan = one_block(*pixels.shape[1:])
    mask, naive, exact = masks_of(model, card, pixels, plan)
    last = naive_loop(ChannelsLast(model), pixels, plan, BATCH)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = naive_loop(model, pixels, plan, 1)
    print(f"\n{mask.size / 1e6:.1f} Mpx, px in 10^6 other than the usual loop:", end=" ")
    print(
        f"engine {wrong_ppm(mask, naive):.2f}, that loop with channels_last {wrong_ppm(last, naive):.2f},",
        end=" ",
    )
    print(f"without oneDNN {wrong_ppm(plain, naive):.2f}; wrong against float64:", end=" ")
    print(f"engine {wrong_ppm(mask, exact):.2f}, usual loop {wrong_ppm(naive, exact):.2f}")
    assert wrong_ppm(mask, exact) <= min(1.0, wrong_ppm(naive, exact))
