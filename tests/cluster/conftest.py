"""What the Ray tests share: a small archive, an undisturbed run of it, a check for what is left over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Archive, mask_objects, run, tagged, write_archive
from heads import Head, started_head

NUM_UNITS = 12


@pytest.fixture(scope="session", autouse=True)
def nothing_left_over() -> Iterator[None]:
    """After the last test no process lives that came of any command, Ray's own included."""
    yield
    end = time.monotonic() + 60
    while (left := tagged()) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"left over: {left}"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose ``home`` is the commands' home folder; they must leave nothing there."""
    yield tmp_path
    assert [str(path) for path in (tmp_path / "home").rglob("*")] == []


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Twelve units: nine of the scene ``big`` (a 3 x 3 grid of blocks) and one a small scene."""
    sides_px = {"big": 380, "small-a": 128, "small-b": 120, "small-c": 100}
    return write_archive(tmp_path_factory.mktemp("archive"), sides_px)


@pytest.fixture(scope="session")
def undisturbed_run(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one worker of one thread, in one process without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, command = run(archive.predict(folder / "run", "--executor", "local"), folder)
    assert code == 0, command.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run: Path) -> dict[str, bytes]:
    """The mask objects of the undisturbed run by key."""
    objects = mask_objects(undisturbed_run)
    assert len(objects) == NUM_UNITS
    return objects


@pytest.fixture
def head(folder: Path) -> Iterator[Head]:
    with started_head(folder) as head:
        yield head
