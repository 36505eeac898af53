"""Arrow schemas of the two stored tables, format 1: a plan row per scene, a mask row per block.

Columns are only ever added, nullable; readers pass over columns and statuses they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa

from segpipe.config.card import ClassInfo
from segpipe.config.recipe import FORMAT

OK: Final = "ok"
EMPTY: Final = "empty"
FAILED: Final = "failed"

_CONFUSION = pa.list_(pa.struct([("label", pa.int16()), ("predicted", pa.int16()), ("px", pa.int64())]))
_BBOX = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])


def _required(name: str, kind: Any) -> Any:
    return pa.field(name, kind, nullable=False)


MASK_FIELDS: Final[tuple[Any, ...]] = (
    _required("scene_id", pa.string()),
    pa.field("uri", pa.string()),
    pa.field("version", pa.string()),
    _required("part", pa.int32()),
    _required("unit", pa.int32()),
    _required("row_off", pa.int32()),
    _required("col_off", pa.int32()),
    _required("height", pa.int32()),
    _required("width", pa.int32()),
    pa.field("scene_height", pa.int32()),
    pa.field("scene_width", pa.int32()),
    pa.field("datetime", pa.string()),
    pa.field("crs", pa.string()),
    pa.field("transform", pa.list_(pa.float64())),
    pa.field("geometry", pa.binary()),
    pa.field("bbox", _BBOX),
    pa.field("mask", pa.binary()),
    pa.field("valid_px", pa.int64()),
    pa.field("class_px", pa.list_(pa.int64())),
    pa.field("label_uri", pa.string()),
    pa.field("label_px", pa.int64()),
    pa.field("compared_px", pa.int64()),
    pa.field("confusion", _CONFUSION),
    _required("status", pa.string()),
    pa.field("error_kind", pa.string()),
    pa.field("error", pa.string()),
)

MASK_SCHEMA: Final = pa.schema(MASK_FIELDS)

COUNT_COLUMNS: Final = tuple(field.name for field in MASK_FIELDS if field.name != "mask")
"""All columns of a mask row but the mask itself: what reports and checks read."""

INDEX_FIELDS: Final[tuple[Any, ...]] = (
    *(field for field in MASK_FIELDS if field.name != "mask"),
    pa.field("object", pa.string()),
    pa.field("object_bytes", pa.int64()),
)

PLAN_FIELDS: Final[tuple[Any, ...]] = (
    _required("scene_id", pa.string()),
    pa.field("uri", pa.string()),
    pa.field("version", pa.string()),
    pa.field("member", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
    pa.field("shard_members", pa.int64()),
    pa.field("label_uri", pa.string()),
    pa.field("label_offset", pa.int64()),
    pa.field("label_length", pa.int64()),
    pa.field("valid_uri", pa.string()),
    pa.field("height", pa.int32()),
    pa.field("width", pa.int32()),
    pa.field("num_bands", pa.int32()),
    pa.field("dtype", pa.string()),
    pa.field("driver", pa.string()),
    pa.field("bands", pa.list_(pa.int32())),
    pa.field("valid_source", pa.string()),
    pa.field("file_block_height", pa.int32()),
    pa.field("file_block_width", pa.int32()),
    pa.field("strips", pa.bool_()),
    pa.field("crs", pa.string()),
    pa.field("transform", pa.list_(pa.float64())),
    pa.field("pixel_m", pa.float64()),
    pa.field("datetime", pa.string()),
    pa.field("downsample", pa.int32()),
    pa.field("coarser_than_model", pa.bool_()),
    _required("first_unit", pa.int32()),
    _required("units", pa.int32()),
    pa.field("replaces_part", pa.int32()),
    pa.field("masks_part", pa.int32()),
    pa.field("masks_first_unit", pa.int32()),
    pa.field("masks_units", pa.int32()),
    pa.field("error_kind", pa.string()),
    pa.field("error", pa.string()),
)

PLAN_SCHEMA: Final = pa.schema(PLAN_FIELDS)
PLAN_COLUMNS: Final = frozenset(PLAN_SCHEMA.names)


def mask_schema(recipe_key: str, classes: Sequence[ClassInfo]) -> Any:
    """Return the schema of a mask object with the file metadata that makes it self-describing."""
    return _self_describing(MASK_FIELDS, recipe_key, classes)


def index_schema(recipe_key: str, classes: Sequence[ClassInfo]) -> Any:
    """Return the schema of an index: described as masks are, since footprints alone are what maps load."""
    return _self_describing(INDEX_FIELDS, recipe_key, classes)


def _self_describing(fields: Sequence[Any], recipe_key: str, classes: Sequence[ClassInfo]) -> Any:
    """Return a schema with file metadata.

    GeoParquet 1.1 (https://geoparquet.org/releases/v1.1.0/): ``geometry`` as WKB in OGC:CRS84 with a
    bbox covering. Hugging Face: the features of the dataset, so that ``mask`` opens as an image.
    """
    geo = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": ["Polygon", "MultiPolygon"],
                "covering": {"bbox": {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}},
            }
        },
    }
    features = {field.name: _feature(field.type) for field in fields}
    if "mask" in features:
        features["mask"] = {"_type": "Image"}
    metadata = {
        "segpipe.format": str(FORMAT),
        "segpipe.recipe_key": recipe_key,
        "segpipe.classes": json.dumps([info.model_dump(mode="json") for info in classes]),
        "geo": json.dumps(geo),
        "huggingface": json.dumps({"info": {"features": features}}),
    }
    return pa.schema(fields, metadata)


def _feature(kind: Any) -> Any:
    """Translate an Arrow type to the notation of Hugging Face ``datasets`` features."""
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type)}
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _feature(kind.field(i).type) for i in range(kind.num_fields)}
    return {"_type": "Value", "dtype": {"double": "float64"}.get(str(kind), str(kind))}
