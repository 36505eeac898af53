"""Image shards: WebDataset tars and Parquet files of encoded images."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from segpipe.config.model import InputConfig
from segpipe.errors import InputError, SceneError, StorageError
from segpipe.rasters import parquet_shards
from segpipe.rasters.catalogue import list_scenes
from segpipe.rasters.scene import SceneSource, Version
from segpipe.rasters.shards import MAX_MEMBER_BYTES, read_label_member, read_member
from segpipe.storage.local import LocalStorage


def tar_bytes(members: Sequence[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE, **info: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size, header.type = len(data), kind
            for key, value in info.items():
                setattr(header, key, value)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def scenes(path: Path, **config: Any) -> list[SceneSource]:
    with list_scenes(InputConfig(scenes=(str(path),), **config), None, need_labels=False) as found:
        return [source for page in found.pages() for source, _ in page]


def fault(path: Path, **config: Any) -> str:
    with pytest.raises(InputError) as caught:
        scenes(path, **config)
    return str(caught.value)


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.write_bytes(tar_bytes(members))
    return path


def write_parquet(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(dict(columns)), path, **options)
    return path


# Tar


def test_tar_members_are_grouped_by_key_and_read_in_place(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        ("./b/0002.json", b"{}"),
        ("./b/0002.jpg", b"JPEG two"),
        ("./b/0002.mask.png", b"label two"),
        ("a/0001.label.png", b"label one"),
        ("a/0001.PNG", b"PNG one"),
        ("a/0001.cls", b"7"),
        ("a/._0001.png", b"a desktop's litter"),
        ("readme.txt", b"text"),
        ("c/0003.webp", b"WebP three"),
    )
    found = scenes(path)
    assert [source.scene_id for source in found] == ["s/b/0002", "s/a/0001", "s/c/0003"]  # the shard's order
    assert [source.member for source in found] == ["./b/0002.jpg", "a/0001.PNG", "c/0003.webp"]
    assert [read_member(source) for source in found] == [b"JPEG two", b"PNG one", b"WebP three"]
    assert [read_label_member(source) for source in found] == [b"label two", b"label one", None]
    assert {source.shard_members for source in found} == {3}
    assert [source.label_uri for source in found] == [str(path), str(path), None]
    assert found[0].label_version == found[0].version
    assert os.listdir(tmp_path) == ["s.tar"]


def test_long_and_odd_member_names_survive(tmp_path: Path) -> None:
    name = "/".join(["deep" * 12] * 5) + "/größe 1.png"
    found = scenes(write_tar(tmp_path / "s.tar", (name, b"x")))
    assert found[0].scene_id == f"s/{name[:-4]}"
    assert read_member(found[0]) == b"x"


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png"])
def test_member_names_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    message = fault(write_tar(tmp_path / "s.tar", ("ok.png", b"x"), (name, b"x")))
    assert "climbs out" in message
    assert name in message
    assert "s.tar" in message


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes([("x.png", b"")], kind, linkname="/etc/passwd"))
    assert "'x.png' is a link, a device" in fault(path)


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tar_bytes([("a.png", b"x" * 700), ("b.png", b"y" * 100)])
    end = 512 + 1024 + 512 + 512  # headers and padded contents; the end mark follows
    path = tmp_path / "s.tar"
    for cut in (0, 1, 511, 512, 600, 1536, 1537, 2000, 2048, 2100, end):
        path.write_bytes(whole[:cut])
        assert "s.tar" in fault(path), cut
    path.write_bytes(whole[: end + 512])
    assert len(scenes(path)) == 2


def test_a_damaged_header_in_the_middle_is_refused_and_not_taken_for_the_end(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes([("a.png", b"x"), ("b.png", b"y")]))
    whole[1024:1030] = b"\xff" * 6
    path = tmp_path / "s.tar"
    path.write_bytes(whole)
    assert "cut short or damaged" in fault(path)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", b"x"), ("a.jpg", b"x")], "two images with one key: 'a.png' and 'a.jpg'"),
        ([("a.png", b"x"), ("a.mask.png", b"x"), ("a.seg.png", b"x")], "two labels with one key"),
        ([("a.mask.png", b"x")], "'a.mask.png' has no image"),
        ([("a.v2.png", b"x")], "'a.v2.png' has no image"),
        ([("a.txt", b"x")], "holds no image"),
        ([("a.png", b"x"), ("b.png", b"x"), ("a.png", b"x")], "two scenes with one id: 's/a'"),
    ],
)
def test_tars_that_do_not_say_what_the_images_are_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    assert reason in fault(write_tar(tmp_path / "s.tar", *members))


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    assert "no valid tar" in fault(path)


def test_a_shard_that_changed_is_scene_changed_and_one_that_is_gone_not_found(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", ("a.png", b"one"), ("a.label.png", b"1"))
    (source,) = scenes(path)
    write_tar(path, ("a.png", b"twotwo"))
    for read in (read_member, read_label_member):
        with pytest.raises(SceneError) as caught:
            read(source)
        assert caught.value.kind == "scene_changed"
    path.unlink()
    with pytest.raises(SceneError) as caught:
        read_member(source)
    assert caught.value.kind == "not_found"
    with pytest.raises(SceneError) as caught:
        read_label_member(source)
    assert caught.value.kind == "label_read"


# Parquet


def test_parquet_rows_are_scenes_called_by_row_number(tmp_path: Path) -> None:
    images = [f"image {row}".encode() for row in range(10)]
    path = write_parquet(tmp_path / "p.parquet", {"image": images, "label": [0] * 10}, row_group_size=4)
    found = scenes(path)
    assert [source.scene_id for source in found] == [f"p/{row:08d}" for row in range(10)]
    assert {source.shard_members for source in found} == {10}
    assert [read_member(source) for source in found] == images
    assert [read_member(source) for source in reversed(found)] == images[::-1]
    assert {source.label_uri for source in found} == {None}  # whole numbers are no label images
    assert read_label_member(found[0]) is None


@pytest.mark.parametrize("column", ["sample_id", "scene_id", "__key__", "key"])
def test_parquet_rows_are_called_by_their_id_column_and_keep_their_order(tmp_path: Path, column: str) -> None:
    keys = [f"k/{row}" for row in (3, 1, 2)]
    path = write_parquet(tmp_path / "p.parquet", {column: keys, "jpg": [b"3", b"1", b"2"]})
    found = scenes(path)
    assert [source.scene_id for source in found] == ["p/k/3", "p/k/1", "p/k/2"]
    assert [read_member(source) for source in found] == [b"3", b"1", b"2"]


def test_images_and_labels_as_structs_with_bytes_are_read(tmp_path: Path) -> None:
    images = [{"bytes": bytes([row]) * 3, "path": f"{row}.png"} for row in range(40)]
    labels = [None if row % 3 == 0 else {"bytes": b"L%d" % row, "path": None} for row in range(40)]
    path = write_parquet(tmp_path / "p.parquet", {"image": images, "label": labels}, row_group_size=7)
    found = scenes(path)
    assert [read_member(source) for source in found] == [image["bytes"] for image in images]
    assert [source.label_uri is not None for source in found] == [row % 3 != 0 for row in range(40)]
    assert [read_label_member(source) for source in found] == [label and label["bytes"] for label in labels]


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_without_label_have_no_counts(tmp_path: Path, statistics: bool) -> None:
    labels = [b"l0", None, b"l2", b"l3", None, None]
    columns = {"image": [b"x"] * 6, "label": pa.array(labels, pa.binary())}
    path = write_parquet(tmp_path / "p.parquet", columns, row_group_size=2, write_statistics=statistics)
    assert [read_label_member(source) for source in scenes(path)] == labels


def test_the_row_count_is_held_against_the_plan(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"image": [b"a", b"b"]})
    first, _ = scenes(path)
    forged = SceneSource(**{name: getattr(first, name) for name in first.__slots__} | {"shard_members": 3})
    for source in (forged, SceneSource("x", first.uri, first.version, member="5", shard_members=2)):
        with pytest.raises(SceneError) as caught:
            read_member(source)
        assert caught.value.kind == "shard_count"


def test_reading_a_row_group_in_order_decodes_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [os.urandom(50) for _ in range(100)]
    found = scenes(write_parquet(tmp_path / "p.parquet", {"image": images}, row_group_size=50))
    started: list[int] = []
    batches = parquet_shards._batches
    monkeypatch.setattr(
        parquet_shards,
        "_batches",
        lambda file, group, path, where: (started.append(group), batches(file, group, path, where))[1],
    )
    assert [read_member(source) for source in found] == images
    assert started == [0, 1]


def test_a_dictionary_bomb_never_unfolds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of 1 MB in 4,000 rows: 4 GB unfolded, a tiny file."""
    monkeypatch.setattr(parquet_shards, "MAX_GROUP_BYTES", 3 << 20)
    value = bytes(1 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array([value]))
    path = write_parquet(tmp_path / "p.parquet", {"image": column}, store_schema=False)
    assert path.stat().st_size < 100_000
    found = scenes(path)
    before = pa.default_memory_pool().max_memory()
    assert read_member(found[100]) == value
    assert pa.default_memory_pool().max_memory() - before < 20 << 20


