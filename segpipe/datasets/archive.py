"""Scenes with label rasters or areas, cut into chips on a grid or at random, split by place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from segpipe.config.card import IGNORE
from segpipe.config.model import InputConfig
from segpipe.config.prepare import PrepareConfig
from segpipe.datasets import archive_places as places
from segpipe.datasets.archive_grid import ReducedGrid, reduce_label, reduce_pixels
from segpipe.datasets.archive_labels import Exclusion, ReadLabel, check_areas, open_scene_label
from segpipe.datasets.folder import labelled_scenes
from segpipe.datasets.images import encode_image
from segpipe.datasets.layout import LEFT_OUT, Sample, SampleRef
from segpipe.datasets.splits import TRAIN, ground_cells, split_of
from segpipe.geometry import georef
from segpipe.geometry.grid import Window
from segpipe.geometry.resolution import choose_downsample
from segpipe.rasters.georeference import footprint
from segpipe.rasters.header import inspect_scene, open_source
from segpipe.rasters.palette import has_palette
from segpipe.rasters.reader import SceneReader, open_scene
from segpipe.rasters.scene import SceneHeader, SceneSource
from segpipe.rasters.validity import alpha_bands
from segpipe.rasters.vectors import check_vector_support

Array = np.ndarray[Any, Any]

_PART_PX: Final = 1 << 24
"""Scene pixels that are read at once where they are reduced."""


class ArchiveLayout:
    """Chips of ``chip_px`` on each scene's reduced grid.

    A chip goes to the split of the ground cell that it lies in, and is left out where it reaches into a cell
    of another split: no ground lies on both sides, whatever is added later. Random chips are those of
    ``train``; the other splits keep the grid, so that a score counts each of their pixels alike.
    """

    expands = True

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self.classes = config.classes
        self._input = InputConfig(scenes=config.sources, limits=config.limits)
        self._exclude = None
        if config.archive.exclude_area is not None:
            check_vector_support(config.archive.exclude_area)
            self._exclude = Exclusion(config.archive.exclude_area)

    def listing(self) -> Iterator[SampleRef]:
        """The scenes."""
        for scene in labelled_scenes(self._config):
            check_areas(scene.label_uri, self._config)
            yield SampleRef(scene.scene_id, "", scene, scene.version.size_bytes)

    def expand(self, ref: SampleRef) -> list[SampleRef]:
        """The chips of a scene; ids are scene_id/rROW_cCOL in scene pixels, or scene_id/nNUMBER at random.

        Raises `SceneError`.
        """
        scene, header = ref.scene, self._header(ref.scene)
        grid = self._grid(header)
        if self._config.archive.chips == "grid":
            return list(self._grid_chips(scene, header, grid, None))
        return [*self._random_chips(scene, header, grid), *self._grid_chips(scene, header, grid, TRAIN)]

    def read(self, ref: SampleRef) -> Sample | None:
        """One chip; no data is ignored; None where too little of it has a label. Raises `SceneError`."""
        with self.reading() as read:
            return read(ref)

    @contextmanager
    def reading(self) -> Iterator[Callable[[SampleRef], Sample | None]]:
        """`read` that keeps the last scene open: chips one after another of one scene open it once."""
        with ExitStack() as stack:
            last: _OpenScene | None = None

            def read(ref: SampleRef) -> Sample | None:
                nonlocal last
                if last is None or last.scene != ref.scene:
                    last = None
                    stack.close()
                    last = self._open(ref.scene, stack)
                return self._chip(last, ref)

            yield read

    def _open(self, scene: SceneSource, stack: ExitStack) -> _OpenScene:
        header = self._header(scene)
        with ExitStack() as opening:
            reader = opening.enter_context(open_scene(scene, header, self._input))
            read_label = opening.enter_context(open_scene_label(scene, header, self._config))
            stack.enter_context(opening.pop_all())
        return _OpenScene(scene, header, reader, read_label)

    def _chip(self, opened: _OpenScene, ref: SampleRef) -> Sample | None:
        window, header, factor = ref.window, opened.header, int(ref.payload["factor"])
        if window is None:
            raise ValueError("a chip has a window")
        pixels, valid, label = opened.read(window, factor)
        if (label != IGNORE).mean() <= self._config.archive.min_label_fraction:
            return None
        encoded, suffix = encode_image(pixels, valid)
        transform = None
        if header.transform is not None:
            transform = georef.coarser(georef.shift(header.transform, window), factor)
        return Sample(encoded, suffix, pixels, valid, label, window, header.crs, transform)

    def _header(self, scene: SceneSource) -> SceneHeader:
        with open_source(scene) as raster:
            num_bands = raster.call("header", _num_bands)
        return inspect_scene(scene, num_bands, self._input)

    def _grid(self, header: SceneHeader) -> ReducedGrid:
        factor = choose_downsample(self._config.archive.pixel_m, header.pixel_m)
        return ReducedGrid(header.height, header.width, factor)

    def _grid_chips(
        self, scene: SceneSource, header: SceneHeader, grid: ReducedGrid, skip_split: str | None
    ) -> Iterator[SampleRef]:
        for chip in places.grid_windows(grid.height, grid.width, self._config.archive.chip_px):
            window = grid.to_scene(chip)
            split = self._split(scene, header, window)
            if split == skip_split:
                continue
            if self._exclude is not None and self._exclude.touches(header, window):
                split = LEFT_OUT
            name = f"{scene.scene_id}/r{window.row_off:05d}_c{window.col_off:05d}"
            yield self._ref(name, split, scene, header, grid, chip)

    def _random_chips(
        self, scene: SceneSource, header: SceneHeader, grid: ReducedGrid
    ) -> Iterator[SampleRef]:
        """Each number's first place of some that lies wholly in ``train``; left out where there is none."""
        archive, seed = self._config.archive, self._config.split.seed
        if TRAIN not in self._splits(scene, header, Window(0, 0, header.height, header.width)):
            return
        found = self._class_places(scene, header, grid) if archive.balance == "classes" else None
        for number in range(places.num_random(grid, archive)):
            split, chip = LEFT_OUT, places.uniform_window(grid, archive.chip_px, (0, 0, 0, 0))
            for attempt in range(places.ATTEMPTS):
                drawn = places.draw(seed, scene.scene_id, number, attempt)
                at = found.window(drawn) if found else places.uniform_window(grid, archive.chip_px, drawn)
                if at is None:
                    break
                window = grid.to_scene(at)
                excluded = self._exclude is not None and self._exclude.touches(header, window)
                if self._split(scene, header, window) == TRAIN and not excluded:
                    split, chip = TRAIN, at
                    break
            yield self._ref(f"{scene.scene_id}/n{number:05d}", split, scene, header, grid, chip)

    def _class_places(self, scene: SceneSource, header: SceneHeader, grid: ReducedGrid) -> places.ClassPlaces:
        with open_scene_label(scene, header, self._config) as read_label:

            def reduced(window: Window) -> Array:
                return reduce_label(read_label(grid.to_scene(window)), grid.factor)

            return places.find_classes(reduced, grid, self._config.archive.chip_px)

    def _ref(
        self, name: str, split: str, scene: SceneSource, header: SceneHeader, grid: ReducedGrid, chip: Window
    ) -> SampleRef:
        size_bytes = chip.num_px * len(header.bands) * np.dtype(header.dtype).itemsize
        payload: dict[str, Any] = {"factor": grid.factor}
        if self._exclude is not None:
            payload["exclude"] = self._exclude.version_text
        return SampleRef(name, split, scene, size_bytes, grid.to_scene(chip), payload)

    def _split(self, scene: SceneSource, header: SceneHeader, window: Window) -> str:
        """The chip's split; LEFT_OUT where it reaches into a cell of another one."""
        splits = self._splits(scene, header, window)
        return splits.pop() if len(splits) == 1 else LEFT_OUT

    def _splits(self, scene: SceneSource, header: SceneHeader, window: Window) -> set[str]:
        """The splits of all ground cells that the window touches."""
        config = self._config.split
        if not config.fractions:
            return {split_of(scene.scene_id, "", config)}
        located = footprint(header.crs, header.transform, window)
        if located is None:
            return {split_of(scene.scene_id, scene.scene_id, config)}
        west, south, east, north = located[1]
        east += 360.0 * (east < west)
        cells = ground_cells((west, south, east, north), config.grid_m)
        return {split_of(scene.scene_id, f"{row},{col}", config) for row, col in cells}


