"""Reads groups of encoded samples from shards, by range reads of just those bytes."""

from __future__ import annotations

import json
import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.datasets.prepared import GroupRef, PreparedDataset
from segpipe.datasets.shards import ROW_GROUP_SAMPLES
from segpipe.errors import InputError, ObjectMissing, first_line
from segpipe.storage import open_storage
from segpipe.wording import counted

_COLUMNS: Final = ["sample_id", "image", "label"]
_KEPT_FOOTERS: Final = 64
REPLACE_SHARD: Final = "Delete the shard and run the same `segpipe prepare` again."


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample as it lies in its shard."""

    sample_id: str
    image: bytes
    label: bytes
    """An 8-bit PNG of class indices, 255 = ignored."""


@dataclass(frozen=True, slots=True)
class _Shard:
    """What is kept of an opened shard: a Parquet footer, or where the members of a tar lie."""

    etag: str
    size_bytes: int
    footer: Any = None
    members: tuple[tuple[str, dict[str, tuple[int, int]]], ...] = ()
    """(sample id, {"image" or "label": (start, length)}) in order."""


class GroupReader:
    """Reads groups from the shards of one data set; safe to use from several threads.

    Keeps the footers of some shards and no pixels, so its memory does not grow with their number.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        self._storage = open_storage(dataset.uri)
        self._samples = {shard.key: shard.samples for shard in dataset.shards}
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, group: GroupRef) -> list[EncodedSample]:
        """All samples of a group. Raises `InputError` that names the shard where it is damaged or another."""
        key = group.shard_key
        try:
            shard = self._open(key)
            samples = self._tar(key, shard, group) if key.endswith(".tar") else self._rows(key, shard, group)
        except ObjectMissing as error:
            raise InputError("the shard is gone", self._storage.uri(key), REPLACE_SHARD) from error
        except (
            pa.ArrowInvalid,
            pa.ArrowNotImplementedError,
            tarfile.TarError,
            KeyError,
            ValueError,
        ) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the shard is cut short or damaged ({first_line(error)})",
                self._storage.uri(key),
                REPLACE_SHARD,
            ) from error
        except OSError as error:
            if type(error) is OSError:  # what Arrow raises for pages that cannot be unpacked
                raise InputError(
                    f"the shard is damaged ({first_line(error)})", self._storage.uri(key), REPLACE_SHARD
                ) from error
            raise
        if len(samples) != group.samples:
            raise self._wrong_count(key, f"group {group.index} holds {len(samples)} of {group.samples}")
        return samples

    def _open(self, key: str) -> _Shard:
        with self._lock:
            found = self._shards.get(key)
            if found is not None:
                self._shards.move_to_end(key)
                return found
        shard = self._load(key)
        with self._lock:
            self._shards[key] = shard
            if len(self._shards) > _KEPT_FOOTERS:
                self._shards.popitem(last=False)
        return shard

    def _load(self, key: str) -> _Shard:
        info = self._storage.stat(key)
        if info is None:
            raise ObjectMissing("the shard is gone", self._storage.uri(key))
        with self._storage.open_range(key, info.etag, info.size_bytes) as file:
            if key.endswith(".tar"):
                members = _tar_members(file)
                count, shard = len(members), _Shard(info.etag, info.size_bytes, members=members)
            else:
                footer = pq.read_metadata(file)
                count, shard = footer.num_rows, _Shard(info.etag, info.size_bytes, footer=footer)
        if count != self._samples[key]:
            raise self._wrong_count(
                key, f"it holds {counted(count, 'sample')} where dataset.json says {self._samples[key]}"
            )
        return shard

    def _rows(self, key: str, shard: _Shard, group: GroupRef) -> list[EncodedSample]:
        with self._storage.open_range(key, shard.etag, shard.size_bytes) as file:
            # Arrow's own read-ahead joins the columns of a group into few requests.
            parquet = pq.ParquetFile(
                file, metadata=shard.footer, pre_buffer=True, page_checksum_verification=True
            )
            table = parquet.read_row_group(group.index, columns=_COLUMNS, use_threads=False)
        columns = [table.column(name).to_pylist() for name in _COLUMNS]
        return [EncodedSample(*row) for row in zip(*columns, strict=True)]

    def _tar(self, key: str, shard: _Shard, group: GroupRef) -> list[EncodedSample]:
        start = group.index * ROW_GROUP_SAMPLES
        members = shard.members[start : start + group.samples]
        first = min(begin for _, parts in members for begin, _ in parts.values())
        last = max(begin + length for _, parts in members for begin, length in parts.values())
        data = self._storage.read_range(key, first, last - first, shard.etag)
        if len(data) != last - first:
            raise ValueError("the file ends within a member")
        return [
            EncodedSample(
                sample_id,
                *(
                    data[begin - first : begin - first + length]
                    for begin, length in (parts["image"], parts["label"])
                ),
            )
            for sample_id, parts in members
        ]

    def _wrong_count(self, key: str, what: str) -> InputError:
        return InputError(what, self._storage.uri(key), REPLACE_SHARD)


def _tar_members(file: Any) -> tuple[tuple[str, dict[str, tuple[int, int]]], ...]:
    """Where image and label of each sample lie; the id is in the JSON member, which comes last."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    names: dict[str, str] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            parts = found.setdefault(folder + slash + stem, {})
            if extension == "json":
                handle = tar.extractfile(member)
                names[folder + slash + stem] = json.loads(handle.read() if handle else b"{}")["sample_id"]
            else:
                kind = "label" if extension == "label.png" else "image"
                parts[kind] = (member.offset_data, member.size)
    return tuple((names[stem], parts) for stem, parts in found.items() if parts["image"] and parts["label"])
