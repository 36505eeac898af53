"""Progress of predict: rates and the time that is left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from segpipe.cli import progress
from segpipe.cli.progress import ProgressEvents
from segpipe.pipelines.worker import UnitResult


class Clock:
    """A clock that goes only where it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_rates_and_eta_are_of_the_units_that_were_missing_and_the_time_since_the_start(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    events = ProgressEvents()
    clock.now_s += 500.0  # planning
    events.started(units=10, missing=4)
    clock.now_s += 30.0
    events.unit(UnitResult(0, 6, "done", scene_px=60_000_000, area_m2=3e6))
    clock.now_s += 42.0
    events.unit(UnitResult(0, 7, "done", scene_px=12_000_000, area_m2=6e6, failed=1))
    clock.now_s += 2928.0
    events.unit(UnitResult(0, 8, "done", skipped=True, scene_px=99_000_000, area_m2=9e9))
    clock.now_s += 1000.0
    events.unit(UnitResult(0, 9, "done"))
    assert capsys.readouterr().err.splitlines() == [
        "4 units to compute, 6 there already",
        "1 of 4 units  2.00 Mpx/s  360 km2/h  ETA 1:30",
        "2 of 4 units  1.00 Mpx/s  450 km2/h  ETA 1:12  1 block failed",
        "3 of 4 units  0.02 Mpx/s  10.8 km2/h  ETA 16:40  1 block failed",
        "4 of 4 units  0.02 Mpx/s  8.1 km2/h  1 block failed",
    ]


@pytest.mark.parametrize(
    ("area_m2", "rate"),
    [
        (8.5527e11, "30,789,720"),
        (3.4e7, "1,224"),
        (2.7777e7, "1,000"),
        (77.69, "0.002797"),
        (1e-4, "0.0000000036"),
    ],
)
def test_rates_have_no_exponent(
    clock: Clock, capsys: pytest.CaptureFixture[str], area_m2: float, rate: str
) -> None:
    events = ProgressEvents()
    events.started(units=1, missing=1)
    clock.now_s += 100.0
    events.unit(UnitResult(0, 0, "done", scene_px=1_000_000, area_m2=area_m2))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"1 of 1 unit  0.01 Mpx/s  {rate} km2/h"


def test_an_eta_of_hours(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    events = ProgressEvents()
    events.started(units=101, missing=101)
    clock.now_s += 61.0
    events.unit(UnitResult(0, 0, "done"))
    assert capsys.readouterr().err.splitlines()[-1].endswith("ETA 1:41:40")
