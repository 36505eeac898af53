"""CPUs that a container's quota allows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from segpipe.pipelines import cpus


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cpus, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpus, "_OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return tmp_path / "cgroup"


def write(cgroups: Path, own: str, **quotas: str) -> None:
    (cgroups.parent / "own").write_text(own)
    for name, text in quotas.items():
        path = cgroups / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_cgroups_and_without_a_quota_the_affinity_counts(cgroups: Path) -> None:
    assert cpus.usable_cpus() == 16
    write(cgroups, "0::/\n", cpu_max="max 100000\n")
    assert cpus.usable_cpus() == 16


def test_a_quota_is_rounded_up_to_whole_cpus(cgroups: Path) -> None:
    write(cgroups, "0::/\n", cpu_max="250000 100000\n")
    assert cpus.usable_cpus() == 3
    write(cgroups, "0::/\n", cpu_max="10000 100000\n")
    assert cpus.usable_cpus() == 1


def test_the_smallest_quota_of_the_groups_above_counts(cgroups: Path) -> None:
    write(cgroups, "0::/slice/pod\n", slice__cpu_max="400000 100000\n", slice__pod__cpu_max="800000 100000\n")
    assert cpus.usable_cpus() == 4


def test_a_containers_root_counts_where_the_own_path_is_the_hosts(cgroups: Path) -> None:
    write(cgroups, "0::/kubepods/pod1\n", cpu_max="200000 100000\n")
    assert cpus.usable_cpus() == 2


def test_version_1_has_two_files(cgroups: Path) -> None:
    own = "5:memory:/x\n4:cpu,cpuacct:/docker/a\n"
    write(cgroups, own, cpu__cpu_cfs_quota_us="300000\n", cpu__cpu_cfs_period_us="100000\n")
    assert cpus.usable_cpus() == 3
    write(cgroups, own, cpu__cpu_cfs_quota_us="-1\n")
    assert cpus.usable_cpus() == 16
