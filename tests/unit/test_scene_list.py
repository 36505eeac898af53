"""The list of scenes in its scratch database: pages, what an archive has grown by, flat memory."""

from __future__ import annotations

import datetime as dt
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene_inputs import put

from segpipe.config.model import InputConfig
from segpipe.errors import InputError, StorageFull
from segpipe.rasters import spool as spool_module
from segpipe.rasters.catalogue import list_scenes
from segpipe.rasters.scene import SceneSource, Version
from segpipe.rasters.scene_list import KnownScene, SceneList, dump_extra, load_extra, scratch_explained
from segpipe.rasters.spool import Draft, Spool

Planned = list[tuple[SceneSource, int | None]]


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[SceneList]:
    put(str(tmp_path), *(f"s{index}.tif" for index in range(5)), "s0.tif.msk")
    with list_scenes(InputConfig(scenes=(str(tmp_path),)), None, need_labels=False) as found:
        yield found


def planned(found: SceneList) -> Planned:
    return [row for page in found.pages(2) for row in page]


def known(*scenes: tuple[str, str, int]) -> list[KnownScene]:
    return [KnownScene(*scene, f"/elsewhere/{scene[0]}.tif") for scene in scenes]


def test_pages_are_full_and_repeatable(archive: SceneList) -> None:
    assert [len(page) for page in archive.pages(2)] == [2, 2, 1]
    assert planned(archive) == planned(archive)
    assert [part for _, part in planned(archive)] == [None] * 5


def test_a_grown_archive_plans_only_new_and_changed_scenes(archive: SceneList) -> None:
    now = {source.scene_id: source.version_text for source, _ in planned(archive)}
    archive.forget_known(
        known(
            ("s0", now["s0"], 0), ("s1", "old", 0), ("s2", "old", 0), ("gone", "x", 0), ("s2", now["s2"], 1)
        )
    )
    assert archive.num_known == 2
    assert len(archive) == 3
    assert archive.other_path.text() == "s1"
    assert archive.known_in("old", ["s1", "s2", "gone"]) == {"s1"}
    assert [(source.scene_id, part) for source, part in planned(archive)] == [
        ("s1", 0),
        ("s3", None),
        ("s4", None),
    ]


def test_a_scene_that_went_back_to_an_older_version_is_planned_again(archive: SceneList) -> None:
    now = {source.scene_id: source.version_text for source, _ in planned(archive)}
    archive.forget_known(known(("s0", now["s0"], 0), ("s0", "newer", 1)))
    assert archive.num_known == 0
    assert planned(archive)[0][1] == 1


def test_versions_in_the_database_are_the_ones_of_the_sources(archive: SceneList) -> None:
    texts = [source.version_text for source, _ in planned(archive)]
    assert ";;" in texts[0]  # with a mask and no label
    archive.forget_known(known(*((f"s{index}", text, 0) for index, text in enumerate(texts))))
    assert (len(archive), archive.num_known) == (0, 5)


def test_a_twin_of_a_planned_scene_is_refused(archive: SceneList) -> None:
    with pytest.raises(InputError, match="by case alone"):
        archive.forget_known(known(("S1", "x", 0)))


def test_a_full_scratch_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    spool = Spool()
    spool.database.execute("PRAGMA max_page_count = 20")

    def fill() -> None:
        with scratch_explained():
            for index in range(20_000):
                spool.add(Draft(f"s{index}", f"/s{index}.tif", Version(1, "e")))

    with pytest.raises(StorageFull, match="TMPDIR") as caught:
        fill()
    assert caught.value.where == str(tmp_path)
    spool.close()


def test_closing_twice_is_fine(archive: SceneList) -> None:
    archive.close()
    archive.close()


def test_many_scenes_keep_memory_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 scenes with long names take over 40 MB as Python objects; the list stays far below."""
    monkeypatch.setattr(spool_module, "_CACHE_KIB", 2048)
    before_kib, long = resident_kib(), "p" * 80
    spool = Spool()
    for index in range(50_000):
        number = index * 7919 % 50_000
        version = Version(number, "e" * 32)
        spool.add(Draft(f"{long}/{number:06d}", f"s3://b/{long}/{number:06d}.tif", version))
    spool.index()
    spool.check_ids()
    with spool.finish(pa.schema([]), []) as found:
        found.forget_known(
            KnownScene(f"{long}/{number:06d}", f"{number}:{'e' * 32}", 0, "") for number in range(25_000)
        )
        names = [source.scene_id[-6:] for page in found.pages(1000) for source, _ in page]
    assert names == [f"{number:06d}" for number in range(25_000, 50_000)]
    assert resident_kib() - before_kib < 20_000


def resident_kib() -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("the resident size is read from /proc")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.dates()
    | st.datetimes(timezones=st.just(dt.UTC) | st.none())
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False, allow_infinity=False)
)


NESTED = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(st.tuples(inner, inner), max_size=2)
        | st.dictionaries(st.sampled_from(["$type", "value", "a"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), NESTED, max_size=4))
def test_further_columns_come_back_with_their_types(extra: Mapping[str, Any]) -> None:
    back = load_extra(dump_extra(dict(extra)))
    assert back == extra
    assert [type(value) for value in back.values()] == [type(value) for value in extra.values()]
