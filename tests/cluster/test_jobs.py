"""The scripts in ``jobs/`` on a Ray head that asks for a token."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import rasterio
from commands import Archive, Command, mask_objects, run, started
from heads import Head, status_of, submit, wait_for_jobs
from rasters import UTM33, noise, write_tiff
from runs import TINY, tiny_config, train_in_processes
from tiny import tiny_dataset

pytestmark = pytest.mark.ray


def test_jobs_predict_and_evaluate_on_a_cluster_that_refuses_whoever_has_no_token(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path, head: Head
) -> None:
    config = folder / "job.yaml"
    config.write_text(
        f"input: {{scenes: [{archive.scenes}]}}\n"
        f"model: {archive.model}\noutput: {folder / 'run'}\n"
        "inference: {margin_px: 8, block_px: 128, unit_px: 16500}\n"
        "cluster: {threads_per_worker: 1}\n"
    )
    wait_for_jobs(head)
    assert status_of(head, None) == 401
    assert status_of(head, "a-wrong-token") == 403
    entry = ["python", "-m", "jobs.predict", "--config", str(config)]
    code, stranger = submit(head, folder, entry, env={"RAY_AUTH_MODE": "token"})
    assert code != 0
    assert "token" in (stranger.stderr + stranger.stdout).lower()
    assert not (folder / "run").exists()
    code, job = submit(head, folder, entry)
    assert code == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout.lower()
    assert mask_objects(folder / "run") == undisturbed
    code, verify = run(["verify", str(folder / "run")], folder)
    assert code == 0, verify.stdout + verify.stderr
    check_evaluate_job(archive, folder, head)


def check_evaluate_job(archive: Archive, folder: Path, head: Head) -> None:
    """``jobs.evaluate`` of the masks of ``run`` says what the command says in a process without Ray."""
    (folder / "labels").mkdir()
    for seed, path in enumerate(sorted(archive.scenes.iterdir())):
        with rasterio.open(path) as scene:
            label = noise(1, scene.height, scene.width, seed=seed) % 3
        write_tiff(folder / "labels" / path.name, label, compress="deflate", **UTM33)
    config = folder / "evaluate.yaml"
    config.write_text(
        f"input: {{scenes: [{archive.scenes}], labels: '{folder}/labels/{{stem}}.tif'}}\n"
        f"output: {folder / 'scores'}\n"
        "cluster: {threads_per_worker: 1}\n"
    )
    arguments = ["--config", str(config), "--masks", str(folder / "run")]
    code, job = submit(head, folder, ["python", "-m", "jobs.evaluate", *arguments])
    assert code == 0, job.stdout + job.stderr
    plain = ["evaluate", *arguments, "--executor", "local", "--output", str(folder / "plain"), "--json"]
    code, command = run(plain, folder)
    assert code == 0, command.stdout + command.stderr
    expected = json.loads(command.stdout)["summary"]
    assert json.loads((folder / "scores/reports/summary.json").read_text()) == expected
    assert 0 < expected["scores"]["miou"] < 1


def test_relative_paths_start_at_the_commands_own_folder_on_a_cluster_too(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path, head: Head
) -> None:
    """The cluster's processes have another one."""
    here, address = archive.scenes.parent, ("--set", f"cluster.address={head.gcs}")
    (folder / "labels").mkdir()
    for path in archive.scenes.iterdir():
        with rasterio.open(path) as scene:
            write_tiff(
                folder / "labels" / path.name, np.zeros((1, scene.height, scene.width), np.uint8), **UTM33
            )
    scenes, model, out, labels = (
        os.path.relpath(path, here) for path in (archive.scenes, archive.model, folder, folder / "labels")
    )
    wait_for_jobs(head)
    predict = ["predict", scenes, "--model", model, "-o", f"{out}/run", *archive.args, *address]
    classes = json.dumps([{"name": "ground", "color": [0, 0, 0]}])
    prepare = ["prepare", "folder", scenes, "--labels", f"{labels}/{{stem}}.tif", "-o", f"{out}/data"]
    for words in (predict, [*prepare, "--set", f"classes={classes}", *address]):
        code, command = run(words, folder, env=head.env, cwd=here)
        assert code == 0, command.stdout + command.stderr
    assert mask_objects(folder / "run") == undisturbed
    assert [path.name for path in (folder / "data/shards").glob("*.parquet")] == ["part-00000.parquet"]


def test_a_job_trains_with_two_workers_what_two_processes_train(folder: Path, head: Head) -> None:
    data = tiny_dataset(folder / "data")
    entry = ["python", "-m", "jobs.train", *training(data, folder / "run")]
    wait_for_jobs(head)
    code, job = submit(head, folder, entry)
    assert code == 0, job.stdout + job.stderr
    train_in_processes(tiny_config(data, folder / "plain", checkpoints__every_steps="-"), 2)
    plain, trained = ((folder / name / "model.safetensors").read_bytes() for name in ("plain", "run"))
    assert trained == plain


def training(data: str, output: Path, **sets: str) -> list[str]:
    """The options of a tiny training by two workers; ``sets`` have "__" for dots."""
    values = TINY | {"cluster.workers": 2} | {name.replace("__", "."): value for name, value in sets.items()}
    words = [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return ["--data", data, "--output", str(output), *words]


def test_a_prediction_and_two_trainings_at_once_share_a_cluster_that_has_room_for_one(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path, head: Head
) -> None:
    data = tiny_dataset(folder / "data")
    trainings = [
        ["train", *training(data, folder / name, cluster__address=head.gcs)] for name in ("one", "two")
    ]
    prediction = archive.predict(folder / "run", "--set", f"cluster.address={head.gcs}")
    wait_for_jobs(head)
    with ExitStack() as stack:
        commands = [
            stack.enter_context(started(words, folder, env=head.env)) for words in (*trainings, prediction)
        ]
        codes = [command.wait() for command in commands]
    assert codes == [0, 0, 0], "\n".join(command.stderr for command in commands)
    assert mask_objects(folder / "run") == undisturbed
    one, two = ((folder / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


HOLDER = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=2)
class Holder:
    def ready(self):
        return "ready"
holder = Holder.remote()
print(ray.get(holder.ready.remote()), flush=True)
time.sleep(600)
"""
"""Holds all CPUs of the cluster."""


def wait_for(command: Command, stream: str, text: str, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while text not in command.read_now(stream):
        assert command.process.poll() is None, command.read_now("stderr")
        assert time.monotonic() < end, command.read_now("stderr")
        time.sleep(0.2)


def test_a_run_on_a_cluster_without_room_says_so_and_begins_when_there_is(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path, head: Head
) -> None:
    wait_for_jobs(head)
    holder_program = (sys.executable, "-c", HOLDER)
    with started([head.gcs], folder, env=head.env, program=holder_program) as holder:
        wait_for(holder, "stdout", "ready")
        arguments = archive.predict(folder / "run", "--set", f"cluster.address={head.gcs}")
        with started(arguments, folder, env=head.env) as command:
            wait_for(command, "stderr", "others use the cluster: ")
            holder.kill_all()
            assert command.wait() == 0, command.stderr
    lines = command.stderr.splitlines()
    assert lines[2] == "warning: others use the cluster: 1 worker must wait for 1 CPU (0 free now)"
    assert all(
        line.startswith(("planned ", "12 units ", "warning: others ")) or "Mpx/s" in line for line in lines
    )
    assert mask_objects(folder / "run") == undisturbed