@dataclass(frozen=True, slots=True)
class _OpenScene:
    """A scene and its label, open; one thread at a time."""

    scene: SceneSource
    header: SceneHeader
    reader: SceneReader
    read_label: ReadLabel

    def read(self, window: Window, factor: int) -> tuple[Array, Array | None, Array]:
        """Pixels, validity and label of a window in scene pixels, reduced; read in parts of whole groups."""
        rows = factor * max(1, _PART_PX // (factor * window.width))
        if factor == 1 or rows >= window.height:
            return self._read_part(window, factor)
        parts = []
        for row_off in range(window.row_off, window.row_stop, rows):
            height = min(rows, window.row_stop - row_off)
            parts.append(self._read_part(Window(row_off, window.col_off, height, window.width), factor))
        pixels = np.concatenate([part[0] for part in parts], axis=1)
        label = np.concatenate([part[2] for part in parts])
        if all(part[1] is None for part in parts):
            return pixels, None, label
        filled = [np.ones(part[2].shape, np.bool_) if part[1] is None else part[1] for part in parts]
        return pixels, np.concatenate(filled), label

    def _read_part(self, window: Window, factor: int) -> tuple[Array, Array | None, Array]:
        pixels, valid = self.reader.read(window)
        label = self.read_label(window)
        if valid is not None:
            label = np.where(valid, label, np.uint8(IGNORE))
        return *reduce_pixels(pixels, valid, factor), reduce_label(label, factor)


def _num_bands(dataset: Any) -> int:
    if has_palette(dataset):
        return 3
    return int(dataset.count) - len(alpha_bands(dataset))
