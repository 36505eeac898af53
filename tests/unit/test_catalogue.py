"""From inputs to scenes: what is found, which version it has, and which labels and masks belong to it."""

from __future__ import annotations

import io
import tarfile
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scene_inputs import fault, ids, put, scenes

from segpipe.config.model import InputConfig
from segpipe.errors import ConfigError, InputError
from segpipe.rasters import versions
from segpipe.rasters.catalogue import list_scenes
from segpipe.rasters.scene import Version
from segpipe.rasters.shards import read_label_member, read_member
from segpipe.rasters.templates import parse_template
from segpipe.storage import open_storage

RUN = b'{"recipe_key": "0"}'

# What an input means


def test_a_folder_means_every_raster_and_no_sidecar_below_it(root: str) -> None:
    wanted = ["a.tif", "b.TIFF", "c.png", "d/e.jpg", "d/f.JPEG", "d/g.h/i.webp"]
    others = ["a.tif.aux.xml", "a.tif.msk", "a.tif.ovr", "a.tfw", "notes.txt", ".hidden.tif", ".cache/x.tif"]
    put(root, *wanted, *others)
    assert ids(root) == ids(root + "/") == ["a", "b", "c", "d/e", "d/f", "d/g.h/i"]


def test_ids_are_paths_below_the_folder_and_do_not_change_when_the_archive_grows(root: str) -> None:
    put(root, "2024/north/a.tif")
    before = ids(f"{root}/2024/*/*.tif")
    put(root, "2024/south/b.tif", "2024/north/c.tif")
    assert before == ["north/a"]
    assert ids(f"{root}/2024/*/*.tif") == ["north/a", "north/c", "south/b"]


def test_a_single_file_is_called_by_its_name(root: str) -> None:
    put(root, "deep/in/a.b.tif", "deep/in/[x].tif")
    assert ids(f"{root}/deep/in/a.b.tif") == ["a.b"]
    assert ids(f"{root}/deep/in/[x].tif") == ["[x]"]


def test_globs_stay_within_a_folder_unless_doubled(root: str) -> None:
    put(root, "a1.tif", "a2.tif", "ab.png", "s/a3.tif", "s/t/a4.tif", "s/t/b.tif")
    assert ids(f"{root}/a*.tif") == ["a1", "a2"]
    assert ids(f"{root}/a?.*") == ["a1", "a2", "ab"]
    assert ids(f"{root}/a[!1b].*") == ["a2"]
    assert ids(f"{root}/**/a*.tif") == ["a1", "a2", "s/a3", "s/t/a4"]
    assert ids(f"{root}/s/**") == ["a3", "t/a4", "t/b"]
    assert ids(f"{root}/*/t/*.tif") == ["s/t/a4", "s/t/b"]


def test_a_glob_takes_other_suffixes_only_when_the_user_typed_them(root: str) -> None:
    put(root, "a.tif", "a.tif.aux.xml", "a.tif.msk", "raw.bin")
    assert ids(f"{root}/*") == ids(f"{root}/a*") == ["a"]
    assert ids(f"{root}/*.bin") == ["raw"]


def test_a_list_file_names_paths_beside_it_and_elsewhere(root: str) -> None:
    put(root, "lists/in/a.tif", "other/b.tif")
    text = f"# comment\n\nin/a.tif\r\n../other/b.tif\n{root}/lists/../other/b.tif\n"
    put(root, "lists/list.txt", data=b"\xef\xbb\xbf" + text.encode())
    found = scenes(f"{root}/lists/list.txt")
    assert [source.scene_id for source in found] == ["b", "in/a"]  # b twice: the same scene stays once
    assert [source.uri for source in found] == [f"{root}/other/b.tif", f"{root}/lists/in/a.tif"]


def test_relative_and_file_urls_become_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path), "in/a.tif")
    monkeypatch.chdir(tmp_path)
    for text in ("in", "./in/*.tif", "in/a.tif", f"file://{tmp_path}/in"):
        assert [source.uri for source in scenes(text)] == [f"{tmp_path}/in/a.tif"]


def test_a_folder_with_a_run_in_it_and_the_output_are_passed_over(root: str) -> None:
    put(root, "a.tif", "run1/masks/x.parquet", "out/old.tif", "outer.tif", "run1b/c.tif")
    put(root, "run1/run.json", data=RUN)
    assert ids(root, output=f"{root}/out") == ["a", "outer", "run1b/c"]
    with list_scenes(InputConfig(scenes=(root,)), None, need_labels=False) as found:
        assert any("left out 1 file below" in note and "run1" in note for note in found.notes)


