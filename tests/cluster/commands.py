"""Runs the command as users do, in processes of its own that never outlive a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rasters import UTM33, write_tiff

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.models.families import build
from segpipe.models.file import save_model
from segpipe.storage import open_storage

REPOSITORY = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).with_name("faults")
TIMEOUT_S = 300.0
_TAG = "SEGPIPE_TEST_TAG"
_SESSION = uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Archive:
    """Small scenes and a small network; ``args`` cut them into many units."""

    scenes: Path
    model: Path
    args: tuple[str, ...] = (
        "--set", "cluster.threads_per_worker=1",
        "--set", "inference.margin_px=8",
        "--set", "inference.block_px=128",
        "--set", "inference.unit_px=16500",
    )  # fmt: skip

    def predict(self, run: str | Path, *more: str) -> list[str]:
        return ["predict", str(self.scenes), "--model", str(self.model), "-o", str(run), *self.args, *more]


def write_model(path: Path, **changes: Any) -> Path:
    """A U-Net of random weights that makes three classes of noise."""
    torch.manual_seed(4)
    options = {"width": 8, "depth": 2}
    card = ModelCard(
        family="unet", options=options, bands=("red", "green", "blue"), tile_px=64,
        mean=(125.0,) * 3, std=(70.0,) * 3,
        classes=tuple(ClassInfo(name=name, color=(9, 9, 9)) for name in ("a", "b", "c")),
    )  # fmt: skip
    save_model(path, build("unet", bands=3, classes=3, **options), card.model_copy(update=changes))
    return path


def write_archive(folder: Path, sides_px: Mapping[str, int]) -> Archive:
    """Scenes of blotched noise, so that the masks are no single class."""
    scenes = folder / "scenes"
    scenes.mkdir(parents=True)
    for seed, (name, side_px) in enumerate(sides_px.items()):
        coarse = np.random.default_rng(seed).integers(0, 255, (3, -(-side_px // 8), -(-side_px // 8)))
        pixels = np.kron(coarse, np.ones((1, 8, 8), int))[:, :side_px, :side_px].astype("uint8")
        write_tiff(
            scenes / f"{name}.tif",
            pixels,
            compress="deflate",
            tiled=True,
            blockxsize=128,
            blockysize=128,
            **UTM33,
        )
    return Archive(scenes, write_model(folder / "model.safetensors"))


@dataclass(slots=True)
class Command:
    """One running command and everything that it starts."""

    process: subprocess.Popen[str]
    tag: str
    home: Path
    stdout: str = ""
    stderr: str = ""
    _files: list[Any] = field(default_factory=list)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for the end and return the exit code; the outputs are then in ``stdout`` and ``stderr``."""
        code = self.process.wait(timeout_s)
        self._read()
        return code

    def read_now(self, stream: str) -> str:
        """What the running command has printed to ``stdout`` or ``stderr``."""
        # By name: the open file shares its position with the command, which writes there.
        return Path(self._files[("stdout", "stderr").index(stream)].name).read_text()

    def kill_all(self) -> None:
        """SIGKILL the command and every process that came of it, at once."""
        while left := tagged(self.tag):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)
        self.process.wait(10)
        self._read()

    def _read(self) -> None:
        for name, file in zip(("stdout", "stderr"), self._files, strict=True):
            file.seek(0)
            setattr(self, name, file.read())


@contextmanager
def started(
    arguments: list[str],
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    program: tuple[str, ...] = (sys.executable, "-m", "segpipe.cli.main"),
    cwd: Path = REPOSITORY,
) -> Iterator[Command]:
    """Start a command in its own session with an empty home folder; all of it is dead afterwards."""
    tag, home = uuid.uuid4().hex, folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / f"{tag}.out", "w+") as out,
        open(folder / f"{tag}.err", "w+") as err,
    ):
        process = subprocess.Popen(
            [*program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            cwd=cwd,
            env=environment(tag, home) | dict(env or {}),
            start_new_session=True,
        )
        command = Command(process, tag, home, _files=[out, err])
        try:
            yield command
        finally:
            command.kill_all()


def environment(tag: str, home: Path) -> dict[str, str]:
    """Return this environment without anything that names a Ray, with the fault hooks loaded."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FAULT_"))}
    paths = [str(FAULTS), str(REPOSITORY), kept.get("PYTHONPATH", "")]
    marks = {_TAG: f"{_SESSION}-{tag}", "HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # A Ray job's entry point is `python`: that must be this one.
    marks["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | marks


def run(arguments: list[str], folder: Path, **options: Any) -> tuple[int, Command]:
    """Run a command to its end."""
    with started(arguments, folder, **options) as command:
        return command.wait(), command


def tagged(tag: str = "") -> dict[int, str]:
    """Pid and name of all living processes that came of one command (default: of any of this test run)."""
    mark = f"{_TAG}={_SESSION}-{tag}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if mark in (folder / "environ").read_bytes():  # empty for a zombie
                found[int(folder.name)] = (folder / "comm").read_text().strip()
        except OSError:
            continue
    return found


def interrupt(command: Command, number: signal.Signals) -> None:
    """Signal as a terminal (SIGINT, to the whole group) or a scheduler does, and wait for the end."""
    if number is signal.SIGINT:
        os.killpg(command.process.pid, number)
    else:
        command.process.send_signal(number)
    command.wait(180)


def wait_for_objects(uri: str | Path, count: int, timeout_s: float = 240) -> None:
    """Wait until that many units of the run are there."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if len(mask_objects(uri)) >= count:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{uri} has not {count} units after {timeout_s:.0f} s")


def mask_objects(uri: str | Path) -> dict[str, bytes]:
    """The bytes of all mask objects of a run by key."""
    storage = open_storage(str(uri))
    keys = [info.key for page in storage.list("masks/") for info in page]
    return {key: storage.read(key) for key in keys}