def test_a_row_group_over_the_limit_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"image": [os.urandom(5000)]})
    (source,) = scenes(path)
    monkeypatch.setattr(parquet_shards, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(SceneError, match="smaller row groups") as caught:
        read_member(source)
    assert caught.value.kind == "limit"


def test_damaged_pages_are_a_decode_fault_and_do_not_spoil_the_next_read(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "p.parquet", {"image": [b"a" * 5000, b"b" * 5000]}, row_group_size=1, compression="zstd"
    )
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[4:40] = b"\xff" * 36
    path.write_bytes(damaged)
    broken, fine = scenes(path)
    with pytest.raises(SceneError) as caught:
        read_member(broken)
    assert caught.value.kind == "decode"
    assert read_member(fine) == b"b" * 5000


def test_an_empty_cell_is_a_decode_fault(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"image": pa.array([b"a", None], pa.binary())})
    assert read_member(scenes(path)[0]) == b"a"
    with pytest.raises(SceneError, match="no image") as caught:
        read_member(scenes(path)[1])
    assert caught.value.kind == "decode"


def test_storage_faults_pass_through_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"image": [b"a"]})
    (source,) = scenes(path)
    tar = write_tar(tmp_path / "t.tar", ("a.png", b"x"))
    (member,) = scenes(tar)

    def fail(*_: object, **__: object) -> None:
        raise StorageError("storage failed 8 times", "s3://b")

    monkeypatch.setattr(LocalStorage, "open_range", fail)
    monkeypatch.setattr(LocalStorage, "read_range", fail)
    for each in (source, member):
        with pytest.raises(StorageError, match="8 times"):
            read_member(each)