def test_globs_that_match_nothing_are_told(root: str) -> None:
    put(root, "a.tif", "b.tif", "c/d.tif")
    config = InputConfig(scenes=(root,), include=("a", "b", "x*"), exclude=("b", "c/*", "y*"))
    with list_scenes(config, None, need_labels=False) as found:
        assert [source.scene_id for page in found.pages(10) for source, _ in page] == ["a"]
        assert "no scene matches x*, y* of input.include and input.exclude" in found.notes
    with list_scenes(InputConfig(scenes=(root,), exclude=("b",)), None, need_labels=False) as found:
        assert not any("no scene matches" in note for note in found.notes)


def test_a_run_as_input_is_refused(root: str) -> None:
    put(root, "masks/x.tif")
    put(root, "run.json", data=RUN)
    assert "all of it lies in the folders of runs" in fault(root)


@pytest.mark.parametrize("data", [b"{}", b"[1]", b"\xff no JSON", b'{"pilot": "Bob"}'])
def test_a_file_that_is_called_run_json_and_is_none_hides_nothing(root: str, data: bytes) -> None:
    put(root, "flight/a.tif", "flight/b.tif")
    put(root, "flight/run.json", data=data)
    assert ids(root) == ["flight/a", "flight/b"]


def test_an_input_that_lies_in_the_output_is_refused(root: str) -> None:
    put(root, "in/a.tif")
    assert "the input lies in the output" in fault(f"{root}/in", output=root)
    assert "the input lies in the output" in fault(f"{root}/in/a.tif", output=root)


def test_several_inputs_are_sorted_together(root: str) -> None:
    put(root, "z/a.tif", "a/b.tif", "c.tif")
    assert ids(f"{root}/z", f"{root}/a", f"{root}/c.tif") == ["a", "b", "c"]


def test_what_two_inputs_name_alike_is_one_scene(root: str) -> None:
    put(root, "a.tif", "b.tif")
    assert ids(root, f"{root}/*.tif", f"{root}/a.tif") == ["a", "b"]


def test_inputs_that_overlap_under_other_ids_are_refused(root: str) -> None:
    put(root, "n/a.tif")
    message = fault(root, f"{root}/n")
    assert f"{root}/n/a.tif: two inputs name one file, as 'a' and as 'n/a'" in message


def test_include_and_exclude_pick_by_id(root: str) -> None:
    put(root, "n/a.tif", "n/b.tif", "s/a.tif")
    assert ids(root, include=("n/*",)) == ["n/a", "n/b"]
    assert ids(root, exclude=("*/a",)) == ["n/b"]
    assert ids(root, include=("*/a",), exclude=("s*",)) == ["n/a"]
    assert "leave no scene" in fault(root, include=("x",))


# Versions


def test_versions_come_from_listing_or_from_asking_and_agree(root: str) -> None:
    put(root, "a.tif", data=b"abc")
    put(root, "list.txt", data=b"a.tif\n")
    put(root, "c.csv", data=b"uri\na.tif\n")
    info = open_storage(root).stat("a.tif")
    assert info is not None
    expected = Version(3, info.etag)
    for text in ("", "/*.tif", "/a.tif", "/list.txt", "/c.csv"):
        assert [source.version for source in scenes(root + text)] == [expected]


def test_a_crowded_folder_is_listed_once_instead_of_asked_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    names = [f"s{index:03d}" for index in range(120)]
    put(root, *(f"in/{name}.tif" for name in names), *(f"truth/{name}.png" for name in names))
    put(root, "list.txt", data="\n".join(f"in/{name}.tif" for name in names).encode())
    asked: list[str] = []
    ask = versions._stat
    monkeypatch.setattr(versions, "_stat", lambda uri: (asked.append(uri), ask(uri))[1])
    found = scenes(f"{root}/list.txt", labels="{parent}/../truth/{stem}.png")
    assert [source.label_uri for source in found] == [f"{root}/truth/{name}.png" for name in names]
    assert all(source.label_version is not None for source in found)
    assert asked == []


# Labels and masks


def test_label_templates_fill_stem_parent_and_id(root: str) -> None:
    put(root, "img/n/a.tif", "img/n/b.tif", "lab/n/a_l.png", "lab/n/b_l.png", "img/n/a.png", "img/n/b.png")
    put(root, "lab/a.png", "lab/b.png")
    pattern = f"{root}/img/**/*.tif"
    for template, first in [
        (root + "/lab/{scene_id}_l.png", "lab/n/a_l.png"),
        (root + "/lab/{stem}.png", "lab/a.png"),
        ("{parent}/../../lab/n/{stem}_l.png", "lab/n/a_l.png"),
        ("{stem}.png", "img/n/a.png"),
    ]:
        found = scenes(pattern, labels=template, need_labels=True)
        assert found[0].label_uri == f"{root}/{first}"
        assert found[0].label_version is not None


