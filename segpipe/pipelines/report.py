"""Index, score tables and the report page, made again from the mask objects alone, in plan order.

Tasks read column projections of unit ranges and join the plan's scene facts; the driver merges their
tables as they come, so it holds a few ranges and no more, whatever the number of scenes.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from segpipe.errors import StorageFull
from segpipe.masks.ledger import Replacements, RunTotals
from segpipe.masks.plan import iter_plan, load_part, part_num_units
from segpipe.masks.read import read_counts
from segpipe.masks.run import FAILURES_KEY, SUCCESS_KEY, RunInfo, index_key, list_parts, list_units, unit_key
from segpipe.masks.schema import index_schema
from segpipe.pipelines.events import Events
from segpipe.pipelines.executor import Executor
from segpipe.reports.html import render_html
from segpipe.reports.tables import BufferedWriter, ReportBuilder, Reports, parquet_bytes, summary_json
from segpipe.reports.totals import Planned
from segpipe.storage import Storage, open_storage

_UNITS_PER_CHUNK: Final = 64
_ROWS_AT_ONCE: Final = 1024
_NO_OBJECT: Final = -1
_SCENE_COLUMNS: Final = ("downsample", "pixel_m", "coarser_than_model")


@dataclass(frozen=True, slots=True)
class UnitChunk:
    """A few units of one part, with the sizes of their objects, that one task reads."""

    run_uri: str
    part: int
    units: tuple[tuple[int, int], ...]
    """(unit, object size in bytes)."""


class Made(NamedTuple):
    """What reports were made of."""

    summary: dict[str, Any]
    missing: int
    """Units without an object."""
    units: int
    """Units that are planned."""


def make_reports(storage: Storage, info: RunInfo, executor: Executor, events: Events) -> Made:
    """Write index and reports of what is there, and _SUCCESS where that is all that is planned.

    Made anew where another driver has planned or ended more meanwhile, so that what stays is never older
    than what it found.
    Raises CheckError, naming the object, where one is damaged; StorageFull where scratch space ends.
    """
    try:
        while True:
            parts = list_parts(storage)
            made = _make_reports(storage, info, parts, executor, events)
            if list_parts(storage) == parts and not (made.missing and _all_there(storage, parts)):
                return made
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fix = "Free space, or set TMPDIR to a folder with more of it, and run the same command again."
        raise StorageFull("no scratch space for index and reports", tempfile.gettempdir(), fix) from error


def _make_reports(
    storage: Storage, info: RunInfo, parts: Sequence[int], executor: Executor, events: Events
) -> Made:
    replacements = Replacements(storage, parts)
    totals = RunTotals()
    with _scratch_file() as scenes_file, _scratch_file() as failures_file:
        builder = ReportBuilder(info.card.classes, scenes_file, failures_file)
        schema = index_schema(info.recipe_key, info.card.classes)
        try:
            num_units = {part: part_num_units(storage, part) for part in parts}
            num_planned = sum(num_units.values())

            def progress(done: int) -> None:
                events.reporting(totals.units + done, num_planned)

            for part, units in num_units.items():
                totals += _report_part(
                    storage, part, units, schema, replacements, builder, executor, progress
                )
            missing = num_planned - totals.units
            complete = num_planned > 0 and not missing
            planned = None if complete else _planned(storage, info, parts, replacements)
        except BaseException:
            with suppress(Exception):
                builder.close()  # its writers must end before their files do
            raise
        reports = builder.close(_about(info), planned)
        _put_reports(storage, info, reports, scenes_file, failures_file)
    if complete:
        storage.put(SUCCESS_KEY, totals.to_json())
    return Made(reports.summary, missing, num_planned)


def _all_there(storage: Storage, parts: Sequence[int]) -> bool:
    for part in parts:
        num_units = part_num_units(storage, part)
        if (_object_sizes(storage, part, num_units) == _NO_OBJECT).any():
            return False
    return True


def _report_part(
    storage: Storage,
    part: int,
    num_units: int,
    schema: Any,
    replacements: Replacements,
    builder: ReportBuilder,
    executor: Executor,
    progress: Callable[[int], None],
) -> RunTotals:
    """Read one part's objects into its index and the score tables, and return what they amount to."""
    replaced = pa.array(sorted(replacements.of(part)), pa.string())
    totals = RunTotals(parts=1)
    with _scratch_file() as index:
        # Closed in any case: a writer that outlives its file complains at the end of the process.
        with closing(BufferedWriter(index, schema)) as writer:
            for read in gathered(executor.map_ordered(read_chunk, unit_chunks(storage, part, num_units))):
                rows = read.rows
                writer.write(rows.select(schema.names).cast(schema))
                builder.add(_current(rows, replaced))
                pixels = pc.sum(pc.multiply(rows["height"].cast(pa.int64()), rows["width"])).as_py()
                totals += RunTotals(0, read.num_units, rows.num_rows, pixels or 0, read.num_bytes)
                progress(totals.units)
        _put_scratch(storage, index_key(part), index)
    return totals


