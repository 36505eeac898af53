"""From inputs to scenes: what is found, how it is named, ordered, versioned and refused."""

from __future__ import annotations

import datetime as dt
import io
import os
import resource
import sys
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segpipe.config.model import InputConfig
from segpipe.errors import ConfigError, InputError, StorageFull
from segpipe.rasters import catalogue_file, versions
from segpipe.rasters import spool as spool_module
from segpipe.rasters.catalogue import list_scenes
from segpipe.rasters.listing import glob_pattern
from segpipe.rasters.scene import SceneSource, Version
from segpipe.rasters.scene_ids import check_scene_id, fold_id
from segpipe.rasters.scene_list import SceneList, dump_extra, load_extra, scratch_explained
from segpipe.rasters.shards import read_label_member, read_member
from segpipe.rasters.spool import Draft, Spool
from segpipe.rasters.templates import parse_template
from segpipe.storage import open_storage

Planned = list[tuple[SceneSource, int | None]]


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder to build an archive in: every rule holds for files and for objects."""
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def put(root: str, *keys: str, data: bytes = b"x") -> None:
    storage = open_storage(root)
    for key in keys:
        storage.put(key, data)


def scenes(
    *inputs: str, output: str | None = None, need_labels: bool = False, **config: Any
) -> list[SceneSource]:
    with list_scenes(InputConfig(scenes=inputs, **config), output, need_labels=need_labels) as found:
        return [source for page in found.pages() for source, _ in page]


def ids(*inputs: str, **options: Any) -> list[str]:
    return [source.scene_id for source in scenes(*inputs, **options)]


def fault(*inputs: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        scenes(*inputs, **options)
    return str(caught.value)


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
    put(root, "a.tif", "run1/masks/x.parquet", "run1/run.json", "out/old.tif", "outer.tif", "run1b/c.tif")
    assert ids(root, output=f"{root}/out") == ["a", "outer", "run1b/c"]
    with list_scenes(InputConfig(scenes=(root,)), None, need_labels=False) as found:
        assert any("left out 1 file below" in note and "run1" in note for note in found.notes)


def test_a_run_as_input_is_refused(root: str) -> None:
    put(root, "run.json", "masks/x.tif")
    assert "run.json" in fault(root)


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
    with pytest.raises(ConfigError, match=r"input\.labels.*Use \{stem\}"):
        scenes(str(tmp_path), labels=template)


def test_a_template_cannot_climb_out_of_its_bucket() -> None:
    template = parse_template("{parent}/../../x/{stem}.png", "input.labels")
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


def test_a_mask_template_must_find_its_files(root: str) -> None:
    put(root, "in/a.tif", "in/b.tif", "in/a_ok.tif")
    assert "no mask for 1 of 2 scenes" in fault(root, valid="{parent}/{stem}_ok.tif")
    put(root, "in/b_ok.tif")
    found = scenes(root, valid="{parent}/{stem}_ok.tif")
    assert [source.valid_uri for source in found] == [f"{root}/in/a_ok.tif", f"{root}/in/b_ok.tif"]


# Catalogues


def test_a_csv_catalogue_gives_ids_labels_masks_times_and_typed_columns(root: str) -> None:
    put(root, "img/a.tif", "img/b.tif", "img/c.tif", "truth/a.png", "m/a.tif")
    text = (
        "\ufeffuri,scene_id,label,valid,datetime,city,cloud,flight,day,ok\n"
        'img/c.tif,zz/1,,,,"Kampala, north",0.5,7,2024-05-01,true\n'
        "img/a.tif,aa/2,../cat/truth/a.png,m/a.tif,2024-05-01T10:00:00Z,NA,1,8,2024-05-02,false\n"
        "img/b.tif,mm/3,,,,,,,,\n"
    )
    put(root, "cat.csv", data=text.replace("../cat/", "").encode())
    found = scenes(f"{root}/cat.csv", need_labels=True)
    assert [source.scene_id for source in found] == ["zz/1", "aa/2", "mm/3"]  # the rows' own order
    assert [source.label_uri for source in found] == [None, f"{root}/truth/a.png", None]
    assert [source.valid_uri for source in found] == [None, f"{root}/m/a.tif", None]
    assert [source.datetime for source in found] == [None, "2024-05-01T10:00:00Z", None]
    day = dt.date(2024, 5, 1)
    assert found[0].extra == {"city": "Kampala, north", "cloud": 0.5, "flight": 7, "day": day, "ok": True}
    assert found[1].extra["city"] == "NA"
    assert set(found[2].extra.values()) == {None}


def test_catalogue_types_fit_all_rows_however_late_they_change(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_file, "_BLOCK_BYTES", 4096)
    put(root, "a.tif")
    rows = [f"a.tif,s{index:06d},{index},{index}" for index in range(2_000)]
    rows[-1] = "a.tif,last,late,0.5"
    put(root, "cat.csv", data=("uri,scene_id,mixed,number\n" + "\n".join(rows)).encode())
    with list_scenes(
        InputConfig(scenes=(f"{root}/cat.csv",), valid="none"), None, need_labels=False
    ) as found:
        assert found.extra_schema == pa.schema([("mixed", pa.string()), ("number", pa.float64())])
        first = next(found.pages(10))[0][0]
        assert len(found) == 2_000
    assert first.extra == {"mixed": "0", "number": 0.0}


def test_a_parquet_catalogue_keeps_its_types(tmp_path: Path) -> None:
    put(str(tmp_path), "img/b.tif", "img/a.tif")
    when = dt.datetime(2024, 5, 1, 10, tzinfo=dt.UTC)
    columns = {
        "uri": ["img/b.tif", "img/a.tif"],
        "datetime": pa.array([when, None], pa.timestamp("ns", "UTC")),
        "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
        "wkb": [b"\x01\x02", None],
        "tags": [["x", "y"], []],
        "nested": [{"k": 1}, None],
        "seen": pa.array([when, None], pa.timestamp("ns", "UTC")),
        "kind": pa.array(["u", "r"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "cat.parquet")
    second, first = scenes(str(tmp_path / "cat.parquet"))
    assert (second.scene_id, first.scene_id) == ("img/b", "img/a")
    assert second.datetime == "2024-05-01T10:00:00+00:00"
    assert second.extra == {
        "price": Decimal("1.50"),
        "wkb": b"\x01\x02",
        "tags": ["x", "y"],
        "nested": {"k": 1},
        "seen": when,
        "kind": "u",
    }
    assert first.extra["price"] is None


def test_inputs_keep_their_order_beside_a_catalogue(root: str) -> None:
    put(root, "z/b.tif", "z/a.tif", "c/y.tif", "c/x.tif")
    put(root, "c/cat.csv", data=b"uri\ny.tif\nx.tif\n")
    assert ids(f"{root}/z", f"{root}/c/cat.csv") == ["a", "b", "y", "x"]


def test_an_empty_label_cell_means_no_counts_even_beside_a_template(root: str) -> None:
    put(root, "a.tif", "b.tif", "a.png", "b.png")
    put(root, "cat.csv", data=b"uri,label\na.tif,\nb.tif,a.png\n")
    found = scenes(f"{root}/cat.csv", labels="{stem}.png")
    assert [source.label_uri for source in found] == [None, f"{root}/a.png"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path\na.tif\n", "needs a column 'uri'; found: path"),
        ("uri,uri\na.tif,a.tif\n", "two columns are called 'uri'"),
        ("uri,x\na.tif\n", "cannot be read"),
        ("uri,x\na.tif,1\n,2\n", "row 2 has no uri"),
        ("uri,scene_id\na.tif,\n", "row 1 has no scene_id"),
        ("", "cannot be read"),
        ("uri\n", "no scene there"),
        ("uri\nmissing.tif\n", "no such file"),
        ("uri,scene_id\na.tif,../up\n", "climbs out"),
    ],
)
def test_broken_catalogues_are_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    put(str(tmp_path), "a.tif")
    put(str(tmp_path), "cat.csv", data=text.encode())
    message = fault(str(tmp_path / "cat.csv"))
    assert reason in message
    assert "cat.csv" in message or "missing.tif" in message


def test_a_text_named_parquet_is_refused(tmp_path: Path) -> None:
    put(str(tmp_path), "cat.parquet", data=b"uri\n")
    assert "no valid Parquet file" in fault(str(tmp_path / "cat.parquet"))


def test_catalogues_whose_columns_contradict_are_refused(tmp_path: Path) -> None:
    put(str(tmp_path), "a.tif", "b.tif")
    put(str(tmp_path), "one.csv", data=b"uri,x\na.tif,1\n")
    put(str(tmp_path), "two.csv", data=b"uri,x\nb.tif,word\n")
    assert "do not fit" in fault(str(tmp_path / "one.csv"), str(tmp_path / "two.csv"))


# Names


@pytest.mark.parametrize(
    ("scene_id", "reason"),
    [
        ("../a", "climbs out"),
        ("a/../b", "climbs out"),
        ("/a", "empty part"),
        ("a//b", "empty part"),
        ("a/", "empty part"),
        ("", "empty part"),
        ("a/ /b", "empty part"),
        (".a", "begins with a dot"),
        ("a/.b", "begins with a dot"),
        ("./a", "begins with a dot"),
        ("a\\b", "backslash"),
        ("a\nb", "control character"),
        ("a\0b", "control character"),
        ("a\x7fb", "control character"),
        ("a\u2028b", "control character"),
        ("a\udcffb", "not valid Unicode"),
        ("ä" * 513, "longer than 1024 bytes"),
    ],
)
def test_unsafe_ids_are_refused_with_the_way_out(scene_id: str, reason: str) -> None:
    with pytest.raises(InputError, match=r"(?s)x\.tif.*" + reason + ".*scene_id column"):
        check_scene_id(scene_id, "x.tif")


@given(st.text(max_size=30))
def test_an_accepted_id_stays_below_any_folder_and_is_a_valid_key(scene_id: str) -> None:
    try:
        check_scene_id(scene_id, "x")
    except InputError:
        return
    path = os.path.normpath(f"/base/{scene_id}")
    assert path == f"/base/{scene_id}"
    assert open_storage("/base").uri(f"{scene_id}.tif") == f"/base/{scene_id}.tif"


@given(st.text(alphabet="aAäÄßs\u0308\u017f", max_size=6))
def test_folding_ids_is_idempotent_and_blind_to_case(text: str) -> None:
    assert fold_id(fold_id(text)) == fold_id(text)
    assert fold_id(text.lower()) == fold_id(text.upper().lower()) or not text.isascii()


def test_a_file_name_that_is_no_unicode_is_refused_readably(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.tif")).write_bytes(b"x")
    assert "a\\xff.tif" in fault(str(tmp_path))


def test_two_scenes_with_one_id_are_both_named(root: str) -> None:
    put(root, "n/a.tif", "s/a.tif", "n/b.tif", "s/c.png", "s/c.tif")
    message = fault(f"{root}/n/a.tif", f"{root}/s/a.tif")
    assert f"'a': {root}/n/a.tif and {root}/s/a.tif" in message
    assert f"{root}/s/c.png and {root}/s/c.tif" in fault(f"{root}/s")


def test_ids_that_differ_by_case_alone_are_refused(root: str) -> None:
    put(root, "A.tif", "a.tif")
    message = fault(root)
    assert "differ by case alone" in message
    assert f"{root}/A.tif and {root}/a.tif" in message


def test_a_catalogue_row_twice_is_refused(root: str) -> None:
    put(root, "a.tif")
    put(root, "cat.csv", data=b"uri,x\na.tif,1\na.tif,2\n")
    assert "two scenes with one id" in fault(f"{root}/cat.csv")


def test_what_is_not_there_is_counted_and_named(root: str) -> None:
    put(root, "a.tif")
    missing = [f"{root}/m{index}.tif" for index in range(7)]
    message = fault(f"{root}/a.tif", *missing)
    assert "no such file, or a folder or prefix with nothing in it" in message
    assert "m0.tif" in message
    assert "m4.tif and 2 more" in message
    put(root, "list.txt", data=b"a.tif\ngone.tif\n")
    assert "gone.tif" in fault(f"{root}/list.txt")


def test_inputs_that_match_nothing_are_named(root: str) -> None:
    put(root, "a.tif", "empty/readme.md")
    assert f"{root}/*.png: no scene there" in fault(f"{root}/*.png")
    assert "empty" in fault(f"{root}/a.tif", f"{root}/empty")
    with pytest.raises(ConfigError, match="no input"):
        scenes()


def test_credentials_in_an_input_are_refused_and_not_repeated() -> None:
    message = fault("s3://user:hunter2@bucket/a.tif")
    assert "credentials" in message
    assert "hunter2" not in message


# Globs


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("*.tif", ["a.tif", ".tif"], ["a/b.tif", "a.tiff"]),
        ("**/*.tif", ["a.tif", "a/b/c.tif"], ["a.png"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a"]),
        ("[a-c]?.tif", ["b1.tif"], ["d1.tif", "b/.tif", "b12.tif"]),
        ("[!a]*", ["b"], ["a", "/x"]),
        ("[]x].tif", ["].tif", "x.tif"], ["[.tif"]),
        ("[^a]", ["^", "a"], ["b"]),
        ("[.tif", ["[.tif"], [".tif"]),
        ("a+(b).t*f", ["a+(b).tif"], ["aab.tif"]),
    ],
)
def test_globs_match(glob: str, yes: list[str], no: list[str]) -> None:
    pattern = glob_pattern(glob, "x")
    assert [text for text in yes if not pattern.fullmatch(text)] == []
    assert [text for text in no if pattern.fullmatch(text)] == []


@pytest.mark.parametrize("glob", ["a**b/*.tif", "[z-a].tif"])
def test_broken_globs_are_refused(glob: str) -> None:
    with pytest.raises(InputError):
        glob_pattern(glob, "x")


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
    put(root, "in/n/a b.tif.msk", "out/run.json", "out/masks/old.tif")
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


# The list itself


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[SceneList]:
    put(str(tmp_path), *(f"s{index}.tif" for index in range(5)), "s0.tif.msk")
    with list_scenes(InputConfig(scenes=(str(tmp_path),)), None, need_labels=False) as found:
        yield found


def planned(found: SceneList) -> Planned:
    return [row for page in found.pages(2) for row in page]


def test_pages_are_full_and_repeatable(archive: SceneList) -> None:
    assert [len(page) for page in archive.pages(2)] == [2, 2, 1]
    assert planned(archive) == planned(archive)
    assert [part for _, part in planned(archive)] == [None] * 5


def test_a_grown_archive_plans_only_new_and_changed_scenes(archive: SceneList) -> None:
    now = {source.scene_id: source.version_text for source, _ in planned(archive)}
    archive.forget_known(
        [("s0", now["s0"], 0), ("s1", "old", 0), ("s2", "old", 0), ("gone", "x", 0), ("s2", now["s2"], 1)]
    )
    assert archive.num_known == 2
    assert len(archive) == 3
    assert [(source.scene_id, part) for source, part in planned(archive)] == [
        ("s1", 0),
        ("s3", None),
        ("s4", None),
    ]


def test_a_scene_that_went_back_to_an_older_version_is_planned_again(archive: SceneList) -> None:
    now = {source.scene_id: source.version_text for source, _ in planned(archive)}
    archive.forget_known([("s0", now["s0"], 0), ("s0", "newer", 1)])
    assert archive.num_known == 0
    assert planned(archive)[0][1] == 1


def test_versions_in_the_database_are_the_ones_of_the_sources(archive: SceneList) -> None:
    texts = [source.version_text for source, _ in planned(archive)]
    assert ";;" in texts[0]  # with a mask and no label
    archive.forget_known((f"s{index}", text, 0) for index, text in enumerate(texts))
    assert (len(archive), archive.num_known) == (0, 5)


def test_a_twin_of_a_planned_scene_is_refused(archive: SceneList) -> None:
    with pytest.raises(InputError, match="by case alone"):
        archive.forget_known([("S1", "x", 0)])


def test_a_full_scratch_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    spool = Spool()
    spool.database.execute("PRAGMA max_page_count = 20")

    def fill() -> None:
        with scratch_explained():
            for index in range(20_000):
                spool.add(Draft(f"s{index}", f"/s{index}.tif", Version(1, "e")))

    with pytest.raises(StorageFull, match="TMPDIR") as caught:
        fill()
    assert caught.value.where == str(tmp_path)
    spool.close()


def test_real_archives_are_paired_with_their_labels(shared_data: Path) -> None:
    tiles = scenes(str(shared_data / "dubai-aerial"), labels="{parent}/../masks/{stem}.png", need_labels=True)
    assert len(tiles) == 49
    assert all(source.scene_id.split("/")[1] == "images" for source in tiles)
    hot = shared_data / "hot-fair-buildings"
    towns = scenes(str(hot / "scenes"), labels=f"{hot}/masks/{{stem}}.tif", need_labels=True)
    assert [source.label_uri for source in towns] == sorted(map(str, (hot / "masks").glob("*.tif")))
    assert len(towns) == 13


def test_closing_twice_is_fine(archive: SceneList) -> None:
    archive.close()
    archive.close()


def test_many_scenes_keep_memory_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 scenes with long names take over 40 MB as Python objects; the list stays far below."""
    monkeypatch.setattr(spool_module, "_CACHE_KIB", 2048)
    before_kib, long = resident_kib(), "p" * 80
    spool = Spool()
    for index in range(50_000):
        number = index * 7919 % 50_000
        version = Version(number, "e" * 32)
        spool.add(Draft(f"{long}/{number:06d}", f"s3://b/{long}/{number:06d}.tif", version))
    spool.index()
    spool.check_ids()
    with spool.finish(pa.schema([]), []) as found:
        found.forget_known((f"{long}/{number:06d}", f"{number}:{'e' * 32}", 0) for number in range(25_000))
        names = [source.scene_id[-6:] for page in found.pages(1000) for source, _ in page]
    assert names == [f"{number:06d}" for number in range(25_000, 50_000)]
    assert resident_kib() - before_kib < 20_000


