"""The steps of one block after its classes are there: labels, counts, PNG, row."""

from __future__ import annotations

import numpy as np

from segpipe.config.card import IGNORE, ModelCard
from segpipe.config.model import InputConfig
from segpipe.errors import SceneError
from segpipe.geometry.georef import shift
from segpipe.geometry.grid import Block, Window
from segpipe.inference.result import BlockResult
from segpipe.masks.codec import encode_mask
from segpipe.masks.plan import PlanScene
from segpipe.masks.write import Counts, Row, mask_row
from segpipe.metrics.counts import class_counts, confusion, to_pairs
from segpipe.pipelines.per_thread import PerThread
from segpipe.rasters.georeference import footprint
from segpipe.rasters.labels import LabelReader, open_label


class LabelReaders:
    """The label readers that the write threads keep open."""

    def __init__(self, config: InputConfig, card: ModelCard) -> None:
        self.config = config
        self.card = card
        self._labels: PerThread[LabelReader] = PerThread(lambda reader: reader.close())

    def read_label(self, scene: PlanScene, window: Window) -> np.ndarray | None:
        """Return the label of a window, uint8 (height, width), or None where the scene has none."""
        source, header = scene.source, scene.header
        if header is None or (source.label_uri is None and source.label_offset is None):
            return None
        key = f"{source.scene_id}\0{source.version_text}"

        def opener() -> LabelReader:
            size, classes = (header.height, header.width), self.card.classes
            return open_label(source, *size, classes, self.config, header.located)

        return self._labels.use(key, opener, lambda reader: reader.read(window))


def base_row(scene: PlanScene, part: int, unit: int, window: Window | None = None) -> Row:
    """Return the columns that say which pixels a row is about, on which ground."""
    source, header = scene.source, scene.header
    row: Row = {
        "scene_id": source.scene_id,
        "uri": source.where,
        "version": source.version_text,
        "part": part,
        "unit": unit,
        "label_uri": source.label_uri,
        "datetime": scene.datetime,
    }
    if header is None:
        return row
    row |= {"scene_height": header.height, "scene_width": header.width}
    if window is None or header.transform is None:
        return row
    row |= {"crs": header.crs, "transform": list(shift(header.transform, window))}
    place = footprint(header.crs, header.transform, window) if header.crs is not None else None
    if place is not None:
        wkb, bbox = place
        row |= {"geometry": wkb, "bbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), bbox, strict=True))}
    return row


def finish_block(
    base: Row,
    scene: PlanScene,
    block: Block,
    segmented: BlockResult,
    labels: LabelReaders,
    *,
    keep_mask: bool,
) -> Row:
    """Count, compare with the label and encode: the row of a block. Raises SceneError for a bad label."""
    num_classes = labels.card.num_classes
    mask = segmented.mask
    label = labels.read_label(scene, block.window)
    counts = None
    if label is not None:
        matrix = confusion(label, mask, num_classes)
        counts = Counts(
            label_px=int(np.count_nonzero(label != IGNORE)),
            compared_px=int(matrix.sum()),
            confusion=to_pairs(matrix),
        )
    png = encode_mask(mask) if keep_mask else None
    return mask_row(base, block.window, png, class_counts(mask, num_classes)[0].tolist(), counts)


def label_pixels(scene: PlanScene, block: Block, labels: LabelReaders) -> int | None:
    """Return the labelled pixels of a block that failed, so that no sheet drops out of a score unseen."""
    try:
        label = labels.read_label(scene, block.window)
    except SceneError:
        return None
    return None if label is None else int(np.count_nonzero(label != IGNORE))