def unit_chunks(storage: Storage, part: int, num_units: int) -> Iterator[UnitChunk]:
    """Iterate over the units of a part that have an object, in plan order, some at a time.

    The listing is over before the first is read: a store may hold all names of a folder for it.
    """
    sizes = _object_sizes(storage, part, num_units)
    units = np.flatnonzero(sizes != _NO_OBJECT)
    for start in range(0, len(units), _UNITS_PER_CHUNK):
        some = units[start : start + _UNITS_PER_CHUNK]
        yield UnitChunk(storage.root, part, tuple(zip(some.tolist(), sizes[some].tolist(), strict=True)))


def _object_sizes(storage: Storage, part: int, num_units: int) -> np.ndarray[Any, Any]:
    """Return the bytes of each unit's object, int64 (num_units,), _NO_OBJECT where there is none."""
    sizes = np.full(num_units, _NO_OBJECT, np.int64)
    for page in list_units(storage, part):
        for unit, size in page:
            if unit < num_units:
                sizes[unit] = size
    return sizes


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """The index rows of some units, with the plan's facts of each scene joined on."""

    rows: Any
    num_units: int
    num_bytes: int


def gathered(reads: Iterable[ChunkRows]) -> Iterator[ChunkRows]:
    """Join neighbours of few rows, so that what is held of them costs their bytes and little more.

    A table costs the driver 100 kB whatever its rows, in the objects of its columns and in the memory of Ray
    that its buffers keep from being reused.
    """
    waiting: list[ChunkRows] = []
    for read in reads:
        waiting.append(read)
        if sum(one.rows.num_rows for one in waiting) >= _ROWS_AT_ONCE:
            joined, waiting = _gather(waiting), []  # lets the small ones go before this one is used
            yield joined
    if waiting:
        yield _gather(waiting)


def _gather(reads: Sequence[ChunkRows]) -> ChunkRows:
    if len(reads) == 1:
        return reads[0]
    rows = pa.concat_tables([read.rows for read in reads], promote_options="permissive").combine_chunks()
    return ChunkRows(rows, sum(read.num_units for read in reads), sum(read.num_bytes for read in reads))


def read_chunk(item: UnitChunk) -> ChunkRows:
    """Read the rows of some units, without their masks."""
    storage = open_storage(item.run_uri)
    tables = []
    for unit, size in item.units:
        table = read_counts(storage, item.part, unit, size)
        key = unit_key(item.part, unit)
        table = table.append_column("object", pa.repeat(pa.scalar(key, pa.string()), table.num_rows))
        table = table.append_column("object_bytes", pa.repeat(pa.scalar(size, pa.int64()), table.num_rows))
        tables.append(table)
    # Whole columns: one chunk per unit and column costs the driver a hundred times what its few rows do.
    rows = _join_plan(pa.concat_tables(tables), storage, item).combine_chunks()
    return ChunkRows(rows, len(item.units), sum(size for _, size in item.units))


def _join_plan(rows: Any, storage: Storage, item: UnitChunk) -> Any:
    first, last = item.units[0][0], item.units[-1][0]
    columns = ("scene_id", "first_unit", "units", *_SCENE_COLUMNS)
    batches = [
        batch.filter(
            pc.and_(
                pc.less_equal(batch["first_unit"], last),
                pc.greater(pc.add(batch["first_unit"], batch["units"]), first),
            )
        )
        for batch in iter_plan(storage, item.part, columns)
    ]
    plan = pa.Table.from_batches(batches)
    where = pc.index_in(rows["scene_id"], plan["scene_id"].combine_chunks())
    for name in _SCENE_COLUMNS:
        rows = rows.append_column(name, plan[name].take(where))
    return rows


def _current(rows: Any, replaced: Any) -> Any:
    """Leave out the rows of scenes that a newer part has replaced."""
    return rows.filter(pc.invert(pc.is_in(rows["scene_id"], replaced))) if len(replaced) else rows


def _planned(storage: Storage, info: RunInfo, parts: Sequence[int], replacements: Replacements) -> Planned:
    scenes = blocks = pixels = 0
    for part in parts:
        replaced = replacements.of(part)
        for scene in load_part(storage, part, info.facts).scenes():
            if scene.source.scene_id in replaced:
                continue
            grid = scene.grid(info.facts)
            scenes += 1
            blocks += grid.num_blocks if grid else 1
            pixels += grid.height * grid.width if grid else 0
    return Planned(scenes, blocks, pixels)


def _about(info: RunInfo) -> dict[str, Any]:
    return {"recipe_key": info.recipe_key, "model_sha256": info.model_sha256, "family": info.card.family}


def _scratch_file() -> Any:
    return tempfile.NamedTemporaryFile(prefix="segpipe-report-", suffix=".parquet")


def _put_scratch(storage: Storage, key: str, file: Any) -> None:
    file.flush()
    storage.put_file(key, Path(file.name))


def _put_reports(storage: Storage, info: RunInfo, reports: Reports, scenes: Any, failures: Any) -> None:
    _put_scratch(storage, "reports/scenes.parquet", scenes)
    _put_scratch(storage, FAILURES_KEY, failures)
    storage.put("reports/classes.parquet", parquet_bytes(reports.classes))
    storage.put("reports/confusion.parquet", parquet_bytes(reports.confusion))
    storage.put("reports/report.html", render_html(reports, info.card.classes).encode())
    # Last: a summary that is there speaks of tables that are there.
    storage.put("reports/summary.json", summary_json(reports.summary))
