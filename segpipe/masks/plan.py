"""The stored plan: one row per scene, and which blocks make a unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.geometry.grid import Block, SceneGrid, make_grid
from segpipe.geometry.units import split_blocks
from segpipe.masks.damage import explain_damage, open_parquet
from segpipe.masks.read import SceneUnits
from segpipe.masks.run import Facts, plan_key
from segpipe.masks.schema import PLAN_COLUMNS, PLAN_FIELDS
from segpipe.rasters.scene import SceneHeader, SceneSource, Version
from segpipe.storage import Storage

PART_SCENES = 10_000
"""Most scenes of one part of the plan."""


@dataclass(frozen=True, slots=True)
class PlanScene:
    """One row of the plan. ``header`` is None, and the error set, where the header could not be read."""

    source: SceneSource
    header: SceneHeader | None
    downsample: int = 1
    coarser_than_model: bool | None = None
    first_unit: int = 0
    units: int = 0
    replaces_part: int | None = None
    masks: SceneUnits | None = None
    """evaluate --masks: where the scene's masks lie in the run that is scored."""
    error_kind: str | None = None
    error: str | None = None
    bands_named: tuple[str, ...] | None = None
    """What the file calls the chosen bands, "" for no name, where the model takes other ones in their places;
    known while planning, not kept in the plan."""

    @property
    def datetime(self) -> str | None:
        """Acquisition time, ISO 8601: the catalogue's, else the file's."""
        return self.source.datetime or (self.header.datetime if self.header is not None else None)

    def grid(self, facts: Facts) -> SceneGrid | None:
        """Return the scene's cells and blocks, None where the header could not be read."""
        if self.header is None:
            return None
        return make_grid(
            self.header.height,
            self.header.width,
            tile_px=facts.tile_px,
            margin_px=facts.margin_px,
            block_px=facts.block_px,
            downsample=self.downsample,
            blend=facts.blend,
            strips=self.header.strips,
        )


def block_sizes_px(grid: SceneGrid | None) -> list[int]:
    """Return the scene pixels of each block; empty where there is no grid."""
    if grid is None:
        return []
    return [grid.block_window(index).num_px for index in range(grid.num_blocks)]


@dataclass(frozen=True, slots=True)
class UnitScene:
    """The part of one scene that one unit computes; ``blocks`` is empty for an unreadable header."""

    scene: PlanScene
    blocks: tuple[Block, ...]


class PlanPart:
    """One part of the plan in memory: at most PART_SCENES rows."""

    def __init__(self, part: int, table: Any, facts: Facts) -> None:
        self.part = part
        self.facts = facts
        self._table = table
        self._first = table["first_unit"].to_numpy()
        self._last = self._first + table["units"].to_numpy() - 1
        # A scene of many blocks is cut into units once, not for each of its units. No method of self: a part
        # that is let go is freed at once, not when the garbage collector gets to its circle.
        self._blocks_of_units = lru_cache(maxsize=8)(partial(_cut_scene, table, facts))

    @property
    def num_units(self) -> int:
        return int(self._last[-1]) + 1 if len(self._last) else 0

    @property
    def num_scenes(self) -> int:
        return int(self._table.num_rows)

    def scenes(self, start: int = 0, stop: int | None = None) -> Iterator[PlanScene]:
        """Iterate over the scenes in plan order."""
        for row in self._table.slice(start, None if stop is None else stop - start).to_pylist():
            yield scene_of_row(row)

    def unit(self, unit: int) -> list[UnitScene]:
        """Return what unit ``unit`` computes, in plan order."""
        start = int(np.searchsorted(self._last, unit, side="left"))
        stop = int(np.searchsorted(self._first, unit, side="right"))
        found = []
        for index, scene in enumerate(self.scenes(start, stop), start):
            grid = scene.grid(self.facts)
            if grid is None:
                found.append(UnitScene(scene, ()))
            elif grid.num_blocks == 1:
                found.append(UnitScene(scene, (grid.block(0),)))
            else:
                indices = self._blocks_of_units(index)[unit - scene.first_unit]
                found.append(UnitScene(scene, tuple(grid.block(i) for i in indices)))
        return found


def _cut_scene(table: Any, facts: Facts, index: int) -> list[range]:
    """Return the block indices of each unit of the scene in row ``index`` of a part."""
    scene = scene_of_row(table.slice(index, 1).to_pylist()[0])
    return split_blocks(block_sizes_px(scene.grid(facts)), facts.unit_px, facts.tile_px)


def load_part(storage: Storage, part: int, facts: Facts) -> PlanPart:
    """Read one part of the plan; CheckError when it is damaged."""
    file = open_parquet(storage, plan_key(part))
    with explain_damage(storage.uri(plan_key(part))):
        return PlanPart(part, file.read(use_threads=False), facts)


