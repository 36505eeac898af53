from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CLASSES, tiny_dataset

from segpipe.config.train import AugmentConfig, DataConfig
from segpipe.datasets.batches import BatchStream, ImageSlice, TrainBatch
from segpipe.datasets.groups import EncodedSample, GroupReader
from segpipe.datasets.prepared import GroupRef, open_dataset
from segpipe.errors import InputError


def stream(uri: str, rank: int = 0, world: int = 1, first: int = 0, stop: int = 6) -> list[TrainBatch]:
    config = DataConfig(uri=uri, augment=AugmentConfig(crop_px=32), prefetch_batches=2)
    with BatchStream(
        open_dataset(uri),
        config,
        seed=11,
        global_batch=4,
        rank=rank,
        world=world,
        first_step=first,
        stop_step=stop,
        threads=2,
    ) as batches:
        return list(batches)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_dataset(tmp_path_factory.mktemp("data"), samples=24)


def test_a_data_set_says_what_it_holds(uri: str) -> None:
    dataset = open_dataset(uri)
    assert dataset.classes == CLASSES
    assert (dataset.bands, dataset.dtype, dataset.splits) == (3, "uint8", ("train", "val"))
    assert dataset.num_samples(["train"]) == 18
    assert [group.samples for group in dataset.groups(["train"])] == [16, 2]
    assert sum(dataset.split_class_px(["val"])) < 6 * 64 * 66


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_both_shard_formats_give_the_same_samples(uri: str, tmp_path: Path, form: str) -> None:
    other = tiny_dataset(tmp_path, samples=24, form=form)
    for one, two in zip(stream(uri), stream(other), strict=True):
        assert one.sample_ids == two.sample_ids
        assert torch.equal(one.images, two.images)


def test_two_workers_see_what_one_sees(uri: str) -> None:
    whole = stream(uri)
    for batch, parts in zip(whole, zip(stream(uri, 0, 2), stream(uri, 1, 2), strict=True), strict=True):
        for part in parts:
            assert [batch.sample_ids[lane] for lane in part.lanes] == list(part.sample_ids)
            assert torch.equal(batch.images[list(part.lanes)], part.images)
            assert torch.equal(batch.labels[list(part.lanes)], part.labels)


@pytest.mark.parametrize("cache_bytes", [40_000, 10**9])
def test_kept_samples_change_nothing_and_are_decoded_once(
    uri: str, monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    from segpipe.datasets import batches

    plain, decoded = batches.decode_sample, list[str]()
    config = DataConfig(uri=uri, augment=AugmentConfig(crop_px=32), cache_bytes=cache_bytes)

    def counted(sample: EncodedSample, *rest: object) -> object:
        decoded.append(sample.sample_id)
        return plain(sample, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batches, "decode_sample", counted)
    places = {"seed": 11, "global_batch": 4, "rank": 0, "world": 1, "first_step": 0, "stop_step": 15}
    with BatchStream(open_dataset(uri), config, threads=1, **places) as kept:  # type: ignore[arg-type]
        found = list(kept)
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, stream(uri, stop=15), strict=True))
    again = len(decoded) - 15 * 4  # of the comparison, which keeps none
    assert again == 18 if cache_bytes > 10**6 else 18 < again < 60


def test_a_stream_goes_on_at_any_step(uri: str) -> None:
    whole = stream(uri, stop=12)
    later = stream(uri, first=7, stop=12)
    assert [batch.step for batch in later] == [7, 8, 9, 10, 11]
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[7:], later, strict=True))
    assert [batch.epoch for batch in whole] == [0] * 5 + [1] * 5 + [2] * 2


def test_the_fill_of_a_short_batch_counts_for_nothing(uri: str) -> None:
    last = stream(uri)[4]
    assert last.real.tolist() == [True, True, False, False]
    assert (last.labels[2:] == 255).all()
    assert (last.labels[:2] != 255).any()


def test_images_are_normalised(uri: str) -> None:
    config = DataConfig(uri=uri, augment=AugmentConfig(crop_px=64, preset="none"))
    with BatchStream(
        open_dataset(uri),
        config,
        seed=1,
        global_batch=18,
        rank=0,
        world=1,
        first_step=0,
        stop_step=1,
        threads=2,
    ) as batches:
        images = next(iter(batches)).images
    assert images.mean().abs() < 0.1
    assert (images.std() - 1).abs() < 0.1


