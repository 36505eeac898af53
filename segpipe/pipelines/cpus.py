"""How many CPUs this process may use: its affinity, and the quota of the container that it runs in."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Return the whole CPUs that this process may use, at least 1.

    A quota (``docker --cpus=2``, a limit of Kubernetes) leaves the affinity as it is: threads for all CPUs
    of the host would wait for one another, each with its memory.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([cpus, *_quotas()])))


def _quotas() -> Iterator[float]:
    """CPUs that the cgroups of this process allow, its own and those above it.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (version 1).
    """
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        # In a container the own path may be the host's, which is not there, and the root the container's.
        inside = PurePosixPath(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            if (quota := _quota(root / folder)) is not None:
                yield quota


def _quota(cgroup: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for name in names for word in (cgroup / name).read_text().split())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0 and period > 0:  # -1 = no limit
            return quota / period
    return None
