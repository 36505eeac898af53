"""Shards as bytes: Parquet rows in groups of 16, or WebDataset tar members; both say what is in them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.config.card import ClassInfo
from segpipe.datasets.layout import Sample, SampleRef
from segpipe.datasets.plan import FORMAT
from segpipe.datasets.statistics import Sums
from segpipe.errors import InputError
from segpipe.masks.codec import encode_mask
from segpipe.masks.write import window_columns
from segpipe.storage import Storage

ROW_GROUP_SAMPLES: Final = 16

_WINDOW = pa.struct([(name, pa.int32()) for name in ("row_off", "col_off", "height", "width")])
SHARD_SCHEMA: Final = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.binary(), nullable=False),
        pa.field("scene_id", pa.string(), nullable=False),
        pa.field("window", _WINDOW),
        pa.field("crs", pa.string()),
        pa.field("transform", pa.list_(pa.float64())),
        pa.field("version", pa.string()),
    ]
)
_FEATURES: Final = {
    **{name: {"_type": "Value", "dtype": "string"} for name in ("sample_id", "split", "scene_id", "crs")},
    "image": {"_type": "Image"},
    "label": {"_type": "Image"},
    "window": {name.name: {"_type": "Value", "dtype": "int32"} for name in _WINDOW},
    "transform": {"_type": "List", "feature": {"_type": "Value", "dtype": "float64"}},
    "version": {"_type": "Value", "dtype": "string"},
}
_META: Final = "SEGPIPE.shard"


@dataclass(frozen=True, slots=True)
class ShardMeta:
    """What a shard says about itself: enough to make dataset.json without reading its samples again."""

    content_key: str
    bands: int
    dtype: str
    """Bands and pixel type of all its images; 0 and "" for a shard without samples."""
    sums: Sums

    def to_text(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> ShardMeta:
        tree = json.loads(text)
        return cls(tree["content_key"], tree["bands"], tree["dtype"], Sums(**tree["sums"]))


def encode_shard(
    form: str, rows: Sequence[tuple[SampleRef, Sample]], meta: ShardMeta, classes: Sequence[ClassInfo]
) -> bytes:
    """The bytes of a shard; the same samples always give the same bytes."""
    return _encode_tar(rows, meta) if form == "tar" else _encode_parquet(rows, meta, classes)


def read_meta(storage: Storage, key: str) -> ShardMeta:
    """What a shard in storage says about itself. Raises `InputError` where it is none of ours."""
    try:
        with storage.open_range(key) as file:
            if key.endswith(".tar"):
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    tar.next()
                    return ShardMeta.from_text(tar.pax_headers[_META])
            metadata = pq.ParquetFile(file).metadata.metadata
            return ShardMeta.from_text(metadata[_META.encode()].decode())
    except (pa.ArrowInvalid, tarfile.TarError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"it is no shard made by segpipe prepare ({type(error).__name__})",
            storage.uri(key),
            "Choose another --output.",
        ) from error


def _row(ref: SampleRef, sample: Sample) -> dict[str, Any]:
    return {
        "sample_id": ref.sample_id,
        "split": ref.split,
        "scene_id": ref.scene.scene_id,
        "window": window_columns(sample.window),
        "crs": sample.crs,
        "transform": None if sample.transform is None else list(sample.transform),
        "version": ref.scene.version_text,
    }


def _encode_parquet(
    rows: Sequence[tuple[SampleRef, Sample]], meta: ShardMeta, classes: Sequence[ClassInfo]
) -> bytes:
    sink = pa.BufferOutputStream()
    metadata = {
        _META: meta.to_text(),
        "segpipe.classes": json.dumps([info.model_dump(mode="json") for info in classes]),
        "huggingface": json.dumps({"info": {"features": _FEATURES}}),
    }
    writer = pq.ParquetWriter(
        sink,
        SHARD_SCHEMA,
        version="2.6",
        compression=dict.fromkeys(("sample_id", "split", "scene_id", "crs", "version"), "ZSTD"),
        use_dictionary=False,
        write_statistics=["sample_id", "split"],
        write_page_checksum=True,
        store_schema=False,
    )
    with writer:
        writer.add_key_value_metadata(metadata)
        for start in range(0, len(rows), ROW_GROUP_SAMPLES):
            group = [
                {**_row(ref, sample), "image": sample.image, "label": encode_mask(sample.label)}
                for ref, sample in rows[start : start + ROW_GROUP_SAMPLES]
            ]
            writer.write_table(pa.Table.from_pylist(group, schema=SHARD_SCHEMA))
    return sink.getvalue().to_pybytes()


def _encode_tar(rows: Sequence[tuple[SampleRef, Sample]], meta: ShardMeta) -> bytes:
    """KEY.png (or jpg, webp, tif), KEY.label.png and KEY.json; what the shard says is a global PAX header."""
    sink = io.BytesIO()
    headers = {_META: meta.to_text()}
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for ref, sample in rows:
            folder, slash, name = ref.sample_id.rpartition("/")
            # a key ends at its first dot
            stem = folder + slash + name.replace("%", "%25").replace(".", "%2E")
            members = {
                sample.suffix: sample.image,
                "label.png": encode_mask(sample.label),
                "json": json.dumps(_row(ref, sample), sort_keys=True).encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()
