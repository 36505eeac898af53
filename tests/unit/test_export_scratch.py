"""The scratch space of an export: asked for before it is used, shared out, given back."""

from __future__ import annotations

import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from masks_run import MadeRun, MadeScene, build_run

from segpipe.errors import StorageFull
from segpipe.pipelines import export as export_module
from segpipe.pipelines.export import export_run
from segpipe.rasters import cog


def export(run: MadeRun, output: Path, **options: Any) -> Any:
    return export_run(run.storage.root, str(output), **options)


def test_too_little_scratch_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("a")]])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(StorageFull, match=r"bytes of scratch space are needed, 1000 are free.*TMPDIR"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scratch_space_is_shared_out_among_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("a", 150, 190), MadeScene("b", 150, 190)]])
    usage = namedtuple("usage", "total used free")
    need = cog.scratch_bytes(150 * 190, 10**9)
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: usage(10**9, 0, need + 1))
    refused = threading.Event()
    write, full = export_module.write_cog, export_module.full

    def write_after_the_other_is_refused(*args: Any) -> Path:
        assert refused.wait(timeout=30)
        return write(*args)

    def note(*args: Any) -> StorageFull:
        refused.set()
        return full(*args)

    monkeypatch.setattr(export_module, "write_cog", write_after_the_other_is_refused)
    monkeypatch.setattr(export_module, "full", note)
    with pytest.raises(StorageFull):
        export(run, tmp_path / "out", workers=2)


def test_scratch_space_is_given_back_after_each_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(str(tmp_path / "run"), [[MadeScene("a", 150, 190), MadeScene("b", 150, 190)]])
    usage = namedtuple("usage", "total used free")
    need = cog.scratch_bytes(150 * 190, 10**9)
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: usage(10**9, 0, need + 1))
    assert export(run, tmp_path / "out", workers=1).exported == 2


def test_the_scratch_folder_is_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    run = build_run(str(tmp_path / "run"), [[MadeScene("a", 700, 600), MadeScene("b", failed={0: "decode"})]])
    export(run, tmp_path / "out")
    assert list(scratch.iterdir()) == []
