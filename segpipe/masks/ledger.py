"""The coverage ledger: every block of the plan stands in exactly one line, so a hole cannot pass unseen.

Lines add up to the plan in blocks and pixels: planned = ok + empty + failed (by kind) + missing + damaged
+ superseded, where superseded are stored blocks of scenes that a newer part replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from segpipe.errors import CheckError
from segpipe.geometry.units import UnitPacker
from segpipe.masks.damage import explain_damage
from segpipe.masks.plan import PlanPart, PlanScene, block_sizes_px, iter_plan
from segpipe.masks.run import plan_key
from segpipe.storage import Storage
from segpipe.wording import Named

MISSING: Final = "missing"
DAMAGED: Final = "damaged"
SUPERSEDED: Final = "superseded"

_SCENES_AT_A_TIME: Final = 1000

NO_HEADER: Final = "not opened"
"""Stands in place of a validity source where the scene's header could not be read."""


_STORED_NAMES: Final = {
    "parts": "parts",
    "units": "units",
    "rows": "rows",
    "pixels": "pixels",
    "object_bytes": "bytes",
}


@dataclass(frozen=True, slots=True)
class RunTotals:
    """What ``_SUCCESS`` says: parts, units, rows and pixels of the plan, bytes of all mask objects."""

    parts: int = 0
    units: int = 0
    rows: int = 0
    pixels: int = 0
    """Scene pixels of all rows' windows (no-data pixels too)."""
    object_bytes: int = 0

    def __add__(self, other: RunTotals) -> RunTotals:
        return RunTotals(
            self.parts + other.parts,
            self.units + other.units,
            self.rows + other.rows,
            self.pixels + other.pixels,
            self.object_bytes + other.object_bytes,
        )

    def to_tree(self) -> dict[str, int]:
        """Return the values under the names that ``_SUCCESS`` has."""
        return {stored: getattr(self, name) for name, stored in _STORED_NAMES.items()}

    def to_json(self) -> bytes:
        """Return the content of ``_SUCCESS``."""
        return (json.dumps(self.to_tree(), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> RunTotals:
        """Read ``_SUCCESS``, passing over keys that this version does not know; ValueError if damaged."""
        tree = json.loads(data)
        if not isinstance(tree, dict) or any(
            type(tree.get(name)) is not int for name in _STORED_NAMES.values()
        ):
            raise ValueError(f"needs the whole numbers {', '.join(_STORED_NAMES.values())}")
        return cls(**{name: tree[stored] for name, stored in _STORED_NAMES.items()})


@dataclass(slots=True)
class Line:
    """One line of the ledger. A scene or unit of several statuses is counted in each of their lines."""

    status: str
    kind: str | None = None
    scenes: int = 0
    units: int = 0
    blocks: int = 0
    pixels: int = 0
    km2: float = 0.0
    """Ground area of the pixels whose size on the ground is known."""
    unknown_px: int = 0
    """Pixels whose size on the ground is not known."""

    def add_blocks(self, blocks: int, pixels: int, pixel_m: float | None) -> None:
        self.blocks += blocks
        self.pixels += pixels
        if pixel_m is None:
            self.unknown_px += pixels
        else:
            self.km2 += pixel_m**2 * pixels / 1e6


@dataclass(frozen=True, slots=True)
class Tally:
    """Blocks of one scene in one unit that share a status and kind."""

    scene_id: str
    status: str
    kind: str | None
    blocks: int
    pixels: int
    pixel_m: float | None


@dataclass(slots=True)
class Ledger:
    """Adds up units in plan order; memory is a few lines whatever the archive."""

    planned: Line = field(default_factory=lambda: Line("planned"))
    lines: dict[tuple[str, str | None], Line] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    """Scenes by what says which of their pixels are data; superseded ones left out."""
    superseded_scenes: int = 0
    coarser: Named = field(default_factory=Named)
    """Scenes whose pixels are more than 1.5 times coarser than the model's."""
    _last: dict[tuple[str, str | None], tuple[Any, Any]] = field(default_factory=dict)

    def add_scene(self, scene: PlanScene, superseded: bool) -> None:
        """Count one scene of the plan."""
        self.planned.scenes += 1
        if superseded:
            self.superseded_scenes += 1
            return
        source = NO_HEADER if scene.header is None else scene.header.valid_source
        self.sources[source] = self.sources.get(source, 0) + 1
        if scene.coarser_than_model:
            self.coarser.add(scene.source.scene_id)

    def add_unit(self, part: int, unit: int, tallies: Iterable[Tally]) -> None:
        """Count what became of one unit's blocks. Units come in order, so a scene's blocks do too."""
        for tally in tallies:
            key = (tally.status, tally.kind)
            line = self.lines.get(key)
            if line is None:
                line = self.lines[key] = Line(*key)
            last_scene, last_unit = self._last.get(key, (None, None))
            line.scenes += last_scene != (part, tally.scene_id)
            line.units += last_unit != (part, unit)
            self._last[key] = ((part, tally.scene_id), (part, unit))
            line.add_blocks(tally.blocks, tally.pixels, tally.pixel_m)

    @property
    def balanced(self) -> bool:
        """Whether the lines add up to what the plan says, in blocks and in pixels."""
        lines = self.lines.values()
        found = (sum(line.blocks for line in lines), sum(line.pixels for line in lines))
        return found == (self.planned.blocks, self.planned.pixels)

    def ordered(self) -> list[Line]:
        """Return the lines: finished work first, then what is wrong, then superseded."""
        order = {name: i for i, name in enumerate(("ok", "empty", "failed", MISSING, DAMAGED, SUPERSEDED))}
        rank = [(order.get(line.status, 2.5), line.status, line.kind or "") for line in self.lines.values()]
        return [line for _, line in sorted(zip(rank, self.lines.values(), strict=True), key=lambda x: x[0])]

    def to_tree(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "planned": asdict(self.planned),
            "lines": [asdict(line) for line in self.ordered()],
            "balanced": self.balanced,
            "valid_sources": dict(sorted(self.sources.items())),
            "superseded_scenes": self.superseded_scenes,
            "coarser_than_model": asdict(self.coarser),
        }


class Replacements:
    """Which scenes of a part a newer part replaced. Keeps no names but those it is asked for."""

    def __init__(self, storage: Storage, parts: Sequence[int]) -> None:
        self._storage = storage
        self._newer: dict[int, list[int]] = {}
        for part in parts:
            found: set[int] = set()
            for batch in iter_plan(storage, part, ["replaces_part"]):
                found.update(old for old in batch.column(0).unique().to_pylist() if old is not None)
            for old in sorted(found):
                self._newer.setdefault(old, []).append(part)

    def of(self, part: int) -> frozenset[str]:
        """Return the ids of the scenes of ``part`` that a newer part replaced."""
        names: set[str] = set()
        for newer in self._newer.get(part, ()):
            for batch in iter_plan(self._storage, newer, ["scene_id", "replaces_part"]):
                pairs = zip(batch["scene_id"].to_pylist(), batch["replaces_part"].to_pylist(), strict=True)
                names.update(scene_id for scene_id, old in pairs if old == part)
        return frozenset(names)


def part_scenes(part: PlanPart) -> Iterator[PlanScene]:
    """Iterate over a part's scenes, some at a time; CheckError when a row cannot be read."""
    with explain_damage(plan_key(part.part)):
        for start in range(0, part.num_scenes, _SCENES_AT_A_TIME):
            yield from part.scenes(start, min(start + _SCENES_AT_A_TIME, part.num_scenes))


@dataclass(frozen=True, slots=True)
class PartCount:
    """What the plan alone says of one part."""

    units: int
    rows: int
    pixels: int


def count_part(part: PlanPart, ledger: Ledger | None = None, superseded: Set[str] = frozenset()) -> PartCount:
    """Count a part's units, rows and pixels, and check that its units follow from its scenes.

    ``ledger`` takes up the scenes and what is planned; ``superseded`` are the ids that a newer part replaced.
    Raises CheckError where a scene's units are not those that packing gives.
    """
    packer = UnitPacker(part.facts.unit_px, part.facts.tile_px)
    rows = pixels = 0
    for scene in part_scenes(part):
        sizes = block_sizes_px(scene.grid(part.facts))
        span = packer.add(sizes)
        if (span.first_unit, span.num_units) != (scene.first_unit, scene.units):
            raise CheckError(
                f"scene {scene.source.scene_id!r} is planned as {scene.units} units from {scene.first_unit}, "
                f"its size gives {span.num_units} from {span.first_unit}",
                plan_key(part.part),
            )
        blocks, scene_px = max(1, len(sizes)), sum(sizes)
        rows, pixels = rows + blocks, pixels + scene_px
        if ledger is not None:
            ledger.add_scene(scene, scene.source.scene_id in superseded)
            ledger.planned.add_blocks(blocks, scene_px, scene.header.pixel_m if scene.header else None)
    if ledger is not None:
        ledger.planned.units += packer.num_units
    return PartCount(packer.num_units, rows, pixels)