def test_a_relative_template_with_a_folder_starts_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path), "in/a.tif", "truth/a.png")
    monkeypatch.chdir(tmp_path)
    assert scenes("in", labels="truth/{stem}.png")[0].label_uri == f"{tmp_path}/truth/a.png"


def test_files_that_a_template_names_are_no_scenes(root: str) -> None:
    put(root, "a.tif", "a_mask.tif", "a_valid.tif", "sub/b.tif", "sub/b_mask.tif", "sub/b_valid.tif")
    options = {"labels": "{parent}/{stem}_mask.tif", "valid": "{stem}_valid.tif"}
    # Without the sidecars' own sidecars there is nothing that could be taken for a scene.
    put(root, *(f"{name}_{kind}.tif" for name in ("a", "sub/b") for kind in ("mask_mask", "mask_valid")))
    assert ids(f"{root}/sub", labels="{stem}_mask.tif", exclude=("*_valid", "*_mask_*")) == ["b"]
    assert ids(root, exclude=("*_*_*", "*_valid"), **options) == ["a", "sub/b"]


def test_labels_of_left_out_scenes_are_no_scenes_either(root: str) -> None:
    put(root, "a.tif", "a_mask.tif", "b.tif", "b_mask.tif")
    assert ids(root, labels="{stem}_mask.tif", exclude=("a",)) == ["b"]


def test_a_label_folder_within_the_input_is_left_out(root: str) -> None:
    put(root, "images/a.jpg", "images/b.jpg", "masks/a.png", "masks/b.png")
    found = scenes(root, labels="{parent}/../masks/{stem}.png")
    assert [source.scene_id for source in found] == ["images/a", "images/b"]


def test_a_template_that_names_the_scenes_themselves_is_refused(root: str) -> None:
    put(root, "a.tif")
    assert "names the scenes themselves" in fault(root, labels="{parent}/{stem}.tif")


def test_missing_labels_are_all_counted_and_five_are_named(root: str) -> None:
    put(root, *(f"in/s{index:02d}.tif" for index in range(12)), "truth/s03.png")
    message = fault(f"{root}/in", labels=root + "/truth/{stem}.png")
    assert "no label for 11 of 12 scenes" in message
    assert message.count("truth/s") == 5
    assert "and 6 more" in message
    assert "(scene 's00')" in message


def test_labels_must_be_named_where_they_are_needed(root: str) -> None:
    put(root, "a.tif")
    with pytest.raises(ConfigError, match="--labels"):
        scenes(root, need_labels=True)


@pytest.mark.parametrize(
    "template", ["{name}.png", "{stem!r}.png", "{stem:>9}.png", "{stem.x}.png", "{0}.png", "{", "all.png"]
)
def test_odd_templates_are_refused(template: str, tmp_path: Path) -> None:
    put(str(tmp_path), "a.tif")
    with pytest.raises(ConfigError, match=r"^labels: .*Use \{stem\}"):
        scenes(str(tmp_path), labels=template)


def test_a_template_cannot_climb_out_of_its_bucket() -> None:
    template = parse_template("{parent}/../../x/{stem}.png", "labels")
    assert template.fill("a", "s3://bucket/p/q/a.tif") == "s3://bucket/x/a.png"
    with pytest.raises(InputError, match="climbs out"):
        template.fill("a", "s3://bucket/p/a.tif")


def test_a_msk_file_beside_a_scene_is_its_mask_only_in_auto(root: str) -> None:
    put(root, "a.tif", "b.tif")
    put(root, "a.tif.msk", data=b"12345")
    put(root, "list.txt", data=b"a.tif\nb.tif\n")
    for text in ("", "/*.tif", "/list.txt"):
        with_mask, without = scenes(root + text)
        assert with_mask.valid_uri == f"{root}/a.tif.msk"
        assert with_mask.valid_version is not None
        assert with_mask.valid_version.size_bytes == 5
        assert (without.valid_uri, without.valid_version) == (None, None)
    assert [source.valid_uri for source in scenes(root, valid="none")] == [None, None]


