"""Exports of two runs into one folder: the second says so, whenever it meets the first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rasterio
from masks_run import MadeRun, MadeScene, build_run, make_info

from segpipe.pipelines import export as export_module
from segpipe.pipelines.export import export_run
from segpipe.storage.local import LocalStorage

PARTS = [[MadeScene("a", 100, 130)]]


def make(folder: Path, number: int) -> MadeRun:
    """A run over scene ``a``; each has names of its own for the classes."""
    info = make_info(str(number) * 64)
    names = [item.model_copy(update={"name": f"{item.name}{number}"}) for item in info.card.classes]
    card = info.card.model_copy(update={"classes": tuple(names)})
    return build_run(
        str(folder / f"run{number}"), [[MadeScene("a", 100, 130)]], info=replace(info, card=card)
    )


def export(run: MadeRun, output: Path) -> Any:
    return export_run(run.storage.root, str(output))


def meanwhile(monkeypatch: pytest.MonkeyPatch, run: MadeRun, output: Path) -> None:
    """Let ``run`` be exported whole before the next export writes its GeoTIFF."""
    real, ended = export_module.write_cog, []

    def write(*arguments: Any) -> Path:
        if not ended:
            ended.append(run)
            assert export(run, output).exported == 1
        return real(*arguments)

    monkeypatch.setattr(export_module, "write_cog", write)


def names_of(output: Path) -> tuple[str, str]:
    """The first class by the GeoTIFF's tags and by the file beside it."""
    with rasterio.open(output / "a.tif") as file:
        inside = file.tags(1)["CLASS_0"]
    beside = (output / "a.tif.aux.xml").read_text().split("<Category>")[1].split("<")[0]
    return inside, beside


def test_the_slower_of_two_exports_at_once_finds_a_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, output = make(tmp_path, 1), make(tmp_path, 2), tmp_path / "out"
    meanwhile(monkeypatch, second, output)
    result = export(first, output)
    assert (result.exported, result.already_there, result.conflict.count) == (0, 0, 1)
    assert result.exit_code == 4
    assert names_of(output) == ("background2", "background2")


def test_the_slower_of_two_exports_of_one_run_finds_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, output = make(tmp_path, 1), tmp_path / "out"
    meanwhile(monkeypatch, made, output)
    result = export(made, output)
    assert (result.exported, result.already_there, result.exit_code) == (0, 1, 0)


def test_names_that_a_stopped_export_of_another_run_left_are_a_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, output = make(tmp_path, 1), make(tmp_path, 2), tmp_path / "out"

    def stopped(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put_file_if_absent", stopped)
        with pytest.raises(KeyboardInterrupt):
            export(first, output)
    assert sorted(path.name for path in output.iterdir()) == ["a.tif.aux.xml"]
    result = export(second, output)
    assert (result.exported, result.conflict.count, result.exit_code) == (0, 1, 4)
    assert export(first, output).exported == 1
    assert names_of(output) == ("background1", "background1")
