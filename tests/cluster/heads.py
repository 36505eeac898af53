"""A Ray head on loopback that asks for a token, and jobs for it."""

from __future__ import annotations

import secrets
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import REPOSITORY, Command, run, started
from s3_server import free_ports

RAY = (sys.executable, "-m", "ray.scripts.scripts")
SEGPIPE_FOLDERS = ("segpipe", "jobs")


@dataclass(frozen=True, slots=True)
class Head:
    dashboard: str
    gcs: str
    env: dict[str, str]


@contextmanager
def started_head(folder: Path) -> Iterator[Head]:
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


def submit(head: Head, folder: Path, entry: list[str], **options: Any) -> tuple[int, Command]:
    """Run ``entry`` as a job, with a copy of the package as its working folder, to its end."""
    code = folder / "code"
    for name in SEGPIPE_FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(REPOSITORY / name, code / name, ignore=ignored, dirs_exist_ok=True)
    words = ["job", "submit", "--address", head.dashboard, "--working-dir", str(code), "--", *entry]
    return run(words, folder, program=RAY, **({"env": head.env} | options))
