"""Totals of a run: the coverage ledger, the dataset's counts, and the few rows that the page shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc

from segpipe.reports.sums import COUNTS, SceneSums

SCENE_STATUSES: Final = ("ok", "empty", "partial", "failed")
NUM_WORST: Final = 20
NUM_FAILURES_SHOWN: Final = 100

_WORST_COLUMNS: Final = ("scene_id", "status", "miou", "mdice", "accuracy", "label_px", "compared_px")
_MM2_PER_KM2: Final = 1e12


@dataclass(frozen=True, slots=True)
class Planned:
    """What the plan holds, to tell how much of it has no mask yet."""

    scenes: int
    blocks: int
    pixels: int


class ReportTotals:
    """Totals of the dataset, and the few scenes and failures that the page shows."""

    def __init__(self, num_classes: int) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.class_px = np.zeros(num_classes, np.int64)
        self.worst: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self._statuses: Counter[str] = Counter()
        self._flags: Counter[str] = Counter()
        self._missing_px = 0
        self._area_mm2: Counter[str] = Counter()
        self._kind_blocks: Counter[str] = Counter()
        self._kind_scenes: Counter[str] = Counter()
        self._kind_last_scene: dict[str, str] = {}
        self._kind_first: dict[str, dict[str, str]] = {}

    def add(self, sums: SceneSums, table: Any) -> None:
        """Take whole scenes and their rows of ``scenes.parquet``."""
        for name in COUNTS:
            self.counts[name] += int(sums.count(name).sum())
        self.confusion += sums.confusion.sum(axis=0)
        self.class_px += sums.class_px.sum(axis=0)
        self._statuses.update(table["status"].to_pylist())
        self._flags["labelled"] += int(np.count_nonzero(sums.count("label_blocks")))
        self._flags["compared"] += int(np.count_nonzero(sums.count("compared_px")))
        self._flags["coarser_than_model"] += int(pc.sum(table["coarser_than_model"]).as_py() or 0)
        self._missing_px += int(pc.sum(table["missing_px"]).as_py() or 0)
        self._add_area(sums)
        compared = table.select(_WORST_COLUMNS).filter(table["miou"].is_valid())
        order = np.argsort(compared["miou"].to_numpy(), kind="stable")[:NUM_WORST]
        # sorted is stable, so that of equal scenes the first in the plan is named
        known = self.worst + compared.take(order).to_pylist()
        self.worst = sorted(known, key=lambda row: row["miou"])[:NUM_WORST]

    def add_failures(self, table: Any) -> None:
        room = NUM_FAILURES_SHOWN - len(self.failures)
        if room > 0:
            self.failures += table.slice(0, room).to_pylist()
        columns = (table[name].to_pylist() for name in ("scene_id", "error_kind", "error"))
        for scene_id, found, error in zip(*columns, strict=True):
            kind = found or "unknown"
            self._kind_blocks[kind] += 1
            if self._kind_last_scene.get(kind) != scene_id:
                self._kind_last_scene[kind] = scene_id
                self._kind_scenes[kind] += 1
                self._kind_first.setdefault(kind, {"first_scene": scene_id, "first_error": error or ""})

    def ledger(self, planned: Planned | None) -> dict[str, Any]:
        """Return the coverage part of the summary: where every scene, block and pixel has gone."""
        counts, num_scenes = self.counts, self._statuses.total()
        missing: dict[str, int] = {"pixels": self._missing_px}
        if planned is not None:
            missing = {
                "scenes": planned.scenes - num_scenes,
                "blocks": planned.blocks - counts["blocks"],
                "pixels": planned.pixels - counts["block_px"],
            }
        return {
            "scenes": {"all": num_scenes}
            | {status: self._statuses[status] for status in SCENE_STATUSES}
            | {flag: self._flags[flag] for flag in ("labelled", "compared", "coarser_than_model")},
            "blocks": {"all": counts["blocks"]} | {name: counts[name] for name in ("ok", "empty", "failed")},
            "missing": missing,
            "failures": {
                kind: {"blocks": self._kind_blocks[kind], "scenes": self._kind_scenes[kind]}
                | self._kind_first[kind]
                for kind in sorted(self._kind_blocks)
            },
            "pixels": {
                "all": counts["block_px"],
                "valid": counts["valid_px"],
                "no_data": counts["block_px"] - counts["valid_px"] - counts["failed_px"],
                "failed": counts["failed_px"],
            },
            "km2": {name: area / _MM2_PER_KM2 for name, area in self._area_mm2.items()} or None,
        }

    def _add_area(self, sums: SceneSums) -> None:
        known = sums.first["pixel_m"].is_valid().to_numpy()
        pixel_m2 = sums.first["pixel_m"].to_numpy()[known].astype(np.float64) ** 2
        if not pixel_m2.size:
            return
        block_px, valid_px, failed_px = (sums.count(name) for name in ("block_px", "valid_px", "failed_px"))
        columns = {"all": block_px, "valid": valid_px, "no_data": block_px - valid_px - failed_px}
        for name, pixels in (columns | {"failed": failed_px}).items():
            # whole mm2 in Python integers: the total does not depend on the order
            self._area_mm2[name] += sum(map(round, (pixels[known] * pixel_m2 * 1e6).tolist()))