def test_a_name_with_no_room_for_a_suffix_is_that_of_a_scene_without_mask(tmp_path: Path) -> None:
    name = "x" * 250
    put(str(tmp_path), f"{name}.tif", "a.tif", "a.tif.msk")
    put(str(tmp_path), "list.txt", data=f"{name}.tif\na.tif\n".encode())
    assert [source.valid_uri for source in scenes(f"{tmp_path}/{name}.tif")] == [None]
    for text in (f"{tmp_path}", f"{tmp_path}/list.txt"):
        assert [source.valid_uri for source in scenes(text)] == [f"{tmp_path}/a.tif.msk", None]


def test_a_mask_template_must_find_its_files(root: str) -> None:
    put(root, "in/a.tif", "in/b.tif", "in/a_ok.tif")
    assert "no mask for 1 of 2 scenes" in fault(root, valid="{parent}/{stem}_ok.tif")
    put(root, "in/b_ok.tif")
    found = scenes(root, valid="{parent}/{stem}_ok.tif")
    assert [source.valid_uri for source in found] == [f"{root}/in/a_ok.tif", f"{root}/in/b_ok.tif"]


# Object storage


@pytest.mark.s3
def test_every_kind_of_input_works_on_s3(s3_prefix: str) -> None:
    root = s3_prefix
    put(
        root,
        "in/n/a b.tif",
        "in/n/ä+%41.tif",
        "in/s/c.tif",
        "truth/a b.png",
        "truth/ä+%41.png",
        "truth/c.png",
    )
    put(root, "in/n/a b.tif.msk", "out/masks/old.tif")
    put(root, "out/run.json", data=RUN)
    put(root, "list.txt", data="in/s/c.tif\nin/n/ä+%41.tif\n".encode())
    put(root, "cat.csv", data=b"uri,label,city\nin/s/c.tif,truth/c.png,Banepa\nin/n/a b.tif,,\n")
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": [b"one", b"two"], "label": [None, b"truth"]}), table)
    put(root, "shards/p.parquet", data=table.getvalue().to_pybytes())
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name, size in (("k1.png", 70_000), ("k1.label.png", 5), ("k2.png", 3)):
            header = tarfile.TarInfo(name)
            header.size = size
            file.addfile(header, io.BytesIO(name[:2].encode() * size))
    put(root, "shards/t.tar", data=tar.getvalue())

    truth = root + "/truth/{stem}.png"
    assert ids(f"{root}/in", labels=truth) == ["n/a b", "n/ä+%41", "s/c"]
    assert ids(f"{root}/out/none/../../in/s/") == ids(f"{root}/out/../in/s/*.tif") == ["c"]
    found = scenes(f"{root}/in/**/*.tif", labels=truth, need_labels=True)
    assert [source.label_uri for source in found][:2] == [f"{root}/truth/a b.png", f"{root}/truth/ä+%41.png"]
    assert [source.valid_uri for source in found] == [f"{root}/in/n/a b.tif.msk", None, None]
    assert ids(f"{root}/list.txt") == ["in/n/ä+%41", "in/s/c"]
    first, second = scenes(f"{root}/cat.csv")
    assert (first.label_uri, first.extra) == (f"{root}/truth/c.png", {"city": "Banepa"})
    assert second.valid_uri == f"{root}/in/n/a b.tif.msk"
    info = open_storage(root).stat("in/s/c.tif")
    assert info is not None
    assert first.version == Version(info.size_bytes, info.etag)
    members = scenes(f"{root}/shards")
    assert [source.scene_id for source in members] == ["p/00000000", "p/00000001", "t/k1", "t/k2"]
    assert [read_member(source)[:6] for source in members] == [b"one", b"two", b"k1k1k1", b"k2k"]
    assert [read_label_member(source) for source in members] == [None, b"truth", b"k1k1k", None]
    assert "no such file, or a folder or prefix with nothing in it" in fault(f"{root}/nothing")
    assert "no scene there" in fault(f"{root}/in/*.png")


def test_real_archives_are_paired_with_their_labels(shared_data: Path) -> None:
    tiles = scenes(str(shared_data / "dubai-aerial"), labels="{parent}/../masks/{stem}.png", need_labels=True)
    assert len(tiles) == 49
    assert all(source.scene_id.split("/")[1] == "images" for source in tiles)
    hot = shared_data / "hot-fair-buildings"
    towns = scenes(str(hot / "scenes"), labels=f"{hot}/masks/{{stem}}.tif", need_labels=True)
    assert [source.label_uri for source in towns] == sorted(map(str, (hot / "masks").glob("*.tif")))
    assert len(towns) == 13
