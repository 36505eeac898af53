"""Training on Ray: after kills and stops the same command ends with the same model; faults end it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import REPOSITORY, Command, interrupt, run, started, tagged
from runs import TINY, tiny_config, train_in_processes
from tiny import tiny_dataset

from segpipe.storage import open_storage
from segpipe.training.checkpoint import list_checkpoints
from segpipe.training.history import read_order, read_steps

pytestmark = pytest.mark.ray

STEPS = 400
SETS = {"train__steps": STEPS, "checkpoints__every_steps": 10, "validation__every_steps": 200}
GOES_ON = "stopped; the same command goes on where this one stopped"
BUG = """
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "segpipe.training.steps":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def execute_and_patch(module):
            execute(module)
            run = module.Stepper.run
            def run_and_fail(self, batch):
                if batch.step == 3 and self._comm.rank == 1:
                    raise RuntimeError("shapes that do not fit")
                return run(self, batch)
            module.Stepper.run = run_and_fail
        spec.loader.exec_module = execute_and_patch
        return spec

sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize module that puts a bug into the second worker's fourth step."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_dataset(tmp_path_factory.mktemp("data"), samples=28))


def arguments(data: Path | str, output: Path | str, *more: str, **sets: object) -> list[str]:
    """`segpipe train` of the tiny training by two workers; ``sets`` have "__" for dots."""
    values = {**TINY, "cluster.workers": 2} | {name.replace("__", "."): value for name, value in sets.items()}
    pairs = [part for name, value in values.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return ["train", "--data", str(data), "--output", str(output), *pairs, *more]


def newest(output: Path | str) -> int:
    steps = list_checkpoints(open_storage(str(output)))
    return steps[-1] if steps else 0


def wait_beyond(output: Path | str, step: int, command: Command, timeout_s: float = 240) -> int:
    """Wait for a checkpoint after ``step``; the newest one's step."""
    end = time.monotonic() + timeout_s
    while (found := newest(output)) <= step:
        if time.monotonic() > end or command.process.poll() is not None:
            raise TimeoutError(f"no checkpoint after step {step}: {found}")
        time.sleep(0.02)
    return found


def assert_all_gone(command: Command) -> None:
    end = time.monotonic() + 60
    while (left := tagged(command.tag)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def open_ports(pid: int) -> int:
    """TCP ports on which a process listens on all interfaces."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            links.append(os.readlink(link))
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    everywhere = [row[9] for row in rows if row[3] == "0A" and not row[1].partition(":")[0].strip("0")]
    return sum(f"socket:[{inode}]" in links for inode in everywhere)


@dataclass
class Disturbed:
    """What was seen of a training that was disturbed four times."""

    output: Path
    folder: Path
    temporary: Path
    ports: dict[str, set[int]]
    """Ports open to all interfaces by a process' name, while two workers trained."""
    restarted_from: int
    """Step of the newest checkpoint when a worker was killed."""
    killed_at: list[int]
    """Newest checkpoint after each start that was ended."""
    signalled: list[Command]
    last: Command
    last_code: int


@pytest.fixture(scope="module")
def disturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """One training: a worker killed, then all processes, then Ctrl-C, then SIGTERM, then to its end.

    The last command names its folders by relative paths, and a range of workers.
    """
    folder = tmp_path_factory.mktemp("disturbed")
    output, temporary = folder / "run", folder / "tmp"
    temporary.mkdir()
    # Ray's own folder of sockets and logs stays where it is: a socket's path has at most 107 bytes.
    env = {"TMPDIR": str(temporary), "RAY_TMPDIR": "/tmp"}
    same = arguments(data, output, "--json", **SETS)
    killed_at, signalled = [], []
    with started(same, folder, env=env) as command:
        restarted_from = wait_beyond(output, 0, command)
        pids = tagged(command.tag)
        workers = [pid for pid, name in pids.items() if name.startswith("ray::RayTrainWo")]
        assert len(workers) == 2
        boards = [pid for pid, name in pids.items() if name.startswith("ray::Board")]
        ports = {"worker": set(map(open_ports, workers)), "board": set(map(open_ports, boards))}
        os.kill(workers[1], signal.SIGKILL)
        time.sleep(0.5)
        wait_beyond(output, newest(output), command)
        command.kill_all()
        killed_at.append(newest(output))
    shutil.rmtree(temporary)  # what SIGKILL leaves there nobody can delete
    temporary.mkdir()
    for number in (signal.SIGINT, signal.SIGTERM):
        with started(same, folder, env=env) as command:
            wait_beyond(output, killed_at[-1], command)
            interrupt(command, number)
            assert_all_gone(command)
            killed_at.append(newest(output))
            signalled.append(command)
    near, target = (os.path.relpath(path, REPOSITORY) for path in (data, output))
    code, last = run(arguments(near, target, "--json", **SETS, cluster__workers=[1, 2]), folder, env=env)
    return Disturbed(output, folder, temporary, ports, restarted_from, killed_at, signalled, last, code)


def test_killed_and_stopped_trainings_end_with_the_bytes_of_two_plain_processes(
    disturbed: Disturbed, data: Path, tmp_path: Path
) -> None:
    assert disturbed.last_code == 0, disturbed.last.stderr
    steps = [disturbed.restarted_from, *disturbed.killed_at]
    assert all(earlier < later for earlier, later in zip(steps, [*steps[1:], STEPS], strict=True)), steps
    train_in_processes(tiny_config(str(data), tmp_path / "plain", **SETS), 2)
    plain, killed = (read_steps(open_storage(str(path))) for path in (tmp_path / "plain", disturbed.output))
    columns = ["step", "loss", "lr", "valid_px", "grad_norm"]
    assert killed.select(columns).equals(plain.select(columns)), "each step once, with the same figures"
    assert (disturbed.output / "model.safetensors").read_bytes() == (
        tmp_path / "plain/model.safetensors"
    ).read_bytes()


@pytest.mark.s3
def test_a_training_with_data_and_output_on_s3_outlives_the_loss_of_a_worker(
    data: Path, folder: Path, s3_prefix: str
) -> None:
    prepared, output = open_storage(f"{s3_prefix}/data"), f"{s3_prefix}/run"
    for path in data.rglob("*"):
        if path.is_file():
            prepared.put(str(path.relative_to(data)), path.read_bytes())
    sets = {"train__steps": 100, "checkpoints__every_steps": 5, "validation__every_steps": 50}
    with started(arguments(f"{s3_prefix}/data", output, **sets), folder) as command:
        seen = wait_beyond(output, 0, command)
        workers = [pid for pid, name in tagged(command.tag).items() if name.startswith("ray::RayTrainWo")]
        os.kill(workers[0], signal.SIGKILL)
        assert command.wait() == 0, command.stderr
    assert 0 < seen < 100
    assert "goes on after step" in command.stderr
    train_in_processes(tiny_config(str(data), folder / "plain", **sets), 2)
    assert open_storage(output).read("model.safetensors") == (folder / "plain/model.safetensors").read_bytes()


def test_a_signal_ends_a_training_and_says_how_to_go_on(disturbed: Disturbed) -> None:
    assert [command.process.returncode for command in disturbed.signalled] == [130, 143]
    for command in disturbed.signalled:
        assert command.stderr.splitlines()[-1] == GOES_ON
        assert command.stdout == ""


def test_stdout_holds_the_result_and_stderr_only_lines_of_ours(disturbed: Disturbed) -> None:
    assert json.loads(disturbed.last.stdout)["steps"] == STEPS
    starts = ("step ", "validation at step ", "goes on after step ", "stopped; ")
    for command in (*disturbed.signalled, disturbed.last):
        lines = command.stderr.splitlines()
        assert [line for line in lines if not line.startswith(starts)] == []
        assert any(line.startswith("goes on after step ") for line in lines)


def test_workers_open_no_port_to_other_machines_but_the_one_that_all_of_rays_processes_have(
    disturbed: Disturbed,
) -> None:
    assert disturbed.ports["worker"] == disturbed.ports["board"] == {1}


def test_nothing_is_left_in_the_home_and_temporary_folders(disturbed: Disturbed) -> None:
    assert list((disturbed.folder / "home").iterdir()) == []
    names = {path.name for path in disturbed.temporary.iterdir()}
    assert {name for name in names if not name.startswith("torchinductor_")} == set()  # torch's cache
    assert {path.name for path in disturbed.output.iterdir()} == {
        "run.json", "checkpoints", "history", "model.safetensors", "README.md", "curves.png",
    }  # fmt: skip


def test_a_damaged_shard_ends_a_training_with_one_line_that_names_it(data: Path, folder: Path) -> None:
    damaged = folder / "prepared"
    shutil.copytree(data, damaged)
    shard = max(damaged.glob("shards/*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    shard.write_bytes(content)
    code, command = run(arguments(damaged, folder / "run"), folder)
    assert code == 2, command.stderr
    *before, line = command.stderr.splitlines()
    assert all(text.startswith("step ") for text in before)
    assert line.startswith("error: ")
    assert shard.name in line
    assert command.stdout == ""


def test_a_loss_that_is_not_finite_names_step_checkpoint_and_the_samples_of_all_workers(
    data: Path, folder: Path
) -> None:
    more = ("--set", "train.clip_norm=null", "--set", "train.optimizer=sgd", "--set", "train.log_order=true")
    sets = {"train__lr": 1e30, "checkpoints__every_steps": 1, "validation__splits": []}
    code, command = run(arguments(data, folder / "run", *more, **sets), folder)
    assert code == 4, command.stderr
    line = command.stderr.splitlines()[-1]
    last = newest(folder / "run")
    assert line.startswith(f"error: {folder}/run: the loss of step {last + 1} is ")
    named = line.partition("its samples: ")[2].partition(";")[0].split(", ")
    assert len(set(named)) == 4
    seen = [row["sample_id"] for row in read_order(open_storage(str(folder / "run"))).to_pylist()]
    assert len(set(seen)) == 4 * last
    assert not set(named) & set(seen), "the epoch's samples of the step after"
    assert f"newest checkpoint: {folder}/run/checkpoints/step-{last:08d}/" in line
    assert "Traceback" not in command.stderr


def test_a_bug_in_a_worker_ends_a_training_at_once_and_shows_where_it_is(data: Path, folder: Path) -> None:
    hooks = folder / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(BUG)
    env = {"PYTHONPATH": f"{hooks}{os.pathsep}{REPOSITORY}"}
    code, command = run(arguments(data, folder / "run"), folder, env=env)
    assert code == 1, command.stderr
    named = "a worker failed: RuntimeError: shapes that do not fit"
    assert command.stderr.splitlines()[-1] == f"error: a bug in segpipe: RuntimeError: {named}"
    assert "in run_and_fail" in command.stderr
    assert "goes on after step" not in command.stderr, "no worker was started again"
    assert command.stdout == ""
