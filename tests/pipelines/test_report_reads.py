"""What the driver makes of the small tables that tasks send it: whole columns of many rows, nothing lost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from archive import make_model, ok, predict, run, write_scene

from segpipe.masks.run import unit_key
from segpipe.pipelines import report
from segpipe.pipelines.report import ChunkRows, gathered, unit_chunks
from segpipe.storage import open_storage


def read(first: int, num_rows: int) -> ChunkRows:
    rows = pa.table({"unit": pa.array(range(first, first + num_rows)), "name": ["x"] * num_rows})
    return ChunkRows(rows, num_units=num_rows, num_bytes=10 * num_rows)


def reads_of(sizes: list[int]) -> list[ChunkRows]:
    return [read(sum(sizes[:index]), size) for index, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [[], [3], [64] * 50, [1000, 30, 5000, 7], [0, 64, 0], [1024] * 3])
def test_gathered_reads_keep_every_row_in_order(sizes: list[int]) -> None:
    out = list(gathered(reads_of(sizes)))
    units = [unit for one in out for unit in one.rows["unit"].to_pylist()]
    assert units == list(range(sum(sizes)))
    assert sum(one.num_units for one in out) == sum(sizes)
    assert sum(one.num_bytes for one in out) == 10 * sum(sizes)


def test_gathered_reads_are_whole_columns_of_many_rows() -> None:
    out = list(gathered(reads_of([64] * 200)))
    assert all(one.rows.num_rows >= report._ROWS_AT_ONCE for one in out[:-1])
    assert all(column.num_chunks == 1 for one in out for column in one.rows.columns)


def test_gathering_holds_no_more_than_it_needs() -> None:
    asked = 0

    def source() -> Iterator[ChunkRows]:
        nonlocal asked
        for one in reads_of([64] * 200):
            asked += 1
            yield one

    next(gathered(source()))
    assert asked == report._ROWS_AT_ONCE / 64


def test_columns_that_older_objects_lack_stay_null() -> None:
    older = ChunkRows(pa.table({"unit": [0]}), 1, 10)
    (out,) = gathered([older, read(1, 2)])
    assert out.rows["name"].to_pylist() == [None, "x", "x"]


def test_units_with_an_object_come_once_in_plan_order_whatever_the_order_of_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [unit for unit in range(300) if unit % 7]
    pages = [[(unit, 100 + unit)] for unit in reversed(there)] + [[(300, 1), (555, 1)]]
    monkeypatch.setattr(report, "list_units", lambda storage, part: iter(pages))
    ranges = list(unit_chunks(open_storage(str(tmp_path)), 4, num_units=300))
    assert [pair for one in ranges for pair in one.units] == [(unit, 100 + unit) for unit in there]
    assert {one.part for one in ranges} == {4}
    assert max(len(one.units) for one in ranges) <= report._UNITS_PER_CHUNK


def test_an_empty_object_is_read_and_so_found_damaged_while_an_absent_one_is_not(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.put(unit_key(0, 1), b"")
    assert [one.units for one in unit_chunks(storage, 0, num_units=3)] == [((1, 0),)]


def test_the_listing_has_ended_before_the_first_unit_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = False

    def listing(storage: object, part: int) -> Iterator[list[tuple[int, int]]]:
        nonlocal ended
        yield from ([(unit, 1)] for unit in range(500))
        ended = True

    monkeypatch.setattr(report, "list_units", listing)
    next(unit_chunks(open_storage(str(tmp_path)), 0, num_units=500))
    assert ended


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full device of Linux")
def test_reports_without_scratch_space_say_so_and_are_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scene(tmp_path / "in/a.tif", 70, 90)
    model = make_model(tmp_path / "model.safetensors", "pixel")
    with monkeypatch.context() as patch:
        full = SimpleNamespace(
            NamedTemporaryFile=lambda **_: open("/dev/full", "r+b"),  # noqa: SIM115
            gettempdir=tempfile.gettempdir,
        )
        patch.setattr(report, "tempfile", full)
        predict(tmp_path / "in", model, tmp_path / "run").refused(3, tempfile.gettempdir(), "TMPDIR")
    assert not (tmp_path / "run/_SUCCESS").exists()
    ok(run("report", tmp_path / "run"))
    assert (tmp_path / "run/_SUCCESS").exists()
