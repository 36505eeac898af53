"""A plan of any length is made and read with flat memory; two planners at once plan each scene once."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from archive import write_scene
from masks_run import make_facts

from segpipe.config.model import InputConfig
from segpipe.geometry.grid import Window
from segpipe.masks.plan import PART_SCENES, PlanScene, load_part, part_num_units
from segpipe.masks.read import MaskReader, SceneUnits
from segpipe.masks.run import list_parts
from segpipe.pipelines.events import Events
from segpipe.pipelines.plan import known_scenes, make_plan
from segpipe.pipelines.units import missing_units
from segpipe.rasters.catalogue import list_scenes
from segpipe.rasters.scene import SceneHeader, SceneSource, Version
from segpipe.rasters.scene_list import KnownScene
from segpipe.storage import open_storage

FACTS = make_facts(tile_px=512, margin_px=32, block_px=4096, unit_px=16 * 2**20)


class ManyScenes:
    """A list of made-up scenes that exists page by page, as the real one does on disk."""

    extra_schema = pa.schema([])
    num_known = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def forget_known(self, known: Iterator[KnownScene]) -> None:
        assert not list(known)

    def known_in(self, version: str, scene_ids: Iterable[str]) -> set[str]:
        return set()

    def pages(self, size: int) -> Iterator[list[tuple[SceneSource, None]]]:
        for start in range(0, self.count, size):
            names = range(start, min(start + size, self.count))
            yield [
                (SceneSource(f"n{i:08d}", f"s3://b/{i:08d}.tif", Version(1000, f"{i:x}")), None)
                for i in names
            ]


def header_of(source: SceneSource) -> SceneHeader:
    number = int(source.scene_id[1:])
    return SceneHeader(
        height=256 + number % 7,
        width=256 if number % 1000 else 9000,
        num_bands=3,
        dtype="uint8",
        driver="GTiff",
        bands=(1, 2, 3),
        valid_source="none",
        file_block=(256, 256),
        strips=False,
        crs="EPSG:32633",
        transform=(0.5, 0.0, 5e5 + number, 0.0, -0.5, 5e6),
        pixel_m=0.5,
    )


def inspect(sources: Sequence[SceneSource]) -> Iterator[PlanScene]:
    return (PlanScene(source, header_of(source)) for source in sources)


def resident_bytes() -> int:
    """What this process holds, Arrow's memory too."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Looks(Events):
    """Looks at the memory when a part is planned."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def planned(self, scenes: int, total: int) -> None:
        if scenes % PART_SCENES == 0:
            self.found.append(resident_bytes())


def check(folder: Path, count: int, most_growth_bytes: int) -> None:
    storage = open_storage(str(folder))
    gc.collect()
    made = Looks()
    totals = make_plan(storage, ManyScenes(count), FACTS, inspect, made)  # type: ignore[arg-type]
    read = []
    for part in list_parts(storage):
        loaded = load_part(storage, part, FACTS)
        assert loaded.num_units == part_num_units(storage, part)
        assert len(loaded.unit(loaded.num_units - 1)) >= 1
        read.append(resident_bytes())
        del loaded
    assert (totals.scenes, len(made.found), len(read)) == (count, count // PART_SCENES, count // PART_SCENES)
    for looks in (made.found, read):
        assert max(looks[2:]) - max(looks[:2]) < most_growth_bytes, looks
    missing, units = missing_units(storage)
    assert units == totals.units == sum(map(len, missing))
    assert [part.part for part in missing] == list(range(count // PART_SCENES))
    assert all(part.units.tolist() == list(range(len(part))) for part in missing)
    planned = [scene.scene_id for scene in known_scenes(storage, [0, 1])]
    assert planned == [f"n{i:08d}" for i in range(2 * PART_SCENES)]


def check_in_a_fresh_process(folder: Path, count: int, most_growth_bytes: int) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc/self/statm, which only Linux has")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(check, (folder, count, most_growth_bytes))


def test_a_plan_of_60000_scenes_is_made_and_read_with_flat_memory(tmp_path: Path) -> None:
    check_in_a_fresh_process(tmp_path, 60_000, 12 * 2**20)


@pytest.mark.slow
def test_a_plan_of_4000000_scenes_is_made_and_read_with_flat_memory(tmp_path: Path) -> None:
    check_in_a_fresh_process(tmp_path, 4_000_000, 100 * 2**20)


def test_parts_and_mask_readers_are_freed_when_they_are_let_go(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    make_plan(storage, ManyScenes(1001), FACTS, inspect, Events())  # type: ignore[arg-type]
    gc.disable()
    try:
        part = load_part(storage, 0, FACTS)
        assert len(part.unit(part.num_units - 1)[-1].blocks) == 3
        reader = MaskReader(storage)
        assert reader.read(SceneUnits("n00000000", 0, 0, 1), Window(0, 0, 5, 7))[1] == 35
        gone = weakref.ref(part), weakref.ref(reader)
        del part, reader
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_two_planners_at_once_plan_every_scene_once(tmp_path: Path) -> None:
    for number in range(5):
        write_scene(tmp_path / f"in/{number}.tif", 40, 50)
    config = InputConfig(scenes=(str(tmp_path / "in"),))
    storage = open_storage(str(tmp_path / "run"))
    others = []

    def found(sources: Sequence[SceneSource]) -> Iterator[Any]:
        return (PlanScene(source, None, error_kind="header", error="made up") for source in sources)

    def interrupted(sources: Sequence[SceneSource]) -> Iterator[Any]:
        if not others:
            write_scene(tmp_path / "in/new.tif", 40, 50)
            with list_scenes(config, None, need_labels=False) as scenes:
                others.append(make_plan(storage, scenes, FACTS, found, Events()))
        return found(sources)

    with list_scenes(config, None, need_labels=False) as scenes:
        totals = make_plan(storage, scenes, FACTS, interrupted, Events())
    assert (others[0].scenes, totals.scenes) == (6, 0)
    planned = [scene.scene_id for scene in known_scenes(storage, list_parts(storage))]
    assert planned == ["0", "1", "2", "3", "4", "new"]
