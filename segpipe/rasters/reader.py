"""Windows of one scene: the chosen bands as they are in the file, and which pixels are data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np

from segpipe.config.model import InputConfig
from segpipe.errors import SceneError
from segpipe.geometry.grid import Window
from segpipe.pages import block_zeros
from segpipe.rasters.driver import Raster, faults_as
from segpipe.rasters.header import find_rule_of, is_palette, open_sidecar, open_source, uses_sidecar
from segpipe.rasters.palette import palette_of
from segpipe.rasters.scene import CHANGED_FIX, SceneHeader, SceneSource
from segpipe.rasters.validity import ValidityRule, join_no_data, no_data_by_value

Array = np.ndarray[Any, Any]


def open_scene(source: SceneSource, header: SceneHeader, config: InputConfig) -> SceneReader:
    """Open a scene for reading windows; ``header`` is what `inspect_scene` said of the same version.

    Raises `SceneError`: ``not_found``, ``not_raster``, ``header``, ``valid_mask``, ``scene_changed``,
    ``shard_count``. A fault of the storage is raised as itself.
    """
    with ExitStack() as stack:
        raster = stack.enter_context(open_source(source))
        shape = raster.call("header", lambda dataset: (dataset.height, dataset.width, dataset.count))
        if shape != (header.height, header.width, header.num_bands):
            what = "its header is not the one that was planned"
            raise SceneError("scene_changed", what, source.where, CHANGED_FIX)
        palette = None
        bands = header.bands
        if is_palette(header, config):
            bands = (1,)
            palette = raster.call("header", palette_of)
            if config.valid != "auto":
                palette[3] = 255
        rule = raster.call("header", lambda dataset: find_rule_of(dataset, bands, source, config))
        sidecar = None
        if uses_sidecar(source, config):
            sidecar = stack.enter_context(open_sidecar(source, header.height, header.width, config.limits))
        return SceneReader(raster, header, rule, sidecar, palette, stack.pop_all())


def read_pixels(
    raster: Raster,
    window: Window,
    bands: Sequence[int],
    dtype: str,
    rule: ValidityRule,
    palette: Array | None,
) -> tuple[Array, Array | None]:
    """Pixels (bands, height, width) of ``dtype``, and bool (height, width) true = no data by ``rule``.

    None = all are data. With a ``palette`` (of `palette_of`) the pixels are its colours: uint8, three bands.
    Raises `SceneError` ``decode``, ``scene_changed``, ``not_found``; storage faults as themselves.
    """
    if palette is not None:
        bands, dtype = (1,), str(np.min_scalar_type(palette.shape[1] - 1))
    # alpha in the same call: all bands in one pass over the file
    numbers = tuple(bands) if rule.alpha is None else (*bands, rule.alpha)
    together = block_zeros((len(numbers), window.height, window.width), dtype)
    raster.read(numbers, window, together)
    pixels = together[: len(bands)]
    opacity = None if rule.alpha is None else together[-1]
    no_data = no_data_by_value(pixels, rule.nodata)
    if palette is not None:
        opacity = palette[3].take(pixels[0])
        pixels = palette[:3].take(pixels[0], axis=1)
    if opacity is not None:
        no_data = join_no_data(no_data, opacity)
    if rule.mask:
        no_data = join_no_data(no_data, raster.read_mask(window))
    return pixels, no_data


class SceneReader:
    """Reads windows of one open scene; one thread at a time. Made by `open_scene`."""

    def __init__(
        self,
        raster: Raster,
        header: SceneHeader,
        rule: ValidityRule,
        sidecar: Raster | None,
        palette: Array | None,
        opened: ExitStack,
    ) -> None:
        """``palette``: what `palette_of` gives; None = no indexed image."""
        self._raster = raster
        self._header = header
        self._rule = rule
        self._sidecar = sidecar
        self._palette = palette
        self._opened = opened

    def read(self, window: Window) -> tuple[Array, Array | None]:
        """Pixels and validity of a window, which must lie inside the scene.

        Pixels: (bands, height, width) of ``header.dtype``, the chosen bands in their order, C-contiguous, and
        untouched where they are no data. Validity: bool (height, width), true = data; None = all are.
        Raises `SceneError` ``decode``, ``valid_mask``, ``scene_changed``, ``not_found``; storage faults.
        """
        header = self._header
        if not (0 <= window.row_off < window.row_stop <= header.height) or not (
            0 <= window.col_off < window.col_stop <= header.width
        ):
            raise ValueError(f"{window} does not lie in {header.height} x {header.width} pixels")
        pixels, no_data = read_pixels(
            self._raster, window, header.bands, header.dtype, self._rule, self._palette
        )
        if self._sidecar is not None:
            no_data = join_no_data(no_data, self._read_sidecar(self._sidecar, window))
        return pixels, None if no_data is None else np.logical_not(no_data, out=no_data)

    def close(self) -> None:
        """Close its files; may be called from any thread, and again."""
        self._opened.close()

    def __enter__(self) -> SceneReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _read_sidecar(sidecar: Raster, window: Window) -> Array:
        mask = block_zeros((1, window.height, window.width), np.uint8)
        with faults_as("valid_mask"):
            sidecar.read((1,), window, mask)
        return mask[0]
