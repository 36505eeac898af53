"""The same command on a grown archive while the first one runs: neither speaks for the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from archive import local, make_model, objects, ok, predict, run, start, write_scene

from segpipe.pipelines import predict as driver
from segpipe.pipelines import report
from segpipe.storage.local import LocalStorage

CUT = {"block_px": 64, "unit_px": 8000}


class Archive:
    """Three scenes, and two more to come."""

    def __init__(self, folder: Path) -> None:
        self.scenes, self.run = folder / "in", folder / "run"
        self.model = make_model(folder / "model.safetensors", "pixel")
        self.add("abc")

    def add(self, names: str) -> None:
        for name in names:
            write_scene(self.scenes / f"{name}.tif", 70, 90, seed=ord(name))

    def predict(self) -> Any:
        return predict(self.scenes, self.model, self.run, "--json", **CUT)

    def plan_more(self) -> None:
        """What another command does first: its part is there, none of its units."""
        self.add("de")
        words = ("predict", self.scenes, "--model", self.model, "--output", self.run, *local(**CUT))
        code = (
            "import os, segpipe.pipelines.predict as p\n"
            "p._complete = lambda *a: os._exit(0)  # killed once it has planned"
        )
        assert start(*words, code=code).wait() == 0
        assert len(list(self.run.glob("plan/*"))) == 2

    @property
    def success(self) -> dict[str, int] | None:
        path = self.run / "_SUCCESS"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "reports/summary.json").read_text())


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def once(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int, action: Any) -> None:
    """Run ``action`` before the call of that number of ``module.name``, counted from 1."""
    real, calls = getattr(module, name), []

    def hooked(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            action()
        return real(*arguments)

    monkeypatch.setattr(module, name, hooked)


def test_of_two_first_commands_at_once_the_one_of_another_recipe_is_refused(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> None:
        ok(predict(archive.scenes, archive.model, archive.run, blend="linear", **CUT))

    once(monkeypatch, LocalStorage, "put_if_absent", 1, begin)  # the first object of a run is run.json
    archive.predict().refused(2, "another recipe", "inference.blend")
    assert run("verify", archive.run).code == 0


def test_units_that_another_command_planned_meanwhile_are_not_run_as_if_they_had_ended_a_worker(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, driver, "missing_units", 2, archive.plan_more)
    done = archive.predict()
    assert done.code == 3
    assert "ended with a worker" not in done.err
    assert done.tree["missing"] > 0
    assert {key.split("/")[1] for key in objects(archive.run)} == {"part-00000"}
    assert archive.success is None
    ok(archive.predict())
    assert run("verify", archive.run).code == 0


def test_success_speaks_of_all_that_is_planned_when_it_is_written(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, report, "list_parts", 1, archive.plan_more)
    done = archive.predict()
    assert (done.code, done.tree["missing"] > 0) == (3, True)
    assert archive.success is None
    ok(archive.predict())
    assert archive.success is not None
    assert archive.success["parts"] == 2
    assert run("verify", archive.run).code == 0


def test_reports_are_made_anew_where_another_command_ended_meanwhile(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow() -> None:
        archive.add("de")
        ok(archive.predict())

    once(monkeypatch, report, "_put_reports", 1, grow)
    done = ok(archive.predict())
    assert done.tree["missing"] == 0
    assert archive.summary["scenes"]["all"] == 5
    assert archive.success is not None
    assert archive.success["parts"] == 2
    assert run("verify", archive.run).code == 0


def test_an_unfinished_report_does_not_stay_over_a_finished_one(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(archive.predict())
    lost = next(archive.run.glob("masks/part-00000/*"))
    lost.unlink()
    (archive.run / "_SUCCESS").unlink()
    once(monkeypatch, report, "_put_reports", 1, lambda: ok(archive.predict()))
    done = ok(run("report", archive.run, "--json"))
    assert done.tree["missing"] == 0
    assert archive.success is not None
    assert archive.summary["scenes"]["partial"] == 0


def test_a_driver_with_an_older_listing_leaves_the_newer_masks(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(archive.predict())
    write_scene(archive.scenes / "b.tif", 70, 90, seed=7)

    def changes_again() -> None:
        write_scene(archive.scenes / "b.tif", 70, 91, seed=8)
        ok(archive.predict())

    once(monkeypatch, driver, "make_plan", 1, changes_again)
    done = ok(archive.predict())
    assert "1 scene changed since the listing" in done.err
    scenes = archive.summary["scenes"]
    assert (scenes["all"], scenes["failed"]) == (3, 0)
    assert len(list(archive.run.glob("plan/*"))) == 2
    assert run("verify", archive.run).code == 0
