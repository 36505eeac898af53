"""Small archives, tiny models and the command itself, run in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import rasterio
import rasterio.errors
import torch
from rasters import write_tiff

from segpipe.cli.main import main
from segpipe.config.card import ClassInfo, ModelCard
from segpipe.geometry.grid import Window
from segpipe.masks.plan import load_part
from segpipe.masks.read import MaskReader, SceneUnits
from segpipe.masks.run import list_parts, require_run
from segpipe.models.families import build
from segpipe.models.file import save_model
from segpipe.storage import open_storage

CLASSES = (
    ClassInfo(name="ground", color=(0, 0, 0)),
    ClassInfo(name="roof", color=(200, 30, 40)),
    ClassInfo(name="water", color=(10, 20, 250)),
)
TILE_PX = 32

Array = np.ndarray[Any, Any]


def make_model(
    path: Path,
    family: str = "unet",
    *,
    bands: int = 3,
    names: tuple[str, ...] = (),
    classes: int = 3,
    seed: int = 11,
    **card: Any,
) -> Path:
    """Save a tiny model of random weights: a U-Net of width 4 and depth 2, or a linear pixel classifier.

    The pixel classifier of as many classes as bands gives each pixel the number of its brightest band.
    """
    options: dict[str, Any] = {"width": 4, "depth": 2} if family == "unet" else {"width": 0}
    torch.manual_seed(seed)
    network = build(family, bands=bands, classes=classes, **options).eval()
    if family == "pixel":
        with torch.no_grad():
            network.head.weight.copy_(torch.eye(classes, bands)[:, :, None, None])
    values: dict[str, Any] = {
        "family": family,
        "options": options,
        "bands": names or tuple(f"band{number}" for number in range(1, bands + 1)),
        "mean": (120.0,) * bands,
        "std": (60.0,) * bands,
        "tile_px": TILE_PX,
        "classes": CLASSES[:classes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(path, network, ModelCard(**(values | card)))
    return path


def scene_pixels(bands: int, height: int, width: int, seed: int = 0) -> Array:
    """Blotches of 1 to 250, uint8 (bands, height, width): a network sees edges in it, not only noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(1, 251, (bands, -(-height // 6), -(-width // 6)))
    return np.kron(coarse, np.ones((1, 6, 6), int))[:, :height, :width].astype(np.uint8)


def write_scene(
    path: Path,
    height: int,
    width: int,
    *,
    seed: int = 0,
    bands: int = 3,
    pixel_m: float | None = 0.5,
    strips: bool = False,
    pixels: Array | None = None,
    **profile: Any,
) -> Array:
    """Write a GeoTIFF of UTM zone 33 and return its pixels; tiles of 64 px, or strips of 8 rows."""
    pixels = scene_pixels(bands, height, width, seed) if pixels is None else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    layout: dict[str, Any] = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    if strips:
        layout = {"blockysize": 8}
    if pixel_m is not None:
        layout |= grid_of(seed, pixel_m)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        write_tiff(path, pixels, compress="deflate", **(layout | profile))
    return pixels


def grid_of(seed: int, pixel_m: float = 0.5, shift_px: float = 0.0) -> dict[str, Any]:
    """Return CRS and transform of `write_scene`'s scene, moved ``shift_px`` to the east."""
    west = 500_000.0 + seed + shift_px * pixel_m
    return {"crs": "EPSG:32633", "transform": rasterio.Affine(pixel_m, 0, west, 0, -pixel_m, 5_000_000.0)}


def write_label(path: Path, label: Array, **profile: Any) -> Path:
    """Write class indices, uint8 (height, width), as a TIFF: without georeference but for `grid_of`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return write_tiff(path, label[None], compress="deflate", **profile)


def tell_changed(path: Path) -> None:
    """Move a file's time on, as a copy made later would have it."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 2_000_000_000))


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def tree(self) -> dict[str, Any]:
        """What ``--json`` printed."""
        return json.loads(self.out)

    def refused(self, code: int, *words: str) -> Done:
        """Check that it ended with ``code`` and one line that begins with "error:" and has all the words."""
        assert self.code == code, (self.code, self.err)
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        for word in words:
            assert word in lines[0], (word, self.err)
        return self


def run(*arguments: Any) -> Done:
    """Run ``segpipe`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    old = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        signal.signal(signal.SIGTERM, old)
    return Done(code, out.getvalue(), err.getvalue())


def predict(scenes: Any, model: Any, output: Any, *more: Any, **settings: Any) -> Done:
    """Run ``segpipe predict`` with the local executor; settings are those of ``inference``."""
    inputs = scenes if isinstance(scenes, list | tuple) else [scenes]
    return run("predict", *inputs, "--model", model, "--output", output, *local(**settings), *more)


def local(**settings: Any) -> list[str]:
    """Return the options of a small run in this process; settings are those of ``inference``."""
    asked = {"margin_px": 8, **settings}
    sets = [word for name, value in asked.items() for word in ("--set", f"inference.{name}={value}")]
    return ["--executor", "local", "--set", "cluster.threads_per_worker=1", *sets]


def ok(done: Done) -> Done:
    """Check that a command ended well."""
    assert done.code == 0, (done.code, done.err)
    assert "Traceback" not in done.err
    return done


def start(*arguments: Any, env: Mapping[str, str] | None = None, code: str = "") -> subprocess.Popen[str]:
    """Start ``segpipe`` as a process of its own session; ``code`` is run before it."""
    program = f"import sys\n{code}\nfrom segpipe.cli.main import main\nmain()"
    command = [sys.executable, "-c", program, *(str(argument) for argument in arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
    )


def objects(run_uri: Any, prefix: str = "masks/") -> dict[str, bytes]:
    """Return the bytes of all objects of a run below ``prefix``."""
    storage = open_storage(str(run_uri))
    return {info.key: storage.read(info.key) for page in storage.list(prefix) for info in page}


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, hidden ones too."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def planned(run_uri: Any) -> Iterator[tuple[int, Any]]:
    """Iterate over (part, planned scene) of all parts."""
    storage = open_storage(str(run_uri))
    info = require_run(storage)
    for part in list_parts(storage):
        for scene in load_part(storage, part, info.facts).scenes():
            yield part, scene


def whole_masks(run_uri: Any) -> dict[str, Array]:
    """Return every scene's whole mask from its newest part; every pixel must be there."""
    reader = MaskReader(open_storage(str(run_uri)))
    newest = {scene.source.scene_id: (part, scene) for part, scene in planned(run_uri)}
    masks = {}
    for name, (part, scene) in newest.items():
        if scene.header is None:
            continue
        units = SceneUnits(name, part, scene.first_unit, scene.units)
        mask, missing_px = reader.read(units, Window(0, 0, scene.header.height, scene.header.width))
        assert missing_px == 0, (name, missing_px)
        masks[name] = mask
    return masks


def rows(run_uri: Any, *columns: str) -> list[dict[str, Any]]:
    """Return the rows of the mask dataset as any reader of Parquet sees them, in order."""
    import pyarrow.dataset as ds

    table = ds.dataset(f"{run_uri}/masks", format="parquet").to_table(list(columns) or None)
    return table.to_pylist()


def failures(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of failures.parquet by scene id."""
    table = pq.read_table(folder / "reports/failures.parquet").to_pylist()
    return {row["scene_id"]: row for row in table}
