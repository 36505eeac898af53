"""What the engine does with batches, threads, faults and number formats."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch
from engines import (
    TILE_PX,
    Array,
    CountingPath,
    assert_classes_agree,
    cut,
    grid_of,
    make_card,
    make_pixels,
    naive_scene,
    segment_scene,
)
from torch import Tensor, nn

from segpipe.errors import ConfigError, SegpipeError
from segpipe.inference.engine import EngineConfig

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- batches


def test_batches_run_on_across_rows_and_blocks(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(400, 300)
    grid = grid_of(pixels, block_px=100)
    engine = make_engine(unet, make_card(3), CountingPath, batch_size=5)
    with engine.reading():
        futures = [engine.submit(cut(pixels, b.read), None, b.tiles) for b in grid.blocks()]
    for future in futures:
        future.result(60)
    assert grid.num_blocks > 3
    assert engine._path.sizes[:-1] == [5] * (grid.num_tiles // 5)
    assert len(engine._path.sizes) == -(-grid.num_tiles // 5)
    assert engine.stats.tiles_computed == grid.num_tiles


def test_a_part_filled_batch_waits_only_while_a_block_is_being_read(
    make_engine: Any, unet: nn.Module
) -> None:
    pixels = make_pixels(TILE_PX, TILE_PX)
    plan = grid_of(pixels).block(0).tiles
    engine = make_engine(unet, make_card(3), CountingPath, batch_size=2)
    engine.start().result(60)
    engine.submit(pixels, None, plan).result(60)
    assert engine._path.sizes == [1]
    with engine.reading():
        first = engine.submit(pixels, None, plan)
        time.sleep(0.2)
        assert not first.done()
        second = engine.submit(pixels, None, plan)
        first.result(60)
        second.result(60)
    assert engine._path.sizes == [1, 2]


def test_a_reader_that_never_submits_does_not_block_others_for_ever(
    make_engine: Any, unet: nn.Module
) -> None:
    pixels = make_pixels(TILE_PX, TILE_PX)
    engine = make_engine(unet, make_card(3), batch_size=8)
    with engine.reading():
        assert engine.segment(pixels, None, grid_of(pixels).block(0).tiles).tiles_computed == 1


def test_blocks_from_many_threads_come_back_to_their_callers(make_engine: Any, unet: nn.Module) -> None:
    card = make_card(3)
    engine = make_engine(unet, card, batch_size=3)
    pixels = [make_pixels(60 + 20 * i, 110 - 10 * i, seed=i) for i in range(6)]
    results: dict[int, Array] = {}

    def work(i: int) -> None:
        with engine.reading():
            future = engine.submit(pixels[i], None, grid_of(pixels[i]).block(0).tiles)
        results[i] = future.result(60).mask

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, values in enumerate(pixels):
        assert_classes_agree(results[i], naive_scene(unet, card, values, grid_of(values), None))


def test_mask_is_the_same_bits_for_every_number_of_threads(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(200, 200)
    one, two = (
        segment_scene(make_engine(unet, make_card(3), threads=n), pixels, None, grid_of(pixels))
        for n in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


# ---- faults


def test_a_failed_batch_fails_its_blocks_and_the_engine_goes_on(make_engine: Any, unet: nn.Module) -> None:
    small, large = make_pixels(TILE_PX, TILE_PX), make_pixels(300, 300)
    engine = make_engine(unet, make_card(3), CountingPath, batch_size=4)
    engine.start().result(60)
    engine._path.fail_on = 0
    with engine.reading():
        doomed = [engine.submit(p, None, grid_of(p).block(0).tiles) for p in (small, large)]
    for future in doomed:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(60)
    assert len(engine._path.sizes) == 1
    assert engine.segment(large, None, grid_of(large).block(0).tiles).tiles_empty == 0


def test_a_network_that_cannot_run_fails_every_block(make_engine: Any) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no kernel for this device")

    pixels = make_pixels(TILE_PX, TILE_PX)
    engine = make_engine(Broken(), make_card(3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no kernel"):
            engine.segment(pixels, None, grid_of(pixels).block(0).tiles)


def test_a_device_that_cannot_start_fails_every_block(make_engine: Any, unet: nn.Module) -> None:
    class NoDevice(CountingPath):
        def start(self) -> None:
            raise RuntimeError("no such device")

    pixels = make_pixels(TILE_PX, TILE_PX)
    engine = make_engine(unet, make_card(3), NoDevice)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such device"):
            engine.segment(pixels, None, grid_of(pixels).block(0).tiles)
    with pytest.raises(RuntimeError, match="no such device"):
        engine.start().result(60)


def test_close_fails_what_is_open_and_can_be_called_twice(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(TILE_PX, TILE_PX)
    plan = grid_of(pixels).block(0).tiles
    engine = make_engine(unet, make_card(3), batch_size=4)
    with engine.reading():
        future = engine.submit(pixels, None, plan)
        engine.close()
        with pytest.raises(SegpipeError, match="closed before"):
            future.result(60)
    engine.close()
    with pytest.raises(SegpipeError, match="engine is closed"):
        engine.submit(pixels, None, plan)


def test_a_cancelled_block_is_passed_over(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(TILE_PX, TILE_PX)
    plan = grid_of(pixels).block(0).tiles
    release = threading.Event()

    class Slow(CountingPath):
        def start(self) -> None:
            super().start()
            release.wait(60)

    engine = make_engine(unet, make_card(3), Slow)
    cancelled, kept = engine.submit(pixels, None, plan), engine.submit(pixels, None, plan)
    assert cancelled.cancel()
    release.set()
    kept.result(60)
    with pytest.raises(CancelledError):
        cancelled.result(60)
    assert engine._path.sizes == [1]


def test_arguments_that_do_not_fit_are_refused(make_engine: Any, unet: nn.Module) -> None:
    engine = make_engine(unet, make_card(3))
    pixels = make_pixels(100, 100)
    plan = grid_of(pixels).block(0).tiles
    with pytest.raises(ValueError, match="3 bands"):
        engine.submit(pixels[:2], None, plan)
    with pytest.raises(ValueError, match="real numbers"):
        engine.submit(pixels.astype(complex), None, plan)
    with pytest.raises(ValueError, match="valid must be"):
        engine.submit(pixels, np.ones((100, 99), bool), plan)
    with pytest.raises(ValueError, match="reach beyond"):
        engine.submit(pixels[:, :90], None, plan)
    with pytest.raises(ValueError, match="not the engine's"):
        engine.submit(pixels, None, grid_of(pixels, blend="linear").block(0).tiles)
    for wrong in ({"batch_size": 0}, {"precision": "fp8"}, {"precision": "fp16"}):
        with pytest.raises(ConfigError):
            EngineConfig(**{"tile_px": 64, "batch_size": 1, **wrong})


# ---- networks and number formats


def test_a_network_that_cannot_be_traced_runs_unfolded(make_engine: Any, caplog: Any) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(x)
            return y if float(y.sum()) > 1e9 else y + 0.0

    torch.manual_seed(0)
    model, card, pixels = Branching().eval(), make_card(2), make_pixels(100, 100)
    with caplog.at_level("WARNING"):
        mask = segment_scene(make_engine(model, card), pixels, None, grid_of(pixels))
    assert "not folded" in caplog.text
    np.testing.assert_array_equal(mask, naive_scene(model, card, pixels, grid_of(pixels), None))


def test_bf16_classes_stay_close_to_fp32(make_engine: Any, unet: nn.Module) -> None:
    pixels = make_pixels(130, 130)
    masks = [
        segment_scene(make_engine(unet, make_card(3), precision=p), pixels, None, grid_of(pixels))
        for p in ("fp32", "bf16")
    ]
    assert 0 < (masks[0] != masks[1]).mean() < 0.05


@pytest.mark.slow
def test_compiled_network_gives_the_same_classes(make_engine: Any, unet: nn.Module) -> None:
    pixels, card = make_pixels(150, 150), make_card(3)
    masks = [
        segment_scene(make_engine(unet, card, compile=flag), pixels, None, grid_of(pixels))
        for flag in (False, True)
    ]
    assert (masks[0] != masks[1]).sum() <= 2
