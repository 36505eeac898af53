"""URIs: what opens, what is refused, and that nothing secret is ever repeated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from segpipe.errors import InputError, StorageRefused
from segpipe.storage import join_uri, open_object, open_storage, read_uri, split_uri


@pytest.mark.parametrize(
    ("uri", "root", "key"),
    [
        ("s3://b/a/c.tif", "s3://b/a", "c.tif"),
        ("s3://b/c.tif", "s3://b", "c.tif"),
        ("S3://b/c.tif", "s3://b", "c.tif"),
        ("s3a://b/c.tif", "s3://b", "c.tif"),
        ("gs://b/a b/c%20.tif", "gs://b/a b", "c%20.tif"),
        ("/a/c.tif", "/a", "c.tif"),
        ("/c.tif", "/", "c.tif"),
        ("/a/../b/c.tif", "/b", "c.tif"),
        ("/data/a::b.tif", "/data", "a::b.tif"),
        ("file:///a/b%20c.tif", "/a", "b c.tif"),
        ("memory://a/c", "memory://a", "c"),
        ("https://h/a/c.tif", "https://h/a", "c.tif"),
    ],
)
def test_a_uri_splits_into_root_and_key(uri: str, root: str, key: str) -> None:
    assert split_uri(uri) == (root, key)


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_uri("c.tif") == (str(tmp_path), "c.tif")
    assert split_uri("./a/c.tif") == (str(tmp_path / "a"), "c.tif")


_PARTS = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1
)
_NAMES = _PARTS.filter(lambda part: part not in (".", ".."))


@given(st.lists(_NAMES, min_size=1, max_size=4), _NAMES)
def test_split_undoes_join(folders: list[str], name: str) -> None:
    for start in ("/", "s3://bucket/"):
        root = start + "/".join(folders)
        assert split_uri(join_uri(root, name)) == (root, name)


@pytest.mark.parametrize("uri", ["", "a\0b", "s3://", "s3:///", "s3://b", "s3://b/", "s3://b/a/", "/", "a/"])
def test_a_uri_that_names_no_object_is_refused(uri: str) -> None:
    with pytest.raises(InputError):
        split_uri(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hidden@bucket/a",
        "https://user:hidden@host/a.tif",
        "https://host/a.tif?X-Amz-Credential=1&X-Amz-Signature=hidden",
        "https://host/a.tif?sv=1&sig=hidden",
        "https://host/a.tif?AWSAccessKeyId=hidden",
    ],
)
def test_a_uri_with_credentials_is_refused_without_repeating_them(uri: str) -> None:
    for act in (split_uri, open_storage, open_object, read_uri):
        with pytest.raises(InputError, match="credentials") as caught:
            act(uri)
        assert "hidden" not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize("uri", ["simplecache::s3://b/a", "zip://x.tif::s3://b/a.zip", "a::b://c"])
def test_a_chain_of_file_systems_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="chain"):
        open_storage(uri)


def test_another_machines_file_is_refused() -> None:
    with pytest.raises(InputError, match="another machine"):
        open_storage("file://server/share")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="nosuch"):
        open_storage("nosuch://a/b")


def test_a_store_takes_its_host_from_the_uri_and_what_lacks_is_named() -> None:
    made = []

    class Store(MemoryFileSystem):
        protocol = "hosted"
        cachable = False

        def __init__(self, host: str, share: str, **options: Any) -> None:
            made.append((host, share))
            super().__init__(**options)

        @staticmethod
        def _get_kwargs_from_urls(path: str) -> dict[str, str]:
            host, _, share = path.removeprefix("hosted://").partition("/")
            return {"host": host, "share": share} if share else {"host": host}

    fsspec.register_implementation("hosted", Store, clobber=True)
    with pytest.raises(InputError, match=r"hosted://server: .*more than this URI tells \(share\)"):
        open_storage("hosted://server")
    assert not made
    open_storage("hosted://server/maps")
    assert made == [("server", "maps")]


def test_a_web_address_can_only_be_read(tmp_path: Path) -> None:
    source = tmp_path / "f"
    source.write_bytes(b"1")
    store = open_storage("https://host.invalid/folder")
    for put in (lambda: store.put("k", b""), lambda: store.put_if_absent("k", b"")):
        with pytest.raises(StorageRefused, match="only be read"):
            put()


def test_opening_again_gives_the_same_instance() -> None:
    assert open_storage("memory://same/root") is open_storage("memory://same/root/")
    assert open_object("memory://same/root/k")[0] is open_storage("memory://same/root")


def test_other_credentials_in_the_environment_give_another_s3_instance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = open_storage("s3://bucket/a")
    assert open_storage("s3://bucket/a") is first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert open_storage("s3://bucket/a") is not first


def test_importing_storage_loads_no_client() -> None:
    program = (
        "import sys, segpipe.storage; "
        "print([name for name in ('fsspec', 's3fs', 'botocore', 'aiohttp', 'torch') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.strip() == "[]"
