"""What a worker does: read the samples of one shard, count them, put the shard create-only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from segpipe.datasets.layout import Layout, Sample, SampleRef
from segpipe.datasets.plan import ShardPlan
from segpipe.datasets.shards import ShardMeta, encode_shard, read_meta
from segpipe.datasets.statistics import Sums
from segpipe.errors import InputError, SceneError
from segpipe.rasters.scene_ids import scene_id_of
from segpipe.storage import Storage, open_storage
from segpipe.wording import counted


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to make; sent to a worker."""

    shard: ShardPlan
    layout: Layout
    output: str
    form: str


@dataclass(frozen=True, slots=True)
class Fault:
    """A sample or scene that cannot be used: what is wrong with it, and what to do, apart."""

    text: str
    fix: str


@dataclass(frozen=True, slots=True)
class ShardResult:
    """How a shard ended: with its meta, or not written, for its samples have faults or are of two kinds."""

    meta: ShardMeta | None
    faults: tuple[Fault, ...] = ()
    kinds: tuple[tuple[str, str, int], ...] = ()
    """(sample id, `image_kind`, number of images): of all, or of each image where the shard is not made."""
    skipped: bool = False


def make_shard(task: ShardTask) -> ShardResult:
    """Make one shard, unless it is there. Raises `InputError` where another shard has its name."""
    storage, shard = open_storage(task.output), task.shard
    if storage.stat(shard.key) is not None:
        return _made(shard, _adopted(storage, shard), skipped=True)
    sums, rows, faults = Sums(), list[tuple[SampleRef, Sample]](), list[Fault]()
    kinds: list[tuple[str, str, int]] = []
    with task.layout.reading() as read:
        for ref in shard.refs:
            try:
                sample = read(ref)
            except SceneError as error:
                faults.append(fault_of(ref, error))
                continue
            if sample is None:
                sums.dropped += 1
                continue
            kinds.append((ref.sample_id, image_kind(len(sample.pixels), str(sample.pixels.dtype)), 1))
            if kinds[-1][1] == kinds[0][1]:
                sums.add(sample, len(task.layout.classes))
            rows.append((ref, _without_pixels(sample)))
    if faults or len({kind for _, kind, _ in kinds}) > 1:
        return ShardResult(None, tuple(faults), tuple(kinds))
    bands, dtype = (rows[0][1].pixels.shape[0], str(rows[0][1].pixels.dtype)) if rows else (0, "")
    meta = ShardMeta(shard.content_key, bands, dtype, sums)
    if not storage.put_if_absent(shard.key, encode_shard(task.form, rows, meta, task.layout.classes)):
        return _made(shard, _adopted(storage, shard), skipped=True)
    return _made(shard, meta, skipped=False)


def _made(shard: ShardPlan, meta: ShardMeta, *, skipped: bool) -> ShardResult:
    kind = (shard.refs[0].sample_id, image_kind(meta.bands, meta.dtype), meta.sums.samples)
    return ShardResult(meta, kinds=(kind,) if meta.sums.samples else (), skipped=skipped)


def fault_of(ref: SampleRef, error: SceneError) -> Fault:
    """The fault of one sample; the file is named where the sample's id does not tell it."""
    scene = ref.scene
    follows = error.where == scene.where and scene_id_of(error.where).endswith(scene.scene_id)
    place = "" if follows or not error.where else f" ({error.where})"
    return Fault(f"{ref.sample_id} ({error.kind}): {error.what}{place}", error.fix)


def _adopted(storage: Storage, shard: ShardPlan) -> ShardMeta:
    meta = read_meta(storage, shard.key)
    if meta.content_key != shard.content_key:
        raise InputError(
            "the output holds a shard of other samples or another config",
            storage.uri(shard.key),
            "Choose another --output, or remove the old data set.",
        )
    return meta


def image_kind(bands: int, dtype: str) -> str:
    """``3 bands of uint8``: what all images of a data set have in common."""
    return f"{counted(bands, 'band')} of {dtype}"


def of_another_kind(images: Sequence[tuple[str, str, int]]) -> list[Fault]:
    """A fault for each (sample id, kind, number of images) whose kind is not that of most images."""
    counts = Counter[str]()
    for _, kind, number in images:
        counts[kind] += number
    usual = max(counts, key=counts.__getitem__, default="")
    return [
        Fault(f"{sample_id} (bands): {kind}, most others have {usual}", "Convert the images to one kind.")
        for sample_id, kind, _ in images
        if kind != usual
    ]


def _without_pixels(sample: Sample) -> Sample:
    """The sample with an empty array for its pixels: a shard's decoded images need not fit in memory."""
    return replace(sample, pixels=sample.pixels[:, :0, :0].copy(), valid=None)