def iter_plan(storage: Storage, part: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Iterate over the Arrow record batches of one plan part; CheckError when it is damaged."""
    file = open_parquet(storage, plan_key(part))
    with explain_damage(storage.uri(plan_key(part))):
        yield from file.iter_batches(
            batch_size=2048, columns=list(columns) if columns else None, use_threads=False
        )


def part_num_units(storage: Storage, part: int) -> int:
    """Return how many units a part has, from its footer and last row group alone."""
    file = open_parquet(storage, plan_key(part))
    if file.metadata.num_rows == 0:
        return 0
    with explain_damage(storage.uri(plan_key(part))):
        last = file.read_row_group(file.num_row_groups - 1, columns=["first_unit", "units"]).to_pylist()[-1]
        return int(last["first_unit"] + last["units"])


def encode_part(scenes: Sequence[PlanScene], extra_schema: Any = None) -> bytes:
    """Return the Parquet bytes of one part; the catalogue's columns follow the plan's own.

    ``extra_schema`` is the Arrow schema of those columns, one for all parts; None = there are none.
    """
    rows = [row_of_scene(scene) for scene in scenes]
    own = pa.Table.from_pylist(rows, schema=pa.schema(PLAN_FIELDS))
    for item in extra_schema or ():
        column = pa.array([scene.source.extra.get(item.name) for scene in scenes], item.type)
        name = f"catalogue_{item.name}" if item.name in PLAN_COLUMNS else item.name
        own = own.append_column(pa.field(name, item.type), column)
    sink = pa.BufferOutputStream()
    pq.write_table(own, sink, compression="zstd", row_group_size=2048, store_schema=False, version="2.6")
    return sink.getvalue().to_pybytes()


def row_of_scene(scene: PlanScene) -> dict[str, Any]:
    """Return the plan row of a scene, without catalogue columns."""
    source, header, masks = scene.source, scene.header, scene.masks
    row: dict[str, Any] = {
        "scene_id": source.scene_id,
        "uri": source.uri,
        "version": source.version_text,
        "member": source.member,
        "offset": source.offset,
        "length": source.length,
        "shard_members": source.shard_members,
        "label_uri": source.label_uri,
        "label_offset": source.label_offset,
        "label_length": source.label_length,
        "valid_uri": source.valid_uri,
        "datetime": scene.datetime,
        "downsample": scene.downsample,
        "coarser_than_model": scene.coarser_than_model,
        "first_unit": scene.first_unit,
        "units": scene.units,
        "replaces_part": scene.replaces_part,
        "error_kind": scene.error_kind,
        "error": scene.error,
    }
    if masks is not None:
        row |= {"masks_part": masks.part, "masks_first_unit": masks.first_unit, "masks_units": masks.units}
    if header is not None:
        row |= {
            name: getattr(header, name)
            for name in ("height", "width", "num_bands", "dtype", "driver", "valid_source", "strips")
        }
        row |= {name: getattr(header, name) for name in ("crs", "pixel_m")}
        row |= {
            "bands": list(header.bands),
            "file_block_height": header.file_block[0],
            "file_block_width": header.file_block[1],
            "transform": None if header.transform is None else list(header.transform),
        }
    return row


def scene_of_row(row: dict[str, Any]) -> PlanScene:
    """Return the scene of a plan row; columns that this version does not know are catalogue columns."""
    versions = [*row["version"].split(";"), "", ""][:3]
    scene_version, label_version, valid_version = (Version.parse(text) if text else None for text in versions)
    if scene_version is None:
        raise ValueError(f"plan row of {row['scene_id']!r} has no version")
    source = SceneSource(
        scene_id=row["scene_id"],
        uri=row["uri"],
        version=scene_version,
        label_uri=row["label_uri"],
        label_version=label_version,
        valid_uri=row["valid_uri"],
        valid_version=valid_version,
        member=row["member"],
        offset=row["offset"],
        length=row["length"],
        label_offset=row["label_offset"],
        label_length=row["label_length"],
        shard_members=row["shard_members"],
        datetime=row["datetime"],
        extra={name: value for name, value in row.items() if name not in PLAN_COLUMNS},
    )
    masks = None
    if row["masks_part"] is not None:
        masks = SceneUnits(row["scene_id"], row["masks_part"], row["masks_first_unit"], row["masks_units"])
    return PlanScene(
        source=source,
        header=_header_of_row(row),
        downsample=row["downsample"],
        coarser_than_model=row["coarser_than_model"],
        first_unit=row["first_unit"],
        units=row["units"],
        replaces_part=row["replaces_part"],
        masks=masks,
        error_kind=row["error_kind"],
        error=row["error"],
    )


def _header_of_row(row: dict[str, Any]) -> SceneHeader | None:
    if row["height"] is None:
        return None
    return SceneHeader(
        height=row["height"],
        width=row["width"],
        num_bands=row["num_bands"],
        dtype=row["dtype"],
        driver=row["driver"],
        bands=tuple(row["bands"]),
        valid_source=row["valid_source"],
        file_block=(row["file_block_height"], row["file_block_width"]),
        strips=row["strips"],
        crs=row["crs"],
        transform=None if row["transform"] is None else tuple(row["transform"]),
        pixel_m=row["pixel_m"],
        datetime=row["datetime"],
    )
