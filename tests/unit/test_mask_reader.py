"""Reading masks by window: what comes back, and how often the objects of a scene of many units are read."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from masks_run import MadeRun, MadeScene, build_run

from segpipe.config.card import IGNORE
from segpipe.errors import SceneError
from segpipe.geometry.grid import Block, Window
from segpipe.masks.plan import load_part
from segpipe.masks.read import MaskReader, SceneUnits
from segpipe.masks.run import parse_unit_key

SCENE = MadeScene("wide", 448, 512, failed={17: "decode"})
SIZE = SCENE.height, SCENE.width


class CountedReads:
    """A storage that counts how often each mask object is fetched."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self.reads: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def read(self, key: str) -> bytes:
        self.reads[key] += parse_unit_key(key) is not None
        return self._storage.read(key)


@pytest.fixture(scope="module")
def run() -> MadeRun:
    made = make_run()
    assert made.num_units[0] >= 12
    return made


def make_run(scene: MadeScene = SCENE) -> MadeRun:
    return build_run(f"memory://{uuid.uuid4().hex}", [[scene]])


def units_of(run: MadeRun, scene: MadeScene = SCENE) -> SceneUnits:
    return SceneUnits(scene.scene_id, 0, 0, run.num_units[0])


def blocks_of(run: MadeRun, unit: int | None = None) -> list[Block]:
    """The blocks of one unit, or of all in order."""
    part = load_part(run.storage, 0, run.info.facts)
    units = range(part.num_units) if unit is None else [unit]
    return [block for number in units for item in part.unit(number) for block in item.blocks]


def expected(run: MadeRun, missing_unit: int | None = None) -> tuple[Any, int]:
    """The scene's mask, 255 in blocks that failed or are missing, and how many pixels those have."""
    mask, missing_px = SCENE.classes(), 0
    lost = [] if missing_unit is None else blocks_of(run, missing_unit)
    for block in [*lost, *(block for block in blocks_of(run) if block.index in SCENE.failed)]:
        mask[place_of(block.window)] = IGNORE
        missing_px += block.window.num_px
    return mask, missing_px


def place_of(window: Window) -> tuple[slice, slice]:
    return slice(window.row_off, window.row_stop), slice(window.col_off, window.col_stop)


def windows(height: int, width: int) -> Iterator[Window]:
    for row in range(0, SCENE.height, height):
        for col in range(0, SCENE.width, width):
            yield Window(row, col, min(height, SCENE.height - row), min(width, SCENE.width - col))


def check_all(
    reader: MaskReader, run: MadeRun, wanted: Iterable[Window], missing_unit: int | None = None
) -> None:
    """Put the scene together from windows and compare it, and the count of missing pixels."""
    mask, missing_px = np.zeros(SIZE, np.uint8), 0
    for window in wanted:
        mask[place_of(window)], part_missing_px = reader.read(units_of(run), window, SIZE)
        missing_px += part_missing_px
    right, right_missing_px = expected(run, missing_unit)
    assert np.array_equal(mask, right)
    assert missing_px == right_missing_px > 0


def test_windows_in_order_fetch_each_object_for_its_rows_and_for_its_masks(run: MadeRun) -> None:
    storage = CountedReads(run.storage)
    check_all(MaskReader(storage), run, [block.window for block in blocks_of(run)])
    assert len(storage.reads) == run.num_units[0]
    assert max(storage.reads.values()) == 2


def test_with_more_units_than_are_kept_rows_are_read_once_more_and_not_for_every_window() -> None:
    scene = MadeScene("long", 64 * 200, 64)
    run = make_run(scene)
    assert run.num_units[0] > 32
    storage = CountedReads(run.storage)
    reader = MaskReader(storage)
    for block in blocks_of(run):
        mask, _ = reader.read(units_of(run, scene), block.window)
        assert np.array_equal(mask, scene.classes()[place_of(block.window)])
    assert max(storage.reads.values()) == 3


@pytest.mark.parametrize("shape", [(50, 70), SIZE, (1, SIZE[1]), (130, 33)])
def test_windows_across_blocks_give_the_same_mask(run: MadeRun, shape: tuple[int, int]) -> None:
    check_all(MaskReader(run.storage), run, windows(*shape))


def test_a_missing_unit_is_missing_until_it_is_written() -> None:
    run = make_run()
    data = run.storage.read(run.key(6))
    run.storage.delete(run.key(6))
    reader = MaskReader(run.storage)
    check_all(reader, run, windows(64, 64), missing_unit=6)
    run.storage.put(run.key(6), data)
    check_all(reader, run, windows(64, 64))


def test_masks_of_another_size_are_refused_in_every_window(run: MadeRun) -> None:
    reader = MaskReader(run.storage)
    reader.read(units_of(run), Window(0, 0, 5, 5))
    for window in (Window(0, 0, 5, 5), Window(440, 500, 4, 4), Window(1000, 1000, 5, 5)):
        with pytest.raises(SceneError, match="448 x 512 pixels, the scene has 449 x 512"):
            reader.read(units_of(run), window, (449, 512))
