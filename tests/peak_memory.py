"""Peak memory of a function, measured in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STATUS = Path("/proc/self/status")


def peak_growth_bytes(prepare: Callable[[], Any], run: Callable[[Any], object]) -> int:
    """How far ``run(prepare())`` lifts the resident memory above what ``prepare`` left.

    Both are functions of a module. A fresh process has no threads and no free heap of other tests.
    """
    if not STATUS.exists():
        pytest.skip("peak memory is read from /proc/self/status, which only Linux has")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (prepare, run))


def _measure(prepare: Callable[[], Any], run: Callable[[Any], object]) -> int:
    given = prepare()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before = _status_bytes("VmRSS")
    run(given)
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
