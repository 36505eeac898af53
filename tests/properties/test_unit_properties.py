"""Units through the worker: any scenes, any cut into blocks and units, any order give the same masks."""

from __future__ import annotations

import random
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive import make_model, ok, planned, predict, scene_pixels, whole_masks, write_scene
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.config.model import InputConfig, SegpipeConfig
from segpipe.masks.run import RunInfo, adopt_or_create, require_run
from segpipe.pipelines.events import Events
from segpipe.pipelines.local import inspect_sources
from segpipe.pipelines.plan import make_plan
from segpipe.pipelines.worker import Worker, WorkerSetup, _Budget
from segpipe.rasters.catalogue import list_scenes
from segpipe.storage import open_storage

Array = np.ndarray[Any, Any]

WHOLE_SCENES = {"block_px": 1_000_000, "unit_px": 1_000_000}
"""The reference cut: each scene is one block, and all scenes are one unit."""

sides_px = st.integers(1, 150)
scenes = st.lists(st.tuples(sides_px, sides_px, st.booleans()), min_size=1, max_size=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunInfo]:
    """The model, and what a run of it knows of itself."""
    folder = tmp_path_factory.mktemp("made")
    model = make_model(folder / "model.safetensors")
    write_scene(folder / "in/scene.tif", 40, 40)
    ok(predict(folder / "in", model, folder / "run", **WHOLE_SCENES))
    return model, require_run(open_storage(str(folder / "run")))


def compute(inputs: Path, model: Path, info: RunInfo, run: Path, order: random.Random) -> dict[str, Array]:
    """Plan a run of the facts of ``info``, compute its units in a shuffled order and return all masks."""
    config = SegpipeConfig(input=InputConfig(scenes=[str(inputs)]))
    storage = open_storage(str(run))
    adopt_or_create(storage, info)
    with list_scenes(config.input, str(run), need_labels=False) as listed:
        totals = make_plan(
            storage, listed, info.facts, lambda sources: inspect_sources(sources, config, info.card), Events()
        )
    units = [(0, unit) for unit in range(totals.units)]
    order.shuffle(units)
    worker = Worker(WorkerSetup(str(run), info, config.input, str(model)))
    try:
        results = list(worker.run_units(units))
    finally:
        worker.close()
    assert worker._budget._used_bytes == 0, "what a block took is given back, no more and no less"
    assert sorted((result.part, result.unit) for result in results) == sorted(units)
    assert {(result.status, result.failed, result.skipped) for result in results} == {("done", 0, False)}
    return whole_masks(run)


@settings(max_examples=8, deadline=None)
@given(
    first=st.tuples(st.integers(64, 150), st.integers(64, 150), st.booleans()),
    others=scenes,
    block_px=st.integers(20, 160),
    unit_px=st.integers(1000, 60_000),
    blend=st.sampled_from(["crop", "linear"]),
    order=st.randoms(use_true_random=False),
)
def test_mask_bits_depend_neither_on_the_cut_into_units_nor_on_their_order(
    first: tuple[int, int, bool],
    others: list[tuple[int, int, bool]],
    block_px: int,
    unit_px: int,
    blend: str,
    order: random.Random,
    made: tuple[Path, RunInfo],
) -> None:
    model, info = made
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (height, width, strips) in enumerate([first, *others]):
            pixels = scene_pixels(3, height, width, seed=number)
            pixels[:, height // 3 : height // 2, width // 4 :] = 0
            write_scene(folder / f"in/{number}.tif", height, width, pixels=pixels, strips=strips, nodata=0)
        cuts = {"whole": WHOLE_SCENES, "cut": {"block_px": block_px, "unit_px": unit_px}}
        masks = {
            run: compute(
                folder / "in", model, replace(info, facts=replace(info.facts, blend=blend, **cut)),
                folder / run, order,
            )
            for run, cut in cuts.items()
        }  # fmt: skip
        assert {scene.grid(info.facts).num_blocks for _, scene in planned(folder / "whole")} == {1}
    assert masks["cut"].keys() == masks["whole"].keys() == {str(n) for n in range(1 + len(others))}
    for scene, mask in masks["whole"].items():
        np.testing.assert_array_equal(masks["cut"][scene], mask, err_msg=scene)
    assert len(np.unique(masks["whole"]["0"])) > 2, "the model must see classes to tell apart"


def test_a_block_larger_than_the_budget_passes_when_it_is_alone() -> None:
    budget = _Budget(100)
    with ThreadPoolExecutor(2) as pool:
        try:
            pool.submit(budget.acquire, 500).result(timeout=20)
            second = pool.submit(budget.acquire, 1)
            assert wait([second], timeout=0.2).not_done
            budget.release(500)
            second.result(timeout=20)
        finally:
            budget.close()  # ends whoever waits
