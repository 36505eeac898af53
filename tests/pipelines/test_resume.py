"""What is lost, or was never done, is made again with the same bytes; a killed run leaves nothing behind."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from archive import files, local, make_model, objects, ok, predict, run, start, write_scene

import segpipe.pipelines.local
import segpipe.pipelines.plan
from segpipe.storage import open_storage

CUT = {"block_px": 64, "unit_px": 5000}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of two dozen units, and the model."""
    folder = tmp_path_factory.mktemp("archive")
    make_model(folder / "model.safetensors")
    for number in range(3):
        write_scene(folder / f"in/{number}.tif", 230, 180 + 40 * number, seed=number, nodata=0)
    return folder


@pytest.fixture(scope="module")
def undisturbed(archive: Path) -> Path:
    out = archive / "undisturbed"
    ok(predict(archive / "in", archive / "model.safetensors", out, **CUT))
    assert len(objects(out)) > 20
    return out


def command(archive: Path, out: Any) -> list[Any]:
    return [
        "predict", archive / "in", "--model", archive / "model.safetensors", "--output", out, *local(**CUT),
    ]  # fmt: skip


def test_units_that_are_gone_are_made_again_byte_for_byte(archive: Path, undisturbed: Path) -> None:
    whole = files(undisturbed)
    lost = random.Random(2).sample(sorted(objects(undisturbed)), 9)
    for key in (*lost, "_SUCCESS", "reports/summary.json", "index/part-00000.parquet"):
        (undisturbed / key).unlink()
    done = ok(run(*command(archive, undisturbed), "--json")).tree
    assert done["computed"] == len(lost)
    assert files(undisturbed) == whole


def kill_at(process: subprocess.Popen[str], delay_s: float) -> None:
    try:
        process.wait(delay_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=180)


def wait_for_objects(process: subprocess.Popen[str], out: str, more_than: int) -> None:
    """Wait until the run has new mask objects, so that a kill falls in the middle of the work."""
    storage = open_storage(out)
    end = time.monotonic() + 180
    while sum(map(len, storage.list("masks/"))) <= more_than and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


# Each unit takes long enough that a kill falls between units of one start.
SLOW = """
import time, segpipe.masks.write as w
real = w.encode_unit
def slow(*args):
    time.sleep(0.05)
    return real(*args)
w.encode_unit = slow
"""


def check_killed(archive: Path, out: str, undisturbed: Path, moments: tuple[float, ...]) -> None:
    begun = 0
    for delay_s in moments:
        process = start(*command(archive, out), code=SLOW)
        wait_for_objects(process, out, begun)
        kill_at(process, delay_s)
        assert process.returncode == -signal.SIGKILL, "the kill came too late to prove anything"
        found = len(objects(out))
        assert found > begun
        begun = found
    assert begun < len(objects(undisturbed))
    assert not open_storage(out).stat("_SUCCESS")
    ok(run(*command(archive, out)))
    assert objects(out) == objects(undisturbed)


def test_a_run_killed_again_and_again_ends_byte_equal_without_strays(
    archive: Path, undisturbed: Path, tmp_path: Path
) -> None:
    delays = tuple(random.Random(8).uniform(0.0, 0.2) for _ in range(2))
    check_killed(archive, str(tmp_path / "run"), undisturbed, delays)
    assert files(tmp_path / "run").keys() == files(undisturbed).keys()


def test_a_run_killed_while_it_starts_goes_on(archive: Path, undisturbed: Path, tmp_path: Path) -> None:
    process = start(*command(archive, tmp_path / "run"))
    end = time.monotonic() + 180
    while not (tmp_path / "run/run.json").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    kill_at(process, 0)
    assert process.returncode == -signal.SIGKILL
    ok(run(*command(archive, tmp_path / "run")))
    assert files(tmp_path / "run").keys() == files(undisturbed).keys()
    assert objects(tmp_path / "run") == objects(undisturbed)


def test_a_plan_that_was_stopped_between_two_parts_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model.safetensors", "pixel")
    for number in range(8):
        write_scene(tmp_path / f"in/{number}.tif", 60, 70, seed=number)
    monkeypatch.setattr(segpipe.pipelines.plan, "PART_SCENES", 3)
    ok(predict(tmp_path / "in", model, tmp_path / "undisturbed", unit_px=9000))
    real = segpipe.pipelines.local.inspect_source

    def inspect_source(source: Any, *args: Any) -> Any:
        if source.scene_id == "4":
            raise KeyboardInterrupt
        return real(source, *args)

    with monkeypatch.context() as patch:
        patch.setattr(segpipe.pipelines.local, "inspect_source", inspect_source)
        assert predict(tmp_path / "in", model, tmp_path / "run", unit_px=9000).code == 130
    assert list(objects(tmp_path / "run", "")) == ["plan/part-00000.parquet", "run.json"]
    assert run("verify", tmp_path / "run").code == 3
    done = ok(predict(tmp_path / "in", model, tmp_path / "run", unit_px=9000))
    assert "3 scenes planned already, 5 new or changed" in done.err
    assert files(tmp_path / "run") == files(tmp_path / "undisturbed") | {
        "run.json": (tmp_path / "run/run.json").read_bytes()
    }
    assert len(objects(tmp_path / "run", "plan/")) == 3


@pytest.mark.s3
def test_a_run_on_s3_killed_in_the_middle_ends_byte_equal(
    archive: Path, undisturbed: Path, s3_prefix: str
) -> None:
    check_killed(archive, f"{s3_prefix}/run", undisturbed, (0.05,))
    assert objects(f"{s3_prefix}/run", "").keys() == files(undisturbed).keys()
