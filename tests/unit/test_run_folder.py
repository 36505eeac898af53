"""The run folder: what a start that computed nothing may take back, and what stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from masks_run import MadeRun, MadeScene, build_run

from segpipe.config.recipe import RUN_KEY
from segpipe.errors import StorageRefused
from segpipe.masks.run import list_units, plan_key, take_back, unit_key

SCENES = (MadeScene("a"), MadeScene("b"))


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    """A run of two parts."""
    return build_run(str(tmp_path), [SCENES, (MadeScene("c"),)])


def drop_masks(run: MadeRun, part: int) -> None:
    for units in list(list_units(run.storage, part)):
        for unit, _ in units:
            run.storage.delete(unit_key(part, unit))


def test_a_run_without_masks_is_taken_back(run: MadeRun) -> None:
    drop_masks(run, 0)
    drop_masks(run, 1)
    take_back(run.storage)
    for key in (RUN_KEY, plan_key(0), plan_key(1)):
        assert run.storage.stat(key) is None


@pytest.mark.parametrize("part", [0, 1])
def test_a_run_with_one_mask_object_stays(run: MadeRun, part: int) -> None:
    drop_masks(run, part)
    take_back(run.storage)
    for key in (RUN_KEY, plan_key(0), plan_key(1)):
        assert run.storage.stat(key) is not None


def test_storage_that_refuses_to_delete_keeps_the_run(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_masks(run, 0)
    drop_masks(run, 1)

    def refuse(key: str) -> None:
        raise StorageRefused("no right to delete", key)

    monkeypatch.setattr(run.storage, "delete", refuse)
    take_back(run.storage)
    assert run.storage.stat(RUN_KEY) is not None