def test_a_fault_in_the_middle_of_a_parquet_read_keeps_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"image": [os.urandom(100_000)]})
    (source,) = scenes(path)

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() < 60_000:
                raise StorageError("storage failed 8 times", "s3://b")
            return super().read(size)

    monkeypatch.setattr(LocalStorage, "open_range", lambda *_, **__: Failing(path.read_bytes()))
    with pytest.raises(StorageError, match="8 times"):
        read_member(source)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"picture": [b"x"]}, "no column of encoded images (image, img, png, jpg, bytes"),
        ({"image": ["text"]}, "found: image (string)"),
        ({"image": [b"x"], "key": [None]}, "'key' holds None"),
        ({"image": [b"x", b"y"], "key": ["k", "k"]}, "two scenes with one id: 'p/k'"),
        ({"image": [b"x"], "key": ["../../etc"]}, "climbs out"),
        ({"image": pa.array([], pa.binary())}, "holds no row"),
    ],
)
def test_parquet_files_that_are_no_shards_are_refused(
    tmp_path: Path, columns: Mapping[str, Any], reason: str
) -> None:
    message = fault(write_parquet(tmp_path / "p.parquet", columns))
    assert reason in message
    assert "p.parquet" in message


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -100])
def test_a_parquet_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"image": [os.urandom(1000)]})
    path.write_bytes(path.read_bytes()[:keep])
    assert "no valid Parquet file" in fault(path)


# Among other scenes


def test_shards_in_a_folder_stand_beside_plain_scenes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "sub" / "t.tar", ("b.png", b"1"), ("a.png", b"2"))
    write_parquet(tmp_path / "p.parquet", {"image": [b"x", b"y"]})
    (tmp_path / "q.tif").write_bytes(b"x")
    found = [source.scene_id for source in scenes(tmp_path)]
    assert found == ["p/00000000", "p/00000001", "q", "sub/t/b", "sub/t/a"]


def test_include_and_exclude_pick_members_and_whole_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", ("a.png", b"1"), ("b.png", b"2"))
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    found = scenes(tmp_path, exclude=("bad", "*/b"))
    assert [source.scene_id for source in found] == ["t/a"]
    assert found[0].shard_members == 2
    assert [source.scene_id for source in scenes(tmp_path, include=("t/b",), exclude=("bad",))] == ["t/b"]


def test_label_templates_fill_in_for_members_without_label(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", ("x/a.png", b"1"), ("x/b.png", b"2"), ("x/b.label.png", b"own"))
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "a.png").write_bytes(b"other")
    first, second = scenes(path, labels="{parent}/truth/{stem}.png")
    assert first.label_uri == f"{tmp_path}/truth/a.png"
    assert read_label_member(first) is None
    assert read_label_member(second) == b"own"


def test_a_catalogue_may_name_shards_and_its_columns_reach_every_member(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", ("a.png", b"1"), ("b.png", b"2"))
    (tmp_path / "cat.csv").write_text("uri,scene_id,datetime,city\nt.tar,north,2024-05-01,Kampala\n")
    found = scenes(tmp_path / "cat.csv")
    assert [source.scene_id for source in found] == ["north/a", "north/b"]
    assert [source.extra for source in found] == [{"city": "Kampala"}] * 2
    assert found[0].datetime == "2024-05-01"
    (tmp_path / "cat.csv").write_text("uri,label\nt.tar,x.png\n")
    assert "row 1" in fault(tmp_path / "cat.csv")


def test_a_catalogue_among_the_scenes_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"x")
    write_parquet(tmp_path / "cat.parquet", {"uri": ["a.tif"]})
    assert "cat.parquet: a catalogue" in fault(tmp_path)
    assert [source.scene_id for source in scenes(tmp_path, exclude=("cat",))] == ["a"]
    assert [source.scene_id for source in scenes(tmp_path / "cat.parquet")] == ["a"]


def test_a_member_beyond_the_limit_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "big.tar"
    path.write_bytes(b"x" * 512)
    version = Version(512, f"200-{path.stat().st_mtime_ns:x}")
    source = SceneSource("big", str(path), version, member="a.png", offset=512, length=MAX_MEMBER_BYTES + 1)
    with pytest.raises(SceneError) as caught:
        read_member(source)
    assert caught.value.kind == "limit"
