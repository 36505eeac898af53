"""Results that cannot be printed: one line, and the run stays whole."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive import local, make_model, predict, write_label, write_scene

from segpipe.cli.main import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model.safetensors", "pixel")


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    for number, name in enumerate("ab"):
        write_scene(tmp_path / f"in/{name}.tif", 110, 150, seed=number)
    return tmp_path / "in"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full device of Linux")
@pytest.mark.parametrize("command", [["--version"], ["config", "schema"]], ids=["short", "long"])
def test_a_full_disk_under_stdout_is_one_line_and_exit_3(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "segpipe.cli.main", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=180,
        )
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: stdout: the results cannot be printed (No space left on device). ")
    assert line.endswith("run the same command again: what is done stays.")


def test_a_short_output_that_nobody_reads_ends_with_141() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe:
        command = [sys.executable, "-m", "segpipe.cli.main", "--version"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (141, "")


class Refusing(io.StringIO):
    """A stdout that takes nothing."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["table", "json"])
@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOSPC, "disk full"), 3), (BrokenPipeError(errno.EPIPE, "no"), 141)]
)
def test_a_run_whose_results_cannot_be_printed_is_whole(
    tmp_path: Path,
    scenes: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    form: tuple[str, ...],
    error: OSError,
    code: int,
) -> None:
    for name in "ab":
        write_label(tmp_path / f"labels/{name}.tif", np.zeros((110, 150), np.uint8))
    labels = ("--labels", f"{tmp_path}/labels/{{stem}}.tif", *form)
    words = ("evaluate", scenes, "--model", model, "--output", tmp_path / "run", *labels, *local())
    with contextlib.redirect_stdout(Refusing(error)), pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Trace" in line]
    assert end.value.code == code
    assert len(said) == (code == 3)
    assert all("stdout: the results cannot be printed (disk full)" in line for line in said)
    assert (tmp_path / "run/_SUCCESS").exists()


def test_a_fault_of_another_file_is_not_told_as_one_of_stdout(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("segpipe.cli.jobs.run_job", fail)
    done = predict(scenes, model, tmp_path / "run")
    assert done.code == 1
    assert "a bug in segpipe: OSError" in done.err
