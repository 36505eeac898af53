"""A command that is stopped, killed or started twice ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import (
    Archive,
    interrupt,
    mask_objects,
    run,
    started,
    tagged,
    wait_for_objects,
)

pytestmark = pytest.mark.ray

SLOW = {"FAULT_SLOW_S": "0.3"}


def test_sigkill_at_any_moment_and_the_same_command_again(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path
) -> None:
    target, moments = folder / "run", random.Random(os.urandom(8))
    arguments = archive.predict(target)
    with started(arguments, folder) as command:  # while it starts
        time.sleep(delay_s := moments.uniform(0.3, 6))
        command.kill_all()
    for count in (1, moments.randrange(3, 8)):  # while it computes
        with started(arguments, folder, env=SLOW) as command:
            wait_for_objects(target, count)
            command.kill_all()
        assert mask_objects(target).items() <= undisturbed.items(), (
            f"killed after {delay_s:.3f} s, {count} units"
        )
        assert not (target / "_SUCCESS").exists()
    code, command = run(arguments, folder)
    assert code == 0, command.stderr
    assert mask_objects(target) == undisturbed
    names = {path.name for path in target.iterdir()}
    assert names == {"run.json", "plan", "masks", "index", "reports", "_SUCCESS"}, "no strays"


@pytest.mark.s3
def test_sigkill_and_the_same_command_again_on_object_storage(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path, s3_prefix: str
) -> None:
    arguments = archive.predict(f"{s3_prefix}/run")
    with started(arguments, folder, env=SLOW) as command:
        wait_for_objects(f"{s3_prefix}/run", random.Random(os.urandom(8)).randrange(1, 8))
        command.kill_all()
    assert len(mask_objects(f"{s3_prefix}/run")) < len(undisturbed)
    code, command = run(arguments, folder)
    assert code == 0, command.stderr
    assert mask_objects(f"{s3_prefix}/run") == undisturbed


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_everything_and_says_how_to_go_on(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path, number: signal.Signals, expected: int
) -> None:
    target = folder / "run"
    with started(archive.predict(target), folder, env=SLOW) as command:
        wait_for_objects(target, 2)
        interrupt(command, number)
        assert command.process.returncode == expected, command.stderr
        left_at_once = tagged(command.tag)
        end = time.monotonic() + 60
        while tagged(command.tag) and time.monotonic() < end:
            time.sleep(0.1)
        assert not tagged(command.tag), f"still there a minute later (at once: {left_at_once})"
    assert command.stderr.splitlines()[-1] == "stopped; the same command goes on where this one stopped"
    assert "Traceback" not in command.stderr
    code, again = run(archive.predict(target, "--executor", "local"), folder)
    assert code == 0, again.stderr
    assert mask_objects(target) == undisturbed


def test_two_commands_at_once_on_one_run_both_succeed(
    archive: Archive, undisturbed: dict[str, bytes], folder: Path
) -> None:
    target = folder / "run"
    with ExitStack() as stack:
        both = [stack.enter_context(started(archive.predict(target), folder, env=SLOW)) for _ in range(2)]
        codes = [command.wait() for command in both]
        assert codes == [0, 0], "\n".join(command.stderr for command in both)
    assert mask_objects(target) == undisturbed
