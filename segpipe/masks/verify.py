"""Proof of a run from its storage alone: every planned unit there once, whole, with counts that agree.

Needs neither Ray nor torch. Memory is one part of the plan and a few units, whatever the archive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from segpipe.errors import CheckError, ObjectMissing
from segpipe.masks.ledger import DAMAGED, MISSING, Ledger, Replacements, RunTotals, count_part
from segpipe.masks.plan import PlanPart, load_part
from segpipe.masks.run import (
    SUCCESS_KEY,
    RunInfo,
    list_parts,
    masks_prefix,
    parse_unit_key,
    plan_key,
    require_run,
    unit_key,
)
from segpipe.masks.unit_check import UnitChecker, UnitReport
from segpipe.storage import Storage
from segpipe.threads import map_in_order
from segpipe.wording import Named

FindingKind = Literal["missing", "damaged", "unplanned"]
SuccessState = Literal["right", "absent", "outdated", "wrong"]

OnProgress = Callable[[int, int], None]
"""Called with (units checked, units planned)."""

OnFinding = Callable[["Finding"], None]

_ABSENT = -1
_LEARN_UNITS = 3  # objects that are written again to see whether bytes can be compared at all


@dataclass(frozen=True, slots=True)
class Finding:
    """One object that is not as the plan wants it."""

    kind: FindingKind
    key: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" if self.reason else self.key


@dataclass(slots=True)
class Verification:
    """What ``verify_run`` found. The lists hold the first names and the whole count."""

    root: str
    recipe_key: str
    full: bool
    """Whether every mask was decoded and counted again."""
    bytes_compared: bool = False
    """Whether all bytes were compared with what the rows are written as (full, same Parquet writer)."""
    parts: int = 0
    units_checked: int = 0
    missing: Named = field(default_factory=Named)
    """Planned units without an object."""
    damaged: Named = field(default_factory=Named)
    """Objects that are there and not whole, with the reason."""
    unplanned: Named = field(default_factory=Named)
    """Objects among the masks that no part of the plan names."""
    plan_damaged: bool = False
    """Whether a part of the plan is among the damaged: its scenes cannot be told without it."""
    totals: RunTotals = field(default_factory=RunTotals)
    """What the plan and the listing say; ``_SUCCESS`` must say the same."""
    success: SuccessState = "absent"
    """``_SUCCESS``: outdated = of fewer parts than are planned now, and right for those."""
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def complete(self) -> bool:
        """Whether every planned unit has an object."""
        return self.parts > 0 and self.missing.count == 0

    @property
    def exit_code(self) -> int:
        """0 whole, 3 units are missing (run the same command again), 4 objects are damaged or unplanned."""
        if self.damaged.count or self.unplanned.count or not self.ledger.balanced:
            return 4
        return 0 if self.complete else 3

    def to_tree(self) -> dict[str, Any]:
        """Return JSON-ready values: counts, first names, the ledger."""
        return {
            "run": self.root,
            "recipe_key": self.recipe_key,
            "full": self.full,
            "bytes_compared": self.bytes_compared,
            "complete": self.complete,
            "success": self.success,
            "units_checked": self.units_checked,
            "missing": asdict(self.missing),
            "damaged": asdict(self.damaged),
            "unplanned": asdict(self.unplanned),
            "totals": self.totals.to_tree(),
            "ledger": self.ledger.to_tree(),
        }


def verify_run(
    storage: Storage,
    *,
    full: bool = False,
    threads: int = 8,
    on_progress: OnProgress | None = None,
    on_finding: OnFinding | None = None,
) -> Verification:
    """Check every unit of every part of the plan, and that nothing else lies among the masks.

    All bytes are read, and the masks' checksums are checked. ``full`` also decodes every mask, counts its
    pixels again and compares each object with what its rows are written as. ``on_finding`` is told of every
    object that is missing, damaged or unplanned, as it is found, while the result names the first few of
    each. Raises InputError where there is no run, StorageError where storage fails.
    """
    return _Verifier(storage, require_run(storage), full, threads, on_progress, on_finding).run()


class _Verifier:
    def __init__(
        self,
        storage: Storage,
        info: RunInfo,
        full: bool,
        threads: int,
        on_progress: OnProgress | None,
        on_finding: OnFinding | None,
    ) -> None:
        self._storage = storage
        self._full = full
        self._threads = threads
        self._on_progress = on_progress
        self._on_finding = on_finding
        self._info = info
        self._checker = UnitChecker(storage, info, full)
        self._result = Verification(storage.root, info.recipe_key, full)
        self._whole: dict[int, RunTotals] = {}
        self._planned_units = 0

    def run(self) -> Verification:
        parts = self._check_plan()
        self._replacements = Replacements(self._storage, parts)
        for number in parts:
            self._check_part(number)
        self._find_unplanned(frozenset(parts))
        self._check_success()
        return self._result

    def _find(self, kind: FindingKind, key: str, reason: str = "") -> None:
        finding = Finding(kind, key, reason)
        getattr(self._result, kind).add(str(finding))
        if self._on_finding is not None:
            self._on_finding(finding)

    def _check_plan(self) -> list[int]:
        """Return the parts that are whole; the others are named."""
        found = list_parts(self._storage)
        self._result.parts = len(found)
        good = []
        for number in range(found[-1] + 1 if found else 0):
            key = plan_key(number)
            if number not in found:
                self._find("damaged", key, "this part of the plan is gone")
                continue
            try:
                part = load_part(self._storage, number, self._info.facts)
                self._planned_units += count_part(part).units
                good.append(number)
            except CheckError as error:
                self._find("damaged", key, error.what)
        self._result.plan_damaged = bool(self._result.damaged.count)
        return good

    def _find_unplanned(self, parts: frozenset[int]) -> None:
        """Name objects that no plan names, unless their part of the plan is damaged or just being made."""

        @cache
        def has_plan(number: int) -> bool:
            return self._storage.stat(plan_key(number)) is not None

        for page in self._storage.list("masks/"):
            for info in page:
                number = _part_of(info.key)
                if number is None or (number not in parts and not has_plan(number)):
                    self._find("unplanned", info.key)

    def _check_part(self, number: int) -> None:
        superseded = self._replacements.of(number)
        part = load_part(self._storage, number, self._info.facts)
        count = count_part(part, self._result.ledger, superseded)
        sizes = np.full(count.units, _ABSENT, np.int64)
        # A listing of its own, for a listing of all parts may come in any order and be too long to keep.
        for page in self._storage.list(masks_prefix(number)):
            for info in page:
                name = parse_unit_key(info.key)
                if name is None:
                    continue  # named with the objects that are no part's
                if name[1] >= count.units or unit_key(*name) != info.key:
                    self._find("unplanned", info.key)
                else:
                    sizes[name[1]] = info.size_bytes
        bad = self._check_units(part, sizes, superseded)
        total = RunTotals(1, count.units, count.rows, count.pixels, int(sizes[sizes != _ABSENT].sum()))
        self._result.totals += total
        if not bad:
            self._whole[number] = total

    def _check_units(self, part: PlanPart, sizes: Any, superseded: frozenset[str]) -> int:
        """Check all units of one part; return how many are missing or damaged."""

        def check(unit: int) -> UnitReport:
            size = int(sizes[unit])
            return self._checker.check(part, unit, None if size == _ABSENT else size, superseded)

        bad = 0
        if self._full and not self._result.bytes_compared:
            present = np.flatnonzero(sizes != _ABSENT)[:_LEARN_UNITS].tolist()
            self._result.bytes_compared = any(self._checker.learn(part.part, unit) for unit in present)
        for unit, report in enumerate(map_in_order(check, range(len(sizes)), self._threads)):
            self._result.ledger.add_unit(part.part, unit, report.tallies)
            key = unit_key(part.part, unit)
            if report.missing:
                self._find(MISSING, key)
            elif report.fault is not None:
                self._find(DAMAGED, key, report.fault)
            bad += report.missing or report.fault is not None
            self._result.units_checked += 1
            if self._on_progress is not None:
                self._on_progress(self._result.units_checked, self._planned_units)
        return bad

    def _check_success(self) -> None:
        """Compare ``_SUCCESS`` with what was found of the parts that it speaks of."""
        try:
            said = RunTotals.from_json(self._storage.read(SUCCESS_KEY))
        except ObjectMissing:
            return
        except ValueError as error:
            self._wrong_success(f"it cannot be read ({error})")
            return
        covered = range(said.parts)
        self._result.success = "right" if said.parts == self._result.parts else "outdated"
        if said.parts > self._result.parts or said.parts < 1:
            self._wrong_success(f"it speaks of {said.parts} parts, the plan has {self._result.parts}")
        elif all(number in self._whole for number in covered):
            total = RunTotals()
            for number in covered:
                total += self._whole[number]
            if said != total:
                self._wrong_success(f"it says {_numbers(said)}; plan and listing say {_numbers(total)}")

    def _wrong_success(self, reason: str) -> None:
        self._result.success = "wrong"
        self._find("damaged", SUCCESS_KEY, reason)


def _part_of(key: str) -> int | None:
    name = parse_unit_key(key)
    return name[0] if name is not None and key.startswith(masks_prefix(name[0])) else None


def _numbers(totals: RunTotals) -> str:
    return ", ".join(f"{value} {name}" for name, value in totals.to_tree().items())
