"""Archives and timed runs for the pipeline benchmarks."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import rasterio
from engine_loops import mosaic, trained_like
from rasterio.transform import from_origin
from rasterio.windows import Window

from segpipe.models.file import save_model

_STEP_PX = 4096


def write_scene(path: Path, side_px: int) -> Path:
    """Write a tiled deflate RGB GeoTIFF of real drone pixels, ``side_px`` square, window by window."""
    if path.exists():
        return path
    image = mosaic(min(side_px, _STEP_PX), min(side_px, _STEP_PX))
    profile = {
        "driver": "GTiff",
        "width": side_px,
        "height": side_px,
        "count": 3,
        "dtype": "uint8",
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "compress": "deflate",
        "predictor": 2,
        "bigtiff": "if_safer",
        "crs": "EPSG:3857",
        "transform": from_origin(0, 0, 0.3, 0.3),
        "num_threads": 2,
    }
    with rasterio.open(path, "w", **profile) as target:
        for row in range(0, side_px, _STEP_PX):
            for col in range(0, side_px, _STEP_PX):
                target.write(image, window=Window(col, row, image.shape[2], image.shape[1]))
    return path


def make_archive(folder: Path, scene: Path, copies: int) -> Path:
    """Return a folder that holds ``copies`` hard links to one scene."""
    archive = folder / f"{scene.stem}-x{copies}"
    archive.mkdir(exist_ok=True)
    for index in range(copies):
        link = archive / f"scene-{index:03d}.tif"
        if not link.exists():
            os.link(scene, link)
    return archive


def write_model(path: Path, family: str, classes: int = 2) -> Path:
    """Write a random network with the batch norm statistics of real tiles."""
    model, card = trained_like(family, classes, mosaic(1024, 1024))
    save_model(path, model, card)
    return path


@dataclass(slots=True)
class Timed:
    """One run of a command."""

    seconds: float
    peak_pss_bytes: int


def run_timed(command: list[str], *, watch_memory: bool = False, env: dict[str, str] | None = None) -> Timed:
    """Run a command to its end; with ``watch_memory`` sum the PSS of its whole process tree as it runs."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    watcher = _Watcher(process.pid) if watch_memory else None
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    peak = watcher.stop() if watcher else 0
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors}")
    return Timed(seconds, peak)


@dataclass(slots=True)
class _Watcher:
    pid: int
    peak_bytes: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self.peak_bytes = max(self.peak_bytes, tree_pss_bytes(self.pid))

    def stop(self) -> int:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()
        return self.peak_bytes


def tree_pss_bytes(root: int) -> int:
    """Return the proportional set size of a process and all its descendants (Linux: smaps_rollup)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    family = {root}
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in family} - family
        family |= children
        grown = bool(children)
    return sum(_pss_bytes(pid) for pid in family)


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def predict_command(archive: Path | str, model: Path, output: Path | str, *sets: str) -> list[str]:
    """Return the command line of ``segpipe predict`` in this interpreter's environment."""
    command = [sys.executable, "-m", "segpipe.cli.main", "predict", str(archive)]
    command += ["--model", str(model), "--output", str(output)]
    for value in sets:
        command += ["--set", value]
    return command


def median(values: list[float]) -> float:
    return statistics.median(values)
