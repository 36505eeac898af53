"""Names of local files: what is listed, what is passed over, and what a path means."""

from __future__ import annotations

from pathlib import Path

import pytest

from segpipe.errors import InputError, ObjectMissing
from segpipe.storage import open_storage
from segpipe.storage.local import TEMP_FOLDER, LocalStorage


@pytest.fixture
def store(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "root"))


def test_a_name_that_is_too_long_is_wrong_input(store: LocalStorage) -> None:
    with pytest.raises(InputError, match="too long"):
        store.put_if_absent("n" * 300, b"1")


def test_the_temporary_folder_is_not_listed(store: LocalStorage) -> None:
    store.put("a", b"1")
    stray = Path(store.root) / TEMP_FOLDER / "stray-of-a-kill"
    stray.parent.mkdir()
    stray.write_bytes(b"half")
    store.put("b", b"1")
    assert [info.key for page in store.list() for info in page] == ["a", "b"]
    assert stray.exists()


def test_links_are_followed_loops_end_and_dangling_links_are_passed_over(
    store: LocalStorage, tmp_path: Path
) -> None:
    store.put("a/one.tif", b"1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "two.tif").write_bytes(b"22")
    root = Path(store.root)
    (root / "linked").symlink_to(elsewhere)
    (root / "file.tif").symlink_to(elsewhere / "two.tif")
    (root / "dangling.tif").symlink_to(elsewhere / "nothing")
    (root / "a" / "loop").symlink_to(root)
    keys = [info.key for page in store.list() for info in page]
    assert keys == ["a/one.tif", "file.tif", "linked/two.tif"]


def test_a_link_that_leads_to_itself_is_passed_over(store: LocalStorage) -> None:
    store.put("folder/k", b"1")
    (Path(store.root) / "folder/loop").symlink_to("loop")
    assert [info.key for page in store.list() for info in page] == ["folder/k"]
    assert store.stat("folder/loop") is None
    with pytest.raises(ObjectMissing, match="leads to itself"):
        store.read("folder/loop")


def test_names_with_backslashes_and_newlines_are_plain_names(store: LocalStorage) -> None:
    keys = ["back\\slash", "new\nline", "tab\t"]
    for key in keys:
        store.put(key, key.encode())
    assert sorted(info.key for page in store.list() for info in page) == sorted(keys)
    assert [store.read(key).decode() for key in keys] == keys


def test_a_path_through_a_file_is_missing(store: LocalStorage) -> None:
    store.put("a", b"1")
    with pytest.raises(ObjectMissing):
        store.read("a/b")


def test_a_folder_is_no_missing_file(store: LocalStorage) -> None:
    store.put("folder/k", b"1")
    with pytest.raises(ObjectMissing, match="a folder, and no file"):
        store.read("folder")


def test_relative_and_file_uris_open_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("run").root == open_storage((tmp_path / "run").as_uri()).root == str(tmp_path / "run")
    assert open_storage("run/").uri("a/b") == str(tmp_path / "run/a/b")
    assert open_storage("/").uri("a") == "/a"
