"""A worker that dies costs nothing but time, unless it is a unit that kills it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
from commands import REPOSITORY, Archive, mask_objects, run, write_model

pytestmark = pytest.mark.ray


def own_lines(text: str) -> list[str]:
    """The lines of stderr that segpipe itself prints."""
    starts = ("planned ", "warning: ", "error: ", "stopped; ", "reports: ", "not committed: ")
    starts += ("failed: ", "what to do about ", "all failures: ")
    parts = (
        " to compute",
        " units  ",
        " unit  ",
        " missing; the same",
        " failed, more than",
        " units are there",
    )
    return [line for line in text.splitlines() if line.startswith(starts) or any(p in line for p in parts)]


def assert_quiet(stderr: str) -> None:
    assert stderr.splitlines() == own_lines(stderr)


def test_a_worker_that_dies_once_is_replaced_and_every_unit_is_done_once(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path
) -> None:
    env = {"FAULT_SCENE": "big", "FAULT_MARKER": str(folder / "marker")}
    code, command = run(archive.predict(folder / "run", "--json"), folder, env=env)
    assert code == 0, command.stderr
    assert (folder / "marker").exists()
    assert mask_objects(folder / "run") == undisturbed
    assert json.loads(command.stdout)["missing"] == 0
    assert_quiet(command.stderr)


def test_a_worker_whose_gpu_failed_is_replaced_and_every_unit_is_done(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path
) -> None:
    env = {"FAULT_SCENE": "big", "FAULT_KIND": "gpu", "FAULT_MARKER": str(folder / "marker")}
    code, command = run(archive.predict(folder / "run"), folder, env=env)
    assert code == 0, command.stderr
    assert (folder / "marker").exists()
    assert mask_objects(folder / "run") == undisturbed
    assert_quiet(command.stderr)


def test_a_unit_that_kills_its_worker_becomes_a_failed_row_and_the_rest_is_done(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path
) -> None:
    code, command = run(archive.predict(folder / "run"), folder, env={"FAULT_SCENE": "small-b"})
    assert code == 5, command.stderr
    assert_quiet(command.stderr)
    objects = mask_objects(folder / "run")
    assert objects.keys() == undisturbed.keys()
    changed = [key for key in objects if objects[key] != undisturbed[key]]
    assert len(changed) == 1
    rows = pq.read_table(folder / "run" / changed[0]).to_pylist()
    assert {(row["status"], row["error_kind"]) for row in rows} == {("failed", "kills_worker")}
    assert "small-b" in {row["scene_id"] for row in rows}
    code, _ = run(archive.predict(folder / "run", "--executor", "local"), folder)
    assert code == 5, "a failed unit is done: running again changes nothing"
    assert mask_objects(folder / "run") == objects


def test_workers_that_die_while_they_start_end_the_run_with_one_line(archive: Archive, folder: Path) -> None:
    code, command = run(archive.predict(folder / "run"), folder, env={"FAULT_START": "kill"})
    assert code == 3
    assert_quiet(command.stderr)
    assert "the same command goes on" in command.stderr.splitlines()[-1]
    assert mask_objects(folder / "run") == {}


def test_an_error_in_a_workers_start_is_the_commands_error(archive: Archive, folder: Path) -> None:
    model = write_model(folder / "model.safetensors")
    weights = safetensors.torch.load_file(model)
    with safetensors.safe_open(model, "pt") as file:
        metadata = file.metadata()
    weights.pop(next(iter(weights)))
    safetensors.torch.save_file(weights, model, metadata)
    code, command = run(Archive(archive.scenes, model, archive.args).predict(folder / "run"), folder)
    assert code == 2
    assert_quiet(command.stderr)
    assert (
        f"error: {model}: the weights do not fit the model card: missing" in command.stderr.splitlines()[-1]
    )
    assert str(REPOSITORY / "segpipe") not in command.stderr
    assert not list((folder / "run").rglob("*.*")), "exit 2: nothing stays written"
    code, _ = run(archive.predict(folder / "run"), folder)
    assert code == 0, "the corrected command may write there"


@pytest.mark.parametrize("executor", ["ray", "local"])
def test_a_network_that_cannot_be_made_ready_ends_the_run_at_its_first_unit(
    archive: Archive, folder: Path, executor: str
) -> None:
    arguments = archive.predict(folder / "run", "--executor", executor, "--set", "inference.compile=true")
    env = {"CXX": str(folder / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    code, command = run(arguments, folder, env=env)
    assert code == 2, command.stderr
    assert command.stderr.splitlines()[-1].startswith("error: inference.compile: torch.compile failed: ")
    assert "Traceback" not in command.stderr
    assert not list((folder / "run").rglob("*.*")), "exit 2: nothing stays written"
