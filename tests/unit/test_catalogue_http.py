"""Scenes on a web server and in public buckets: what may be read there may often not be listed."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scene_inputs import put, scenes

from segpipe.errors import InputError, StorageRefused

MANY = 60
"""More than from where on a folder is listed instead."""


class _Server(http.server.ThreadingHTTPServer):
    """Has every ``.tif`` and answers ``lacking`` for all else, its folders among them."""

    lacking = 403
    links = b""
    """The page of its folder, where it has one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/in"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        found = self.path.endswith(".tif")
        links = self.path.strip("/") == "in" and self.server.links
        self.send_response(200 if found or links else self.server.lacking)
        body = b"pixels" if found else links or b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("lacking", [403, 404])
@pytest.mark.parametrize("count", [1, MANY])
def test_objects_that_may_be_read_and_not_listed_are_scenes_without_masks(
    server: _Server, tmp_path: Path, count: int, lacking: int
) -> None:
    server.lacking = lacking
    names = [f"{server.uri}/s{index:02d}.tif" for index in range(count)]
    put(str(tmp_path), "list.txt", data="\n".join(names).encode())
    found = scenes(str(tmp_path / "list.txt"))
    assert [source.uri for source in found] == names
    assert {source.valid_uri for source in found} == {None}
    assert all(source.version.size_bytes == len(b"pixels") for source in found)


def test_a_page_of_links_hides_no_file_that_it_leaves_out(server: _Server, tmp_path: Path) -> None:
    server.links = b'<a href="s00.tif">the newest</a>'
    names = [f"{server.uri}/s{index:02d}.tif" for index in range(MANY)]
    put(str(tmp_path), "list.txt", data="\n".join(names).encode())
    versions = [source.version for source in scenes(str(tmp_path / "list.txt"))]
    assert [version.size_bytes for version in versions] == [len(b"pixels")] * MANY


def test_a_mask_that_a_catalogue_names_and_the_store_refuses_is_an_error(
    server: _Server, tmp_path: Path
) -> None:
    put(str(tmp_path), "cat.csv", data=f"uri,valid\n{server.uri}/s.tif,{server.uri}/s.msk\n".encode())
    with pytest.raises(StorageRefused, match=r"s\.msk: access denied"):
        scenes(str(tmp_path / "cat.csv"))


@pytest.mark.parametrize("name", ["/", "/s*"])
def test_a_folder_of_a_web_server_is_no_input(server: _Server, name: str) -> None:
    server.lacking = 404
    server.links = b'<a href="s00.tif">the newest</a>'
    with pytest.raises(InputError, match=r"no listing.*Name the files"):
        scenes(f"{server.uri}{name}")