def resident_kib() -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("the resident size is read from /proc")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.dates()
    | st.datetimes(timezones=st.just(dt.UTC) | st.none())
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False, allow_infinity=False)
)


@given(st.dictionaries(st.text(max_size=5), SCALARS | st.lists(SCALARS, max_size=3), max_size=4))
def test_further_columns_come_back_with_their_types(extra: Mapping[str, Any]) -> None:
    back = load_extra(dump_extra(dict(extra)))
    assert back == extra
    assert [type(value) for value in back.values()] == [type(value) for value in extra.values()]


def test_files_that_are_no_scenes_may_have_names_that_are_no_unicode(tmp_path: Path) -> None:
    put(str(tmp_path), "a.tif", "a_label.png")
    (tmp_path / os.fsdecode(b"notes\xff.txt")).write_text("x")
    assert ids(str(tmp_path), labels="{stem}_label.png") == ["a"]


def test_a_pipe_is_never_opened_whatever_its_name(tmp_path: Path) -> None:
    put(str(tmp_path), "a.tif")
    os.mkfifo(tmp_path / "b.tif")
    assert ids(str(tmp_path)) == ["a"]
    with pytest.raises(InputError, match="no such file"):
        ids(str(tmp_path / "b.tif"))


@pytest.mark.parametrize(
    "text", ["s3://KEY:SECRET@bucket/../x", "s3://KEY:SECRET@*/x", "s3://KEY:SECRET@b/[z"]
)
def test_no_message_about_an_input_repeats_credentials(text: str) -> None:
    with pytest.raises(InputError, match="carries credentials") as caught:
        ids(text)
    assert "SECRET" not in str(caught.value)
