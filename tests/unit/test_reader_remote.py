"""Scenes in object stores: windows by range reads of one version; faults keep their meaning."""

from __future__ import annotations

import gc
import io
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.io import MemoryFile
from rasters import AUTO, noise, read_scene, source_of, tiff_bytes, whole

from segpipe.errors import SceneError, StorageError
from segpipe.geometry.grid import Window
from segpipe.rasters import driver
from segpipe.rasters.header import inspect_scene
from segpipe.rasters.ranges import RangedObject
from segpipe.rasters.reader import open_scene
from segpipe.storage import Storage, join_uri, open_object

TILES = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"}
PIXELS = noise(3, 1024, 1024)


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "s3":
        yield request.getfixturevalue("s3_prefix")
    else:
        yield f"memory://reader-{uuid.uuid4().hex}"


@pytest.fixture
def memory() -> str:
    return f"memory://reader-{uuid.uuid4().hex}"


def put(root: str, name: str, data: bytes) -> str:
    uri = join_uri(root, name)
    storage, key = open_object(uri)
    storage.put(key, data)
    return uri


def png_bytes(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(out, "PNG")
    return out.getvalue()


class Ledger:
    """Notes the ranges that are read of one storage."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[tuple[int, int]]] = []
        self.fail: Exception | None = None
        plain = storage.read_ranges

        def read_ranges(key: str, ranges: Sequence[tuple[int, int]], etag: str | None = None) -> list[bytes]:
            self.calls.append(list(ranges))
            if self.fail is not None:
                raise self.fail
            return plain(key, ranges, etag)

        monkeypatch.setattr(type(storage), "read_ranges", lambda _, *args: read_ranges(*args))

    @property
    def num_bytes(self) -> int:
        return sum(length for call in self.calls for _, length in call)


def block_bytes(data: bytes, windows: Sequence[Window]) -> int:
    """Bytes of the file's tiles that the windows touch, each counted once a window."""
    total = 0
    with MemoryFile(data) as memory, memory.open() as dataset:
        height, width = dataset.block_shapes[0]
        for window in windows:
            for row in range(window.row_off // height, (window.row_stop - 1) // height + 1):
                for col in range(window.col_off // width, (window.col_stop - 1) // width + 1):
                    for band in (1,) if dataset.interleaving.name == "pixel" else dataset.indexes:
                        total += int(dataset.get_tag_item(f"BLOCK_SIZE_{col}_{row}", "TIFF", bidx=band))
    return total


def test_remote_windows_are_those_of_the_file(root: str) -> None:
    source = source_of(put(root, "a b/ä.tif", tiff_bytes(PIXELS, interleave="pixel", **TILES)))
    header = inspect_scene(source, 3, AUTO)
    with open_scene(source, header, AUTO) as reader:
        for window in (
            Window(100, 200, 300, 400),
            Window(0, 0, 1, 1),
            Window(1000, 0, 24, 1024),
            whole(header),
        ):
            rows, cols = window.slices_in(whole(header))
            np.testing.assert_array_equal(reader.read(window)[0], PIXELS[:, rows, cols])


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_a_window_fetches_its_tiles_only_and_all_at_once(
    memory: str, monkeypatch: pytest.MonkeyPatch, interleave: str
) -> None:
    data = tiff_bytes(PIXELS, interleave=interleave, **TILES)
    source = source_of(put(memory, "x.tif", data))
    header = inspect_scene(source, 3, AUTO)
    ledger = Ledger(open_object(source.uri)[0], monkeypatch)
    window = Window(300, 300, 200, 500)
    with open_scene(source, header, AUTO) as reader:
        reader.read(Window(1000, 1000, 5, 5))  # the directory is read by now
        ledger.calls.clear()
        reader.read(window)
    needed = block_bytes(data, [window])
    assert needed <= ledger.num_bytes <= 1.01 * needed
    assert len([call for call in ledger.calls if call]) <= (1 if interleave == "pixel" else 3)


def test_windows_over_a_scene_fetch_at_most_their_blocks(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiff_bytes(PIXELS, interleave="pixel", **TILES)
    source = source_of(put(memory, "x.tif", data))
    ledger = Ledger(open_object(source.uri)[0], monkeypatch)
    header = inspect_scene(source, 3, AUTO)
    windows = [Window(row, col, 288, 288) for row in (0, 256, 512, 736) for col in (0, 256, 512, 736)]
    with open_scene(source, header, AUTO) as reader:
        for window in windows:
            reader.read(window)
    assert ledger.num_bytes <= 1.3 * block_bytes(data, windows)


def test_inspecting_a_large_scene_fetches_its_head_only(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff_bytes(PIXELS, interleave="pixel", **TILES)
    source = source_of(put(memory, "x.tif", data))
    ledger = Ledger(open_object(source.uri)[0], monkeypatch)
    inspect_scene(source, 3, AUTO)
    assert ledger.num_bytes <= 65_536 < len(data) / 10


@pytest.mark.parametrize("whole_bytes", [driver.WHOLE_BYTES, 0])
def test_remote_images_are_read_whole_or_by_ranges(
    memory: str, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr(driver, "WHOLE_BYTES", whole_bytes)
    uri = put(memory, "x.tif", png_bytes(PIXELS[:, :200, :300]))
    header, read, valid = read_scene(uri, 3)
    assert header.driver == "PNG"
    np.testing.assert_array_equal(read, PIXELS[:, :200, :300])
    assert valid is None


@pytest.mark.parametrize("form", ["PNG", "JPEG", "strips"])
def test_bands_of_rows_that_overlap_are_decoded_once(
    memory: str, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(driver, "WHOLE_BYTES", 0)
    if form == "strips":
        data = tiff_bytes(PIXELS, interleave="pixel", compress="deflate", blockysize=8)
    else:
        out = io.BytesIO()
        Image.fromarray(PIXELS.transpose(1, 2, 0)).save(out, form)
        data = out.getvalue()
    source = source_of(put(memory, "x.img", data))
    header = inspect_scene(source, 3, AUTO)
    handed = []
    plain = RangedObject.read_at
    monkeypatch.setattr(
        RangedObject, "read_at", lambda *args: handed.append(len(read := plain(*args))) or read
    )
    ledger = Ledger(open_object(source.uri)[0], monkeypatch)
    with open_scene(source, header, AUTO) as reader:
        for start in range(0, 1024 - 128, 128):
            reader.read(Window(start, 0, 256, 1024))
    decoded = ledger.num_bytes if form == "strips" else sum(handed)  # encoded bytes given to the decoder
    assert len(data) * 0.95 <= decoded <= 1.3 * len(data)


def test_a_remote_scene_that_is_replaced_while_it_is_read_is_an_error(root: str) -> None:
    source = source_of(put(root, "x.tif", tiff_bytes(PIXELS, **TILES)))
    header = inspect_scene(source, 3, AUTO)
    with open_scene(source, header, AUTO) as reader:
        reader.read(Window(0, 0, 64, 64))
        put(root, "x.tif", tiff_bytes(251 - PIXELS, **TILES))
        with pytest.raises(SceneError) as caught:
            reader.read(Window(900, 900, 64, 64))
    assert caught.value.kind == "scene_changed"
    with pytest.raises(SceneError) as caught:
        open_scene(source, header, AUTO)
    assert caught.value.kind == "scene_changed"


def test_a_remote_scene_that_is_gone_is_not_found(root: str) -> None:
    source = source_of(put(root, "x.tif", tiff_bytes(PIXELS[:, :64, :64])))
    for uri in (join_uri(root, "other.tif"), join_uri(root, "x.tif/y.tif")):
        with pytest.raises(SceneError) as caught:
            inspect_scene(type(source)("scene", uri, source.version), 3, AUTO)
        assert caught.value.kind == "not_found"


@pytest.mark.parametrize("compression", ["deflate", "none"])
def test_a_truncated_remote_scene_is_an_error_and_never_zeros(memory: str, compression: str) -> None:
    data = tiff_bytes(PIXELS, **{**TILES, "compress": compression})
    source = source_of(put(memory, "x.tif", data[: len(data) * 6 // 10]))
    header = inspect_scene(source, 3, AUTO)
    with open_scene(source, header, AUTO) as reader, pytest.raises(SceneError) as caught:
        reader.read(whole(header))
    assert caught.value.kind == "decode"


@pytest.mark.parametrize("phase", ["inspect", "open", "read"])
@pytest.mark.parametrize("fault", [StorageError("no answer"), MemoryError("full"), KeyboardInterrupt()])
def test_a_fault_of_the_storage_is_not_a_fault_of_the_scene(
    memory: str, monkeypatch: pytest.MonkeyPatch, phase: str, fault: Exception
) -> None:
    source = source_of(put(memory, "x.tif", tiff_bytes(PIXELS, **TILES)))
    header = inspect_scene(source, 3, AUTO)
    ledger = Ledger(open_object(source.uri)[0], monkeypatch)

    def failing(call: Callable[[], Any]) -> None:
        ledger.fail = fault
        with pytest.raises(type(fault)):
            call()
        ledger.fail = None

    if phase == "inspect":
        failing(lambda: inspect_scene(source, 3, AUTO))
    elif phase == "open":
        failing(lambda: open_scene(source, header, AUTO))
    with open_scene(source, header, AUTO) as reader:
        if phase == "read":
            failing(lambda: reader.read(Window(500, 500, 100, 100)))
        np.testing.assert_array_equal(reader.read(Window(500, 500, 100, 100))[0], PIXELS[:, 500:600, 500:600])


def test_a_fault_that_gdal_passes_over_on_opening_is_raised_all_the_same(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(put(memory, "x.tif", tiff_bytes(PIXELS, **TILES)))
    plain = RangedObject.open
    kept = []

    def open_with_fault(ranged: RangedObject, *args: object) -> object:
        ranged.keep_fault(StorageError("no answer"))
        kept.append(ranged)
        return plain(ranged, "x")

    monkeypatch.setattr(RangedObject, "open", open_with_fault)
    with pytest.raises(StorageError, match="no answer"):
        inspect_scene(source, 3, AUTO)
    assert kept
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()


def test_remote_readers_may_be_closed_or_dropped_by_any_thread(memory: str) -> None:
    source = source_of(put(memory, "x.tif", tiff_bytes(PIXELS, **TILES)))
    header = inspect_scene(source, 3, AUTO)
    readers = []

    def open_and_read() -> None:
        reader = open_scene(source, header, AUTO)
        reader.read(Window(0, 0, 10, 10))
        readers.append(reader)

    def run(work: Callable[[], object]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    run(open_and_read)
    run(open_and_read)
    readers[0].read(Window(0, 0, 10, 10))  # in another thread than it was opened in
    run(readers.pop(0).close)
    readers.clear()  # never closed
    run(gc.collect)
    with rasterio.Env():
        assert rasterio.env.hasenv()


def test_threads_read_remote_scenes_side_by_side(root: str) -> None:
    source = source_of(put(root, "x.tif", tiff_bytes(PIXELS, **TILES)))
    header = inspect_scene(source, 3, AUTO)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with open_scene(source, header, AUTO) as reader:
            for _ in range(6):
                row, col = (int(value) for value in rng.integers(0, 900, 2))
                read = reader.read(Window(row, col, 100, 110))[0]
                if not np.array_equal(read, PIXELS[:, row : row + 100, col : col + 110]):
                    wrong.append((row, col))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
