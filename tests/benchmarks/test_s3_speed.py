"""Windowed prediction over S3 on loopback against local files, interleaved; and what its reads fetch.

Run: python -m pytest -m benchmark -s tests/benchmarks/test_s3_speed.py
Targets: >= 0.95 of the local rate with LR-ASPP; with a no-op model as a figure. The server shares the
machine's cores with the reader here, which a real object store does not. Bytes fetched: <= 1.3 of the file
blocks that the windows touch, each counted once a window; a strip is fetched and decoded <= 1.3 times.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import archives
import pytest
import rasterio
import steady
from rasters import AUTO, source_of
from s3_server import FaultProxy

from segpipe.geometry.grid import Window, make_grid
from segpipe.masks.plan import PlanScene
from segpipe.pipelines.segment import EngineSource
from segpipe.pipelines.worker import READ_THREADS
from segpipe.rasters.header import inspect_scene
from segpipe.storage import open_storage

pytestmark = [pytest.mark.benchmark, pytest.mark.s3]

SIDE_PX = 8192
ROUNDS = 4
CUT = {"tile_px": 512, "margin_px": 32, "block_px": 4096}
STRIP_ROWS = 16
FETCHED_TARGET = 1.3
DECODED_TARGET = 1.3


def upload(archive: Path, prefix: str) -> str:
    target = open_storage(f"{prefix}/{archive.name}")
    for path in sorted(archive.iterdir()):
        target.put_file_if_absent(path.name, path)
    return target.root


@pytest.mark.parametrize(("kind", "copies"), [("lraspp", 3), ("no-op", 8)])
def test_rate_over_s3(tmp_path: Path, s3_prefix: str, kind: str, copies: int) -> None:
    scene = archives.write_scene(tmp_path / "scene.tif", SIDE_PX)
    model = archives.write_model(tmp_path / "model.safetensors", "lraspp_mobilenet_v3_large")
    archive = archives.make_archive(tmp_path, scene, copies)
    archive_of = {"local": str(archive), "s3": upload(archive, s3_prefix)}
    network = steady.NOOP_MODEL if kind == "no-op" else ""
    rates: dict[str, list[float]] = {"local": [], "s3": []}
    for number in range(ROUNDS):
        for place in sorted(archive_of, reverse=bool(number % 2)):  # neither is always the later
            output = str(tmp_path / "run") if place == "local" else f"{s3_prefix}/{uuid.uuid4().hex[:8]}"
            rates[place].append(steady.rate(network, model, archive_of[place], output))
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            print(f"{kind} {place}: {rates[place][-1]:.2f} Mpx/s", flush=True)
    ratios = [there / here for here, there in zip(rates["local"], rates["s3"], strict=True)]
    print(
        f"{kind}: local {archives.median(rates['local']):.2f}, S3 {archives.median(rates['s3']):.2f} Mpx/s, "
        f"{archives.median(ratios):.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})"
    )


class NoEngine:
    """Takes blocks as the engine does and lets them go."""

    def start(self) -> Future[None]:
        return self.submit()

    @contextmanager
    def reading(self) -> Iterator[None]:
        yield

    def submit(self, *_: Any) -> Future[None]:
        future: Future[None] = Future()
        future.set_result(None)
        return future


def as_strips(scene: Path, path: Path) -> Path:
    """Write the same pixels in strips of ``STRIP_ROWS`` rows."""
    with rasterio.open(scene) as source:
        layout = {"tiled": False, "blockxsize": None, "blockysize": STRIP_ROWS}
        with rasterio.open(path, "w", **(source.profile | layout)) as target:
            for row in range(0, source.height, source.height // 4):
                band = rasterio.windows.Window(0, row, source.width, source.height // 4)
                target.write(source.read(window=band), window=band)
    return path


def block_bytes(path: Path, window: Window) -> int:
    """Encoded bytes of the file's tiles or strips that the window touches."""
    with rasterio.open(path) as file:
        height, width = file.block_shapes[0]
        return sum(
            int(file.get_tag_item(f"BLOCK_SIZE_{col}_{row}", "TIFF", bidx=1))
            for row in range(window.row_off // height, (window.row_stop - 1) // height + 1)
            for col in range(window.col_off // width, (window.col_stop - 1) // width + 1)
        )


@pytest.mark.parametrize("layout", ["tiled", "strips"])
def test_what_predict_fetches_of_a_scene_over_s3(
    tmp_path: Path, s3_prefix: str, layout: str, s3_proxy: FaultProxy
) -> None:
    """Count the bodies of all GET answers, the header's too, while blocks are read as a worker reads them.

    From one window to the next GDAL keeps strips decoded and never as they are in the file, so whatever is
    decoded again was fetched again: the bytes fetched, over those of all strips, tell how many times a strip
    is decoded.
    """
    scene = archives.write_scene(tmp_path / "tiled.tif", SIDE_PX)
    path = as_strips(scene, tmp_path / "strips.tif") if layout == "strips" else scene
    storage = open_storage(s3_prefix)
    storage.put_file_if_absent(path.name, path)
    s3_proxy.seen.clear()
    source = source_of(storage.uri(path.name))
    header = inspect_scene(source, 3, AUTO)
    assert header.strips == (layout == "strips")
    grid = make_grid(header.height, header.width, **CUT, strips=header.strips)
    reads = EngineSource(NoEngine(), AUTO)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(lambda block: reads.start(PlanScene(source, header), block), grid.blocks()))
    fetched_bytes = sum(seen.body_bytes for seen in s3_proxy.seen if seen.method == "GET")
    touched_bytes = sum(block_bytes(path, block.read) for block in grid.blocks())
    fetched = fetched_bytes / touched_bytes
    print(
        f"\n{layout}: {grid.num_blocks} windows of a file of {path.stat().st_size / 1e6:.1f} MB fetch "
        f"{fetched_bytes / 1e6:.1f} MB, {fetched:.3f} of the blocks they touch (target {FETCHED_TARGET})"
    )
    assert fetched <= FETCHED_TARGET
    if layout == "strips":
        decoded = fetched_bytes / block_bytes(path, Window(0, 0, header.height, header.width))
        print(f"strips: each is decoded {decoded:.3f} times (target {DECODED_TARGET})")
        assert decoded <= DECODED_TARGET
