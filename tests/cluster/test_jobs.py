"""The scripts in ``jobs/`` on a Ray head that asks for a token."""

from __future__ import annotations

import secrets
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import REPOSITORY, Archive, Command, mask_objects, run, started
from s3_server import free_ports

pytestmark = pytest.mark.ray

RAY = (sys.executable, "-m", "ray.scripts.scripts")
SEGPIPE_FOLDERS = ("segpipe", "jobs")


@dataclass(frozen=True, slots=True)
class Head:
    dashboard: str
    gcs: str
    env: dict[str, str]


@pytest.fixture
def head(folder: Path) -> Iterator[Head]:
    """A Ray head on loopback in the foreground, two CPUs, with its jobs interface."""
    gcs, dashboard, agent, agent_grpc, metrics, runtime_env, client = free_ports(7)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    temp = tempfile.mkdtemp(prefix="sp-ray-")  # a socket's path may have 107 characters
    options = {
        "node-ip-address": "127.0.0.1", "port": gcs, "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard, "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc, "metrics-export-port": metrics,
        "runtime-env-agent-port": runtime_env, "ray-client-server-port": client,
        "num-cpus": 2, "object-store-memory": 100 * 2**20, "temp-dir": temp,
    }  # fmt: skip
    arguments = ["start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    try:
        with started(arguments, folder, env=env, program=RAY):
            yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", env)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def wait_for_jobs(head: Head, timeout_s: float = 240) -> None:
    """Wait until the head takes jobs: it answers, and an agent is there to run them."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if status_of(head, head.env["RAY_AUTH_TOKEN"]) == 200:
            return
        time.sleep(0.2)
    raise TimeoutError(f"no answer from {head.dashboard} in {timeout_s:.0f} s")


def status_of(head: Head, token: str | None) -> int:
    """The HTTP status of the list of jobs; 0 = no connection."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_a_job_predicts_on_a_cluster_that_refuses_whoever_has_no_token(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path, head: Head
) -> None:
    config = folder / "job.yaml"
    config.write_text(
        f"input: {{scenes: [{archive.scenes}]}}\n"
        f"model: {archive.model}\noutput: {folder / 'run'}\n"
        "inference: {margin_px: 8, block_px: 128, unit_px: 16500}\n"
        "cluster: {threads_per_worker: 1}\n"
    )
    for name in SEGPIPE_FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(REPOSITORY / name, folder / "code" / name, ignore=ignored)
    wait_for_jobs(head)
    assert status_of(head, None) == 401
    assert status_of(head, "a-wrong-token") == 403
    submit = ["job", "submit", "--address", head.dashboard, "--working-dir", str(folder / "code"), "--"]
    entry = ["python", "-m", "jobs.predict", "--config", str(config)]
    code, stranger = run(submit + entry, folder, env={"RAY_AUTH_MODE": "token"}, program=RAY)
    assert code != 0
    assert "token" in (stranger.stderr + stranger.stdout).lower()
    assert not (folder / "run").exists()
    code, job = run(submit + entry, folder, env=head.env, program=RAY)
    assert code == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout.lower()
    assert mask_objects(folder / "run") == undisturbed
    code, verify = run(["verify", str(folder / "run")], folder)
    assert code == 0, verify.stdout + verify.stderr


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
