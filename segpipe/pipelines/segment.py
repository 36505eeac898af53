"""Where a block's classes come from: the engine over the scene's pixels, or the masks of a finished run."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

import numpy as np

from segpipe.config.model import InputConfig
from segpipe.errors import InputError, SceneError, SegpipeError
from segpipe.geometry.grid import Block
from segpipe.imports import no_collection
from segpipe.inference.result import BlockResult
from segpipe.masks.plan import PlanScene
from segpipe.masks.read import MaskReader
from segpipe.masks.run import RunInfo
from segpipe.pipelines.per_thread import PerThread
from segpipe.rasters.reader import SceneReader, open_scene
from segpipe.storage import open_storage, read_uri

if TYPE_CHECKING:
    from segpipe.inference.engine import Engine


class BlockSource(Protocol):
    """Gives the classes of blocks; ``start`` is called from read threads and may block on input."""

    keeps_mask: bool
    """Whether the masks are new and belong into the objects."""

    def block_bytes(self, scene: PlanScene, block: Block) -> int:
        """Bytes that the block holds in memory until its row is made."""

    def start(self, scene: PlanScene, block: Block) -> Future[BlockResult]:
        """Read what the block needs and return its classes to come. Raises SceneError."""

    def check_start(self) -> None:
        """Raise, as one of our errors, what keeps this source from computing any block."""

    def close(self) -> None: ...


class EngineSource:
    """Reads pixels and has the engine segment them."""

    keeps_mask = True

    def __init__(self, engine: Engine, config: InputConfig) -> None:
        self._engine, self._started = engine, engine.start()
        self._config = config
        self._readers: PerThread[SceneReader] = PerThread(lambda reader: reader.close())

    def block_bytes(self, scene: PlanScene, block: Block) -> int:
        header = scene.header
        assert header is not None
        pixel_bytes = len(header.bands) * np.dtype(header.dtype).itemsize
        return block.read.num_px * (pixel_bytes + 1) + block.window.num_px

    def start(self, scene: PlanScene, block: Block) -> Future[BlockResult]:
        header, source = scene.header, scene.source
        assert header is not None
        key = f"{source.scene_id}\0{source.version_text}"
        with self._engine.reading():
            pixels, valid = self._readers.use(
                key, lambda: open_scene(source, header, self._config), lambda reader: reader.read(block.read)
            )
            return self._engine.submit(pixels, valid, block.tiles)

    def check_start(self) -> None:
        """See `BlockSource`. Other faults, such as a lost GPU, are of one process and not of the run."""
        if self._started.done() and isinstance(fault := self._started.exception(), SegpipeError):
            raise fault

    def close(self) -> None:
        self._engine.close()


class MaskSource:
    """Takes the classes from the masks of another run (``evaluate --masks``)."""

    keeps_mask = False

    def __init__(self, masks_uri: str) -> None:
        self._storage = open_storage(masks_uri)
        self._readers: PerThread[MaskReader] = PerThread()

    def block_bytes(self, scene: PlanScene, block: Block) -> int:
        return 2 * block.window.num_px

    def start(self, scene: PlanScene, block: Block) -> Future[BlockResult]:
        header = scene.header
        assert header is not None
        if scene.masks is None:
            what = f"the run {self._storage.root} has no masks of a scene {scene.source.scene_id!r}"
            fix = "Predict it too, or leave it out. Ids are paths below the input: name it as that run did."
            raise SceneError("mask_missing", what, scene.source.where, fix)
        reader = self._readers.get("", lambda: MaskReader(self._storage, whole=True))
        mask, missing_px = reader.read(scene.masks, block.window, (header.height, header.width))
        if missing_px:
            what = f"the run {self._storage.root} has no mask for {missing_px} pixels of the block"
            fix = "Its scene failed there (reports/failures.parquet): predict it again, then score it again."
            raise SceneError("mask_missing", what, scene.source.where, fix)
        future: Future[BlockResult] = Future()
        future.set_result(BlockResult(mask))
        return future

    def check_start(self) -> None:
        """See `BlockSource`: masks need no start."""

    def close(self) -> None:
        return


def make_source(info: RunInfo, config: InputConfig, model_uri: str | None) -> BlockSource:
    """Build the source of one worker: load the model and start its engine, or open the other run."""
    if model_uri is None:
        if info.masks_uri is None:
            raise SegpipeError("a worker needs a model or a run of masks", info.recipe_key)
        return MaskSource(info.masks_uri)
    from segpipe.inference.memory import keep_freed_pages

    keep_freed_pages()  # before the threads that it is for
    with no_collection():
        from segpipe.inference.engine import Engine, EngineConfig
        from segpipe.models.file import load_model_bytes

    data = read_uri(model_uri)
    if hashlib.sha256(data).hexdigest() != info.model_sha256:
        raise InputError(
            "the model file is no longer the one that the run was started with",
            model_uri,
            "Put that one back, or choose another --output.",
        )
    model, card = load_model_bytes(data, model_uri)
    facts = info.facts
    engine = Engine(
        model,
        card,
        EngineConfig(
            tile_px=facts.tile_px,
            batch_size=facts.batch_size,
            threads=facts.threads_per_worker,
            precision=facts.precision,
            compile=facts.compile,
            device="cuda:0" if facts.device == "cuda" else "cpu",
            blend=facts.blend,
        ),
    )
    return EngineSource(engine, config)
