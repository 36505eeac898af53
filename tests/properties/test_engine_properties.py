"""Design section 3 through the engine: any scene, any cut into blocks, any batch gives the same classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.geometry.grid import SceneGrid, Window, make_grid
from segpipe.inference.engine import Engine, EngineConfig
from segpipe.models.families import build

TILE_PX = 32
CLASSES = 3
Blend = Literal["crop", "linear"]
Array = np.ndarray[Any, Any]

CARD = ModelCard(
    family="unet",
    bands=("red", "green"),
    mean=(0.0, 0.0),
    std=(1.0, 1.0),
    tile_px=TILE_PX,
    classes=tuple(ClassInfo(name=f"class {i}", color=(i, i, i)) for i in range(CLASSES)),
)

scenes = st.fixed_dictionaries(
    {
        "height": st.integers(1, 150),
        "width": st.integers(1, 150),
        "margin_px": st.integers(0, 8),
        "downsample": st.sampled_from([1, 1, 2, 3]),
        "seed": st.integers(0, 9),
    }
)
several = settings(max_examples=25, deadline=None)


class Engines:
    """Engines of one model, made when first asked for: property tests run many scenes through a few."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made: dict[tuple[Blend, int], Engine] = {}

    def get(self, blend: Blend, batch_size: int) -> Engine:
        key = blend, batch_size
        if key not in self._made:
            config = EngineConfig(tile_px=TILE_PX, batch_size=batch_size, blend=blend)
            self._made[key] = Engine(self._model, CARD, config)
        return self._made[key]

    def close(self) -> None:
        for engine in self._made.values():
            engine.close()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unets() -> Iterator[Engines]:
    torch.manual_seed(0)
    model = build("unet", bands=2, classes=CLASSES, width=2, depth=2).eval()
    with torch.no_grad():
        noise = torch.randint(0, 256, (4, 2, TILE_PX, TILE_PX)).float()
        model.head.bias -= model(noise).mean((0, 2, 3))  # so that every class occurs
    engines = Engines(model)
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def pointwise() -> Iterator[tuple[Engines, nn.Module]]:
    model = nn.Conv2d(2, CLASSES, 1)
    with torch.no_grad():  # whole numbers: float32 sums are exact, so the whole image must agree to the bit
        model.weight[:] = torch.tensor([[3.0, -2.0], [-1.0, 4.0], [1.0, 1.0]])[:, :, None, None]
        model.bias[:] = torch.tensor([90.0, -80.0, 0.0])
    engines = Engines(model)
    yield engines, model
    engines.close()


def make_scene(height: int, width: int, seed: int) -> tuple[Array, Array]:
    """Return uint8 pixels (2, height, width) and a validity mask with holes."""
    rng = np.random.default_rng(seed)
    valid = np.ones((height, width), bool)
    top, left = rng.integers(0, height), rng.integers(0, width)
    valid[top : top + 60, left : left + 60] = False
    return rng.integers(0, 256, (2, height, width), dtype=np.uint8), valid


def segment(engine: Engine, pixels: Array, valid: Array, grid: SceneGrid) -> tuple[Array, Array]:
    """Return the scene's mask and how often each pixel was written."""
    scene = Window(0, 0, *valid.shape)
    mask, writes = np.zeros(valid.shape, np.uint8), np.zeros(valid.shape, int)
    pending = []
    for block in grid.blocks():
        there = block.read.slices_in(scene)
        pending.append((block, engine.submit(pixels[:, there[0], there[1]], valid[there], block.tiles)))
    for block, future in pending:
        there = block.window.slices_in(scene)
        mask[there] = future.result(60).mask
        writes[there] += 1
    return mask, writes


@pytest.mark.parametrize("blend", ["crop", "linear"])
@several
@given(
    scene=scenes, blocks=st.lists(st.integers(1, 160), min_size=2, max_size=2), batch=st.sampled_from([2, 3])
)
def test_mask_bits_do_not_depend_on_the_block_size(
    blend: Blend, scene: dict[str, int], blocks: list[int], batch: int, unets: Engines
) -> None:
    pixels, valid = make_scene(scene["height"], scene["width"], scene["seed"])
    masks = []
    for block_px in blocks:
        grid = make_grid(
            *valid.shape,
            tile_px=TILE_PX,
            margin_px=scene["margin_px"],
            block_px=block_px,
            downsample=scene["downsample"],
            blend=blend,
        )
        mask, writes = segment(unets.get(blend, batch), pixels, valid, grid)
        assert (writes == 1).all()
        masks.append(mask)
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0] == 255, ~valid)


@pytest.mark.parametrize("blend", ["crop", "linear"])
@several
@given(scene=scenes, block_px=st.integers(1, 160), strips=st.booleans())
def test_pointwise_model_gives_the_whole_images_classes(
    blend: Blend,
    scene: dict[str, int],
    block_px: int,
    strips: bool,
    pointwise: tuple[Engines, nn.Module],
) -> None:
    engines, model = pointwise
    pixels, valid = make_scene(scene["height"], scene["width"], scene["seed"])
    grid = make_grid(
        *valid.shape,
        tile_px=TILE_PX,
        margin_px=scene["margin_px"],
        block_px=block_px,
        blend=blend,
        strips=strips,
    )
    mask, _ = segment(engines.get(blend, 2), pixels, valid, grid)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).float()[None]).argmax(1)[0].numpy().astype(np.uint8)
    expected[~valid] = 255
    np.testing.assert_array_equal(mask, expected)


@several
@given(scene=scenes, block_px=st.integers(20, 160))
def test_tiles_computed_and_empty_add_up_to_the_scenes_tiles(
    scene: dict[str, int], block_px: int, unets: Engines
) -> None:
    pixels, valid = make_scene(scene["height"], scene["width"], scene["seed"])
    grid = make_grid(*valid.shape, tile_px=TILE_PX, margin_px=scene["margin_px"], block_px=block_px)
    engine = unets.get("crop", 2)
    computed = empty = 0
    for block in grid.blocks():
        rows, cols = block.read.slices_in(Window(0, 0, *valid.shape))
        result = engine.segment(pixels[:, rows, cols], valid[rows, cols], block.tiles)
        computed, empty = computed + result.tiles_computed, empty + result.tiles_empty
    necessary = sum(
        bool(valid[top:bottom, left:right].any())
        for top, bottom in zip(grid.rows.edges, grid.rows.edges[1:], strict=False)
        for left, right in zip(grid.cols.edges, grid.cols.edges[1:], strict=False)
    )
    assert (computed, computed + empty) == (necessary, grid.num_tiles)
