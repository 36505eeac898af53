"""The engine alone against the usual loop, pixels in memory: ``pytest -m benchmark -s`` prints the table.

Variants are live processes that take turns (A B A B ...), so that other load falls on all alike; ratios are
of medians. Times are printed and never asserted; classes are: the engine may differ from the same network in
float64 in as many pixels as the case allows. The naive loop rounds too, so that the pixels in which the two
differ are printed beside their target.
"""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from engine_loops import LoopProcess

pytestmark = pytest.mark.benchmark

ROUNDS: Final = 3
NAIVE_BATCHES: Final = (1, 2, 4, 8)
BEST_NAIVE_TARGET: Final = 1.8
"""The engine against the naive loop at its own best batch."""
NAIVE_DIFFERING_PPM: Final = 10.0
"""Pixels in a million that may have another class in the naive loop than in float64."""


@dataclass(frozen=True, slots=True)
class Case:
    """One network and what the engine must reach with it."""

    family: str
    classes: int
    tiles: tuple[int, int]
    batches: tuple[int, ...]
    target: float
    """The engine against the naive loop at the same batch."""
    differing_ppm: float
    """Pixels in a million that may have another class with the engine than in float64."""

    @property
    def name(self) -> str:
        return f"{self.family}-{self.classes}"


CASES: Final = (
    Case("lraspp_mobilenet_v3_large", 2, (4, 4), (4, 8), 2.5, 1.0),
    Case("lraspp_mobilenet_v3_large", 19, (4, 4), (4,), 2.5, 5.0),
    Case("unet:16", 2, (2, 4), (4,), 3.0, 1.0),
)


def _machine() -> str:
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_engine_speed_against_the_naive_loop(case: Case, tmp_path: Path) -> None:
    variants = [("naive", batch) for batch in NAIVE_BATCHES] + [("engine", b) for b in (1, *case.batches)]
    processes = {
        variant: LoopProcess(variant[0], case.family, case.classes, variant[1], case.tiles)
        for variant in variants
    }
    try:
        seconds: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
        for _ in range(ROUNDS):
            for variant, process in processes.items():
                seconds[variant].append(process.time())
        median = {variant: statistics.median(times) for variant, times in seconds.items()}
        masks = {variant: processes[variant].mask(tmp_path / "mask.npy") for variant in variants}
        exact = LoopProcess("exact", case.family, case.classes, 1, case.tiles)
        processes["exact", 1] = exact
        truth = exact.mask(tmp_path / "mask.npy")
        mpx = processes[variants[0]].answer["px"] / 1e6
    finally:
        for process in processes.values():
            process.close()
    ppm = {variant: (mask != truth).mean() * 1e6 for variant, mask in masks.items()}
    best_naive = min(median["naive", batch] for batch in NAIVE_BATCHES)
    print(f"\n{case.name} on {_machine()}; {mpx:.1f} Mpx of 512 px tiles, median of {ROUNDS} rounds in turns")
    for (loop, batch), time_s in median.items():
        line = f"  {loop:6} batch {batch}: {mpx / time_s:6.2f} Mpx/s  {ppm[loop, batch]:.2f} px in 10^6 wrong"
        if loop == "engine":
            same = median["naive", batch] / time_s
            best = best_naive / time_s
            line += f"  {same:.2f} x naive at this batch (target {case.target})"
            line += f"  {best:.2f} x naive at its best (target {BEST_NAIVE_TARGET})"
            other = (masks[loop, batch] != masks["naive", 4]).mean() * 1e6
            line += f"  {other:.2f} px in 10^6 other than naive (target {case.differing_ppm:g})"
        print(line)
    for variant in variants:
        allowed_ppm = case.differing_ppm if variant[0] == "engine" else NAIVE_DIFFERING_PPM
        assert ppm[variant] <= allowed_ppm, f"{variant} gives wrong classes"
        assert len(set(masks[variant].ravel().tolist())) == case.classes, (
            "the case does not exercise all classes"
        )
