"""The same masks, whoever computes them and however the scenes are cut."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Archive, mask_objects, run

from segpipe.geometry.grid import Window
from segpipe.masks.plan import load_part
from segpipe.masks.read import MaskReader, SceneUnits
from segpipe.masks.run import require_run
from segpipe.storage import open_storage

pytestmark = pytest.mark.ray


def scene_masks(run_folder: Path) -> dict[str, np.ndarray]:
    storage = open_storage(str(run_folder))
    reader = MaskReader(storage)
    masks = {}
    for scene in load_part(storage, 0, require_run(storage).facts).scenes():
        units = SceneUnits(scene.source.scene_id, 0, scene.first_unit, scene.units)
        mask, missing_px = reader.read(units, Window(0, 0, scene.header.height, scene.header.width))
        assert missing_px == 0
        masks[scene.source.scene_id] = mask
    return masks


def test_two_ray_workers_write_the_objects_of_one_local_worker(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path
) -> None:
    code, command = run(archive.predict(folder / "run", "--set", "cluster.workers=2"), folder)
    assert code == 0, command.stderr
    assert mask_objects(folder / "run") == undisturbed


ON_ONE_GPU = """
import dataclasses, functools, ray
from segpipe.cli.main import main
from segpipe.pipelines import predict
ray.init = functools.partial(ray.init, num_gpus=1)
plan_pool = predict.plan_pool
predict.plan_pool = lambda *args: dataclasses.replace(plan_pool(*args), gpus_per_worker=1)
main()
"""
"""Ray believes in a GPU and gives it to the worker, which computes on the CPU."""


def test_a_worker_that_asks_ray_for_a_gpu_writes_the_same_objects(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path
) -> None:
    code, command = run(archive.predict(folder / "run"), folder, program=(sys.executable, "-c", ON_ONE_GPU))
    assert code == 0, command.stderr
    assert mask_objects(folder / "run") == undisturbed


def test_masks_do_not_depend_on_the_size_of_blocks_and_units(
    archive: Archive, undisturbed_run: Path, folder: Path
) -> None:
    cut = ("--set", "inference.block_px=90", "--set", "inference.unit_px=60000")
    code, command = run(archive.predict(folder / "ray", *cut), folder)
    assert code == 0, command.stderr
    assert len(mask_objects(folder / "ray")) != len(mask_objects(undisturbed_run))
    expected, masks = scene_masks(undisturbed_run), scene_masks(folder / "ray")
    assert masks.keys() == expected.keys()
    for scene_id, mask in expected.items():
        assert set(np.unique(mask)) >= {0, 1}, "a mask of one class would prove nothing"
        assert np.array_equal(masks[scene_id], mask)
