"""Ctrl-C and SIGTERM stop a run within seconds, and the same command goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from archive import Done, local, make_model, objects, ok, predict, run, start, write_scene

CUT = {"block_px": 64, "unit_px": 5000}

# Each unit takes a while, so that there is a middle to stop in.
SLOW = """
import time, segpipe.masks.write as w
real = w.encode_unit
def slow(*args):
    time.sleep(0.2)
    return real(*args)
w.encode_unit = slow
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    make_model(folder / "model.safetensors")
    write_scene(folder / "in/big.tif", 400, 420)
    ok(predict(folder / "in", folder / "model.safetensors", folder / "undisturbed", **CUT))
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_soon_and_cleanly_and_the_same_command_completes_it(
    archive: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    model, out = archive / "model.safetensors", tmp_path / "run"
    command = ("predict", archive / "in", "--model", model, "--output", out, *local(**CUT))
    process = start(*command, code=SLOW)
    try:
        end = time.monotonic() + 180
        while not list(out.glob("masks/*/*.parquet")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert "the same command goes on where this one stopped" in stderr
    assert stdout == ""
    whole = objects(archive / "undisturbed")
    found = objects(out)
    assert 0 < len(found) < len(whole)
    assert all(whole[key] == data for key, data in found.items())
    assert not (out / "_SUCCESS").exists()
    assert not (out / ".tmp").exists()
    ok(run(*command))
    assert objects(out) == whole


def test_a_signal_while_it_starts_leaves_no_traceback(archive: Path, tmp_path: Path) -> None:
    arguments = ("--model", archive / "model.safetensors", "--output", tmp_path / "run", *local(**CUT))
    process = start("predict", archive / "in", *arguments)
    try:
        end = time.monotonic() + 180
        while not (tmp_path / "run/run.json").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr


def end_of(scenes: Path, archive: Path, output: Path, code: str) -> Done:
    """How a prediction ends that runs ``code`` first."""
    model = archive / "model.safetensors"
    process = start("predict", scenes, "--model", model, "--output", output, *local(**CUT), code=code)
    out, err = process.communicate(timeout=180)
    return Done(process.returncode, out, err)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_heard_where_the_driver_itself_writes_a_unit(
    archive: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "in").mkdir()
    for index in range(30):
        (tmp_path / f"in/{index:02d}.tif").write_bytes(b"II*\0no header")
    hooked = f"""
import os
from segpipe.storage.local import LocalStorage as S
real = S.put_if_absent
def put(self, key, data):
    if key.startswith("masks/"):
        os.kill(os.getpid(), {int(number)})
    return real(self, key, data)
S.put_if_absent = put
"""
    ended = end_of(tmp_path / "in", archive, tmp_path / "run", hooked)
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("becomes", ["nothing", "another error"])
def test_a_signal_that_a_library_swallows_is_raised_again(
    archive: Path, tmp_path: Path, number: signal.Signals, code: int, becomes: str
) -> None:
    hooked = f"""
import os
import segpipe.pipelines.predict as p
real = p._complete
def complete(*arguments):
    try:
        os.kill(os.getpid(), {int(number)})
    except BaseException as error:
        if {becomes == "another error"}:
            raise RuntimeError("Error calling __set_name__") from error
    return real(*arguments)
p._complete = complete
"""
    ended = end_of(archive / "in", archive, tmp_path / "run", hooked)
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert "a bug" not in ended.err
    assert not (tmp_path / "run/_SUCCESS").exists()
