"""What fails while a run is at work leaves whole objects alone, and the same command completes it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from archive import (
    failures,
    files,
    make_model,
    objects,
    ok,
    predict,
    run,
    tell_changed,
    whole_masks,
    write_scene,
)
from s3_server import Fault, FaultProxy

import segpipe.pipelines.predict as driver
import segpipe.storage.local
from segpipe.errors import SceneError, StorageError
from segpipe.rasters.driver import Raster
from segpipe.rasters.reader import SceneReader


def test_a_scene_that_is_replaced_while_it_is_read_fails_and_is_done_by_the_next_start(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SceneReader.read

    def read(self: SceneReader, window: Any) -> Any:
        if self._raster.where.endswith("b.tif"):
            write_scene(scenes / "b.tif", 70, 90, seed=77)
            tell_changed(scenes / "b.tif")
        return real(self, window)

    with monkeypatch.context() as patch:
        patch.setattr(SceneReader, "read", read)
        done = predict(scenes, model, tmp_path / "run")
    assert done.code == 5
    assert {name: row["error_kind"] for name, row in failures(tmp_path / "run").items()} == {
        "b": "scene_changed"
    }
    done = ok(predict(scenes, model, tmp_path / "run", "--json"))
    assert (done.tree["summary"]["scenes"]["all"], done.tree["summary"]["scenes"]["ok"]) == (3, 3)
    with rasterio.open(scenes / "b.tif") as dataset:
        assert np.array_equal(whole_masks(tmp_path / "run")["b"], dataset.read().argmax(axis=0))


def test_a_scene_that_vanishes_after_planning_is_a_failed_row(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = driver.make_plan

    def make_plan(*args: Any) -> Any:
        totals = real(*args)
        (scenes / "c.tif").unlink()
        return totals

    monkeypatch.setattr(driver, "make_plan", make_plan)
    assert predict(scenes, model, tmp_path / "run").code == 5
    found = failures(tmp_path / "run")
    assert {name: row["error_kind"] for name, row in found.items()} == {"c": "not_found"}
    assert (found["c"]["height"], found["c"]["width"]) == (70, 90)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "read-only file system")]
)
def test_a_disk_that_fails_midway_ends_with_3_leaves_whole_objects_and_the_same_command_completes(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    cut = {"block_px": 40, "unit_px": 4000}
    ok(predict(scenes, model, tmp_path / "undisturbed", **cut))
    whole = objects(tmp_path / "undisturbed")
    space = [sum(map(len, files(tmp_path / "undisturbed").values())) // 2]
    real = segpipe.storage.local._write_all

    def write_all(descriptor: int, data: bytes) -> None:
        real(descriptor, data[: max(0, space[0])])
        space[0] -= len(data)
        if space[0] < 0:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(segpipe.storage.local, "_write_all", write_all)
        done = predict(scenes, model, tmp_path / "run", **cut)
    done.refused(3, f"{tmp_path}/run/masks/", words, "same command")
    found = objects(tmp_path / "run")
    assert 0 < len(found) < len(whole)
    assert all(whole[key] == data for key, data in found.items())
    assert not (tmp_path / "run/_SUCCESS").exists()
    assert not (tmp_path / "run/.tmp").exists()
    ok(predict(scenes, model, tmp_path / "run", **cut))
    assert objects(tmp_path / "run") == whole


def test_a_fault_of_storage_that_may_pass_commits_nothing_of_its_unit(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(predict(scenes, model, tmp_path / "undisturbed", unit_px=7000))
    real = SceneReader.read

    def read(self: SceneReader, window: Any) -> Any:
        if self._raster.where.endswith("b.tif"):
            raise segpipe.errors.StorageError("the connection was reset", "b.tif", "Try again.")
        return real(self, window)

    with monkeypatch.context() as patch:
        patch.setattr(SceneReader, "read", read)
        done = predict(scenes, model, tmp_path / "run", unit_px=7000)
    assert done.code == 3
    assert "not committed: b.tif: the connection was reset" in done.err
    assert "1 of 3 units missing" in done.err
    assert "same command" in done.err
    assert not (tmp_path / "run/_SUCCESS").exists()
    assert run("verify", tmp_path / "run").code == 3
    ok(predict(scenes, model, tmp_path / "run", unit_px=7000))
    assert objects(tmp_path / "run") == objects(tmp_path / "undisturbed")


def test_a_reader_that_broke_is_opened_anew_for_the_next_unit(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = {"block_px": 40, "unit_px": 4000}
    write_scene(tmp_path / "in/a.tif", 300, 300)
    real, broken = SceneReader.read, []

    def read(self: SceneReader, window: Any) -> Any:
        if window.row_off == window.col_off == 0:
            broken.append(self)
        if self in broken:
            raise StorageError("the connection was reset", "a.tif", "Try again.")
        return real(self, window)

    monkeypatch.setattr(SceneReader, "read", read)
    done = predict(tmp_path / "in", model, tmp_path / "run", **cut)
    assert done.code == 3
    assert re.search(r"1 of \d\d units missing", done.err), done.err


def test_a_local_file_that_cannot_be_read_now_is_no_damaged_scene(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GDAL says of both that it cannot decode."""
    with (scenes / "b.tif").open("r+b") as file:
        file.truncate((scenes / "b.tif").stat().st_size // 2)

    real = segpipe.storage.local._pread

    def pread(descriptor: int, start: int, length: int) -> bytes:
        if length > 64 and os.readlink(f"/proc/self/fd/{descriptor}").endswith("b.tif"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, start, length)

    with monkeypatch.context() as patch:
        patch.setattr(segpipe.storage.local, "_pread", pread)
        done = predict(scenes, model, tmp_path / "run", unit_px=7000)
    assert done.code == 3
    assert re.search(r"not committed: \S+/b.tif: .*input/output error", done.err), done.err
    assert "1 of 3 units missing" in done.err
    assert predict(scenes, model, tmp_path / "run", unit_px=7000).code == 5
    assert {name: row["error_kind"] for name, row in failures(tmp_path / "run").items()} == {"b": "decode"}


def test_a_file_that_fails_once_is_opened_anew(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(predict(scenes, model, tmp_path / "undisturbed"))
    real, broken = Raster.read, []

    def read(self: Raster, *args: Any) -> None:
        if self.where.endswith("b.tif") and (not broken or self in broken):
            broken.append(self)
            raise SceneError("decode", "Stale file handle", self.where)
        real(self, *args)

    monkeypatch.setattr(Raster, "read", read)
    ok(predict(scenes, model, tmp_path / "run"))
    assert len(broken) == 1
    assert objects(tmp_path / "run") == objects(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (MemoryError("no 2 GiB"), 3, "not committed: out of memory (no 2 GiB). Free memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 3, "out of memory"),
        (TypeError("of ours"), 1, "not committed: TypeError: of ours"),
    ],
)
def test_a_lack_of_memory_is_no_bug_and_no_failed_scene(
    tmp_path: Path,
    scenes: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    code: int,
    words: str,
) -> None:
    def read(self: SceneReader, window: Any) -> Any:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(SceneReader, "read", read)
        done = predict(scenes, model, tmp_path / "run")
    assert (done.code, objects(tmp_path / "run")) == (code, {})
    assert words in done.err
    assert "1 of 1 unit missing" in done.err
    ok(predict(scenes, model, tmp_path / "run"))


def test_a_model_that_is_replaced_under_a_running_job_is_refused(
    tmp_path: Path, scenes: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = driver.make_plan

    def make_plan(*args: Any) -> Any:
        make_model(model, "pixel", classes=2)
        return real(*args)

    monkeypatch.setattr(driver, "make_plan", make_plan)
    done = predict(scenes, model, tmp_path / "run")
    done.refused(2, str(model), "no longer")
    assert objects(tmp_path / "run") == {}


@pytest.mark.s3
def test_s3_that_falters_is_asked_again_and_s3_that_refuses_midway_ends_with_3(
    tmp_path: Path, scenes: Path, model: Path, s3_prefix: str, s3_proxy: FaultProxy
) -> None:
    cut = {"block_px": 40, "unit_px": 4000}
    ok(predict(scenes, model, tmp_path / "undisturbed", **cut))
    whole = objects(tmp_path / "undisturbed")
    for method, path in (("PUT", "/masks/"), ("PUT", "/plan/"), ("HEAD", "/masks/"), ("GET", "prefix=")):
        s3_proxy.faults += [Fault(method, path, "503"), Fault(method, path, "reset", after=1)]
    s3_proxy.faults.append(Fault("PUT", "/masks/", "lost", after=3))
    ok(predict(scenes, model, f"{s3_prefix}/falters", **cut))
    assert s3_proxy.count("PUT", "503") == 2
    assert s3_proxy.count("PUT", "lost") == 1
    assert objects(f"{s3_prefix}/falters") == whole

    s3_proxy.faults = [Fault("PUT", "/masks/", "403", code="AccessDenied", times=10_000, after=4)]
    done = predict(scenes, model, f"{s3_prefix}/refuses", **cut)
    done.refused(3, f"{s3_prefix}/refuses/masks/", "same command")
    s3_proxy.faults = []
    found = objects(f"{s3_prefix}/refuses")
    assert 0 < len(found) < len(whole)
    ok(predict(scenes, model, f"{s3_prefix}/refuses", **cut))
    assert objects(f"{s3_prefix}/refuses") == whole
