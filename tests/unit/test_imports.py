"""The settings that shorten a start are made in the command line's own process and nowhere else."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

import segpipe
from segpipe import imports

DATA = Path(segpipe.__file__).parent / "demo" / "data"
SCENE = DATA / "scenes" / "kampala_z19_309614_261632_chips21.tif"

AS_COMMAND = """
import gc, sys
from segpipe.cli.main import main
try:
    main()
finally:
    print("pandas" in sys.modules, gc.isenabled(), gc.get_threshold()[0], gc.get_freeze_count() > 10_000)
"""


def predict(code: str, run: Path) -> list[str]:
    flags = ["predict", str(SCENE), "--model", str(DATA / "model.safetensors"), "-o", str(run)]
    command = [sys.executable, "-c", code, *flags, "--executor", "local", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-4:]


def test_the_command_neither_imports_pandas_nor_collects_often(tmp_path: Path) -> None:
    assert predict(AS_COMMAND, tmp_path) == ["False", "True", "500000", "True"]


def test_a_process_that_calls_the_command_keeps_pandas_and_its_collector(tmp_path: Path) -> None:
    """A notebook, say: it wants data frames of the tables afterwards."""
    code = AS_COMMAND.replace("main()", "main(sys.argv[1:])", 1)
    assert predict(code, tmp_path) == ["True", "True", str(gc.get_threshold()[0]), "False"]


def test_collecting_is_left_out_of_imports_and_back_after_a_fault() -> None:
    assert gc.isenabled()
    with imports.no_collection():
        assert not gc.isenabled()
    with pytest.raises(ImportError), imports.no_collection():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with imports.no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_collecting_rarely_is_undone() -> None:
    usual = gc.get_threshold()
    imports.collect_as_usual()
    assert gc.get_threshold() == usual
    imports.collect_rarely()
    imports.collect_rarely()
    assert gc.get_threshold()[0] == 500_000
    imports.collect_as_usual()
    assert gc.get_threshold() == usual
