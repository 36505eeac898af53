"""The names of scenes and the globs that pick them: what is accepted, and what is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene_inputs import fault, ids, put, scenes

from segpipe.errors import ConfigError, InputError
from segpipe.rasters.listing import glob_pattern
from segpipe.rasters.scene_ids import check_scene_id, fold_id
from segpipe.storage import open_storage

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
