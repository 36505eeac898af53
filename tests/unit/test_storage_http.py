"""Reading over HTTP: faults that pass are tried again, others are told in one line."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from segpipe.errors import ObjectMissing, StorageError, StorageRefused
from segpipe.storage import open_storage, retry

BODY = bytes(range(100))


class _Server(http.server.ThreadingHTTPServer):
    """Gives each status in ``answers`` once, then the body; 0 = an answer cut short."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[int] = []
        self.asked = 0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/folder"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.asked += 1
        status = self.server.answers.pop(0) if self.server.answers else 200
        body = BODY if status in (0, 200) else b""
        self.send_response(status or 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if status else body[:40])
        if not status:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(retry, "_WAIT", 0)
    with _Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("answers", [[], [503], [500, 502, 429], [0]])
def test_a_fault_that_passes_is_tried_again(server: _Server, answers: list[int]) -> None:
    server.answers = list(answers)
    assert open_storage(server.uri).read("weights.pth") == BODY
    assert server.asked == len(answers) + 1


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        (404, ObjectMissing, "no such object"),
        (403, StorageRefused, "access denied"),
        (418, StorageError, "HTTP 418"),
    ],
)
def test_any_other_answer_ends_it_at_once(
    server: _Server, status: int, error: type[Exception], text: str
) -> None:
    server.answers = [status]
    with pytest.raises(error, match=text):
        open_storage(server.uri).read("weights.pth")
    assert server.asked == 1


def test_a_server_that_goes_on_failing_is_given_up(server: _Server) -> None:
    server.answers = [503] * 20
    with pytest.raises(StorageError, match=r"failed 8 times .* HTTP 503"):
        open_storage(server.uri).read("weights.pth")
    assert server.asked == retry.ATTEMPTS


@pytest.mark.parametrize(("answers", "is_there"), [([200], True), ([404] * 9, False), ([410] * 9, False)])
def test_absence_is_what_the_server_says(server: _Server, answers: list[int], is_there: bool) -> None:
    server.answers = list(answers)
    assert (open_storage(server.uri).stat("weights.pth") is not None) is is_there


def test_a_server_that_does_not_answer_is_no_absence(server: _Server) -> None:
    storage = open_storage(server.uri)
    server.shutdown()
    server.server_close()
    with pytest.raises(StorageError, match="failed") as caught:
        storage.stat("weights.pth")
    assert not isinstance(caught.value, ObjectMissing)


def test_a_server_that_fails_or_refuses_is_no_absence(server: _Server) -> None:
    server.answers = [503] * 99
    with pytest.raises(StorageError, match="503"):
        open_storage(server.uri).stat("weights.pth")
    server.answers = [403] * 99
    with pytest.raises(StorageRefused, match="403"):
        open_storage(server.uri).stat("weights.pth")


def test_a_server_without_range_requests_is_told_at_once(server: _Server) -> None:
    storage = open_storage(server.uri)
    with pytest.raises(StorageError, match=r"100 bytes where 10 .* must honour range requests: .*\.$"):
        storage.read_ranges("weights.pth", [(0, 10), (50, 10)])
    assert server.asked <= 4  # what it is, and one answer a range
    assert storage.read_range("weights.pth", 0, 200) == BODY  # the whole object needs no range


def test_a_range_that_is_cut_short_is_asked_for_again(server: _Server) -> None:
    server.answers = [200, 0]
    assert open_storage(server.uri).read_range("weights.pth", 0, len(BODY)) == BODY