@pytest.mark.parametrize("world", [1, 2, 3, 5, 9])
def test_every_image_falls_to_one_worker(uri: str, world: int) -> None:
    dataset = open_dataset(uri)
    found = [name for rank in range(world) for name, _ in ImageSlice(dataset, ("val",), rank, world)]
    assert sorted(found) == [f"{number:03d}" for number in range(0, 24, 4)]
    name, (pixels, _, label) = next(iter(ImageSlice(dataset, ("val",), 0, 1)))
    assert (name, pixels.shape[1:]) == ("000", label.shape)


def damage(folder: Path, change: str) -> None:
    shard = min(folder.glob("prepared/shards/*"))  # the training samples come first
    data = shard.read_bytes()
    if change == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif change == "gone":
        shard.unlink()
    else:
        at = data.index(b"IDAT") + 40
        shard.write_bytes(data[:at] + bytes(40) + data[at + 40 :])


@pytest.mark.parametrize("form", ["parquet", "tar"])
@pytest.mark.parametrize(
    ("change", "reason"), [("cut", "cut short|holds"), ("gone", "gone"), ("bits", "damaged|cannot be")]
)
def test_a_damaged_shard_is_named(tmp_path: Path, form: str, change: str, reason: str) -> None:
    uri = tiny_dataset(tmp_path, samples=8, form=form)
    damage(tmp_path, change)
    with pytest.raises(InputError, match=reason) as raised:
        stream(uri)
    assert "part-00000" in raised.value.where
    assert raised.value.fix


def test_a_shard_of_another_count_is_named(tmp_path: Path) -> None:
    uri = tiny_dataset(tmp_path, samples=8)
    path = tmp_path / "prepared/dataset.json"
    path.write_text(path.read_text().replace('"samples": 6', '"samples": 7'))
    dataset = open_dataset(uri)
    with pytest.raises(InputError, match=r"holds 6 samples where dataset\.json says 7"):
        GroupReader(dataset).read(dataset.groups(["train"])[0])


def test_a_folder_without_dataset_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no dataset\.json"):
        open_dataset(str(tmp_path))


def test_a_label_without_class_is_named(uri: str) -> None:
    import dataclasses

    from segpipe.datasets.batches import decode_sample

    dataset = open_dataset(uri)
    sample = GroupReader(dataset).read(dataset.groups(["train"])[0])[0]
    few = dataclasses.replace(dataset, classes=dataset.classes[:1])
    with pytest.raises(InputError, match="holds the value 2, the data set has classes 0 to 0"):
        decode_sample(sample, few, "shard: sample 1")
    assert np.unique(decode_sample(sample, dataset, "").label).tolist() == [0, 1, 2, 255]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Shard and number of each group that is read, as it is read."""
    found: list[tuple[str, int]] = []
    plain = GroupReader.read

    def noted(self: GroupReader, group: GroupRef) -> list[EncodedSample]:
        found.append((group.shard_key, group.index))
        return plain(self, group)

    monkeypatch.setattr(GroupReader, "read", noted)
    return found


def test_a_group_is_read_once_an_epoch(uri: str, read: list[tuple[str, int]]) -> None:
    assert len(list(ImageSlice(open_dataset(uri), ("train",), 0, 1))) == 18
    assert [index for _, index in read] == [0, 1]
    read.clear()
    stream(uri, stop=5)
    assert sorted(index for _, index in read) == [0, 1]


def test_a_worker_reads_only_what_its_lanes_need(tmp_path: Path, read: list[tuple[str, int]]) -> None:
    uri = tiny_dataset(tmp_path, samples=32, shard_samples=1)
    reads = []
    for rank in range(4):
        read.clear()
        batches = stream(uri, rank=rank, world=4, stop=6)
        assert sum(len(batch.sample_ids) for batch in batches) == 6
        assert len(read) == len(set(read)) == 6, "a shard a sample: one for each of the worker's six"
        reads += read
    assert len(reads) == len(set(reads)) == 24
