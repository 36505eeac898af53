"""Pretrained weights from a web server, and from a machine that reaches none."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from weights import (
    assert_same,
    card_of,
    network_of,
    random_state,
    torch_bytes,
)

from segpipe.config.train import InitConfig
from segpipe.errors import InputError, StorageRefused
from segpipe.models.pretrained import load_start


@pytest.fixture
def served() -> Iterator[tuple[str, dict[str, bytes]]]:
    """An http server on loopback and the files that it gives by path; 403 for what is under /secret/."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path)
            self.send_response(200 if data is not None else 403 if "/secret/" in self.path else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data or b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    thread.join()
    server.server_close()


class TestHttp:
    def test_weights_come_over_http(self, served: tuple[str, dict[str, bytes]]) -> None:
        address, files = served
        card = card_of("unet")
        state = random_state(network_of(card))
        files["/models/unet.pth"] = data = torch_bytes(state)
        model = network_of(card)
        digest = hashlib.sha256(data).hexdigest()
        config = InitConfig(weights=f"{address}/models/unet.pth", sha256=digest[:8])
        report = load_start(model, card, config)
        assert_same(model.state_dict(), state)
        assert report.source == config.weights

    @pytest.mark.parametrize("path", ["none.pth", "secret/x.pth"])
    def test_an_answer_that_is_no_file_says_what_to_do(
        self, path: str, served: tuple[str, dict[str, bytes]]
    ) -> None:
        self.assert_refused(f"{served[0]}/models/{path}")

    def test_a_machine_that_reaches_nothing_says_what_to_do(self) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.assert_refused(f"http://127.0.0.1:{port}/models/resnet50-0676ba61.pth")
        self.assert_refused("http://no-such-host.invalid/models/resnet50-0676ba61.pth")

    def assert_refused(self, uri: str) -> None:
        card = card_of("unet")
        with pytest.raises(
            InputError, match=r"Fetch the file elsewhere and give its local path as init\.weights"
        ):
            load_start(network_of(card), card, InitConfig(weights=uri))

    def test_a_store_that_says_no_stays_a_fault_of_storage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(uri: str) -> bytes:
            raise StorageRefused("access denied", uri)

        monkeypatch.setattr("segpipe.models.pretrained.read_uri", refuse)
        card = card_of("unet")
        with pytest.raises(StorageRefused):
            load_start(network_of(card), card, InitConfig(weights="s3://bucket/w.pth"))
