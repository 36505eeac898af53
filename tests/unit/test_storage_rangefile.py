"""The file over range reads: right bytes, few of them, bounded memory."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segpipe.storage import rangefile
from segpipe.storage.rangefile import BLOCK_BYTES, CACHE_BYTES, PIECE_BYTES, READ_AHEAD_BYTES, RangeFile

DATA = np.random.default_rng(0).bytes(40 * BLOCK_BYTES + 12_345)


class Source:
    """Counts what is fetched of ``data``."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.calls: list[list[tuple[int, int]]] = []

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.calls.append(list(ranges))
        for start, length in ranges:
            assert 0 <= start < start + length <= len(self.data)
        return [self.data[start : start + length] for start, length in ranges]

    @property
    def fetched_bytes(self) -> int:
        return sum(length for call in self.calls for _, length in call)


def opened(data: bytes = DATA) -> tuple[RangeFile, Source]:
    source = Source(data)
    return RangeFile(source.fetch, len(data), "name"), source


@given(
    st.integers(0, 3 * BLOCK_BYTES),
    st.lists(st.tuples(st.integers(0, 4 * BLOCK_BYTES), st.integers(-1, 3 * BLOCK_BYTES)), max_size=12),
)
def test_any_sequence_of_seeks_and_reads_gives_the_bytes_of_the_object(
    size: int, steps: list[tuple[int, int]]
) -> None:
    file, _ = opened(DATA[:size])
    plain = io.BytesIO(DATA[:size])
    for position, length in steps:
        if position % 3:  # else go straight on
            assert file.seek(position) == plain.seek(position)
        assert file.read(length) == plain.read(length)


def test_a_small_read_fetches_one_block_once() -> None:
    file, source = opened()
    file.seek(5 * BLOCK_BYTES + 10)
    file.read(100)
    file.seek(5 * BLOCK_BYTES)
    file.read(50)
    assert source.calls == [[(5 * BLOCK_BYTES, BLOCK_BYTES)]]


def test_scattered_windows_fetch_at_most_a_block_more_on_each_side() -> None:
    file, source = opened()
    for start in (1, 9, 17, 25):
        file.seek(start * BLOCK_BYTES + 7)
        file.read(3 * BLOCK_BYTES)
    assert source.fetched_bytes == 4 * 4 * BLOCK_BYTES


def test_reading_straight_on_needs_few_requests_and_fetches_nothing_twice() -> None:
    file, source = opened()
    parts = []
    while part := file.read(10_000):
        parts.append(part)
    assert b"".join(parts) == DATA
    assert source.fetched_bytes == len(DATA)
    assert len(source.calls) <= 8


def test_read_ahead_is_bounded() -> None:
    data = bytes(40 << 20)
    file, source = opened(data)
    while file.tell() < 20 << 20:
        file.read(100_000)
    assert max(length for call in source.calls for _, length in call) <= READ_AHEAD_BYTES + 3 * BLOCK_BYTES
    assert source.fetched_bytes <= (20 << 20) + READ_AHEAD_BYTES + BLOCK_BYTES


def test_a_long_read_is_cut_into_pieces_of_one_call_and_the_cache_stays_bounded() -> None:
    data = bytes(CACHE_BYTES + 3 * PIECE_BYTES)
    file, source = opened(data)
    assert file.read() == data
    assert len(source.calls) == 1
    assert max(length for _, length in source.calls[0]) == PIECE_BYTES
    assert sum(map(len, file._blocks.values())) <= CACHE_BYTES


def test_old_blocks_are_fetched_again_when_the_cache_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rangefile, "CACHE_BYTES", 2 * BLOCK_BYTES)
    file, source = opened()
    for block in (0, 10, 20, 0):
        file.seek(block * BLOCK_BYTES)
        assert file.read(10) == DATA[block * BLOCK_BYTES : block * BLOCK_BYTES + 10]
    assert len(source.calls) == 4


def test_prefetched_ranges_are_read_without_another_request() -> None:
    file, source = opened()
    ranges = [(100, 50), (10 * BLOCK_BYTES - 5, 10), (39 * BLOCK_BYTES, 5 * BLOCK_BYTES), (10**9, 5)]
    file.prefetch(ranges)
    assert len(source.calls) == 1
    for start, length in ranges:
        file.seek(start)
        assert file.read(length) == DATA[start : start + length]
    assert len(source.calls) == 1


def test_no_more_is_prefetched_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rangefile, "CACHE_BYTES", 3 * BLOCK_BYTES)
    file, source = opened()
    file.prefetch([(0, 2 * BLOCK_BYTES), (10 * BLOCK_BYTES, 20 * BLOCK_BYTES)])
    assert source.fetched_bytes == 3 * BLOCK_BYTES
    assert file.read(100) == DATA[:100]
    assert source.fetched_bytes == 3 * BLOCK_BYTES, "what was fetched is still there"


def test_threads_may_share_a_file() -> None:
    file, _ = opened()

    def check(index: int) -> bool:
        start = index * 1000
        with file._lock:
            file.seek(start)
            return file.read(500) == DATA[start : start + 500]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(200)))


def test_a_closed_file_cannot_be_read() -> None:
    file, _ = opened()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_a_seek_before_the_start_is_refused() -> None:
    file, _ = opened()
    with pytest.raises(ValueError, match="negative"):
        file.seek(-1)


def test_closing_waits_for_a_read_of_another_thread() -> None:
    reading, go_on, order = threading.Event(), threading.Event(), []

    def fetch(ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        reading.set()
        assert go_on.wait(30)
        order.append("read")
        return [bytes(length) for _, length in ranges]

    file = RangeFile(fetch, 100, "name")
    with ThreadPoolExecutor(2) as pool:
        read = pool.submit(file.read, 10)
        assert reading.wait(30)
        closed = pool.submit(lambda: (file.close(), order.append("closed")))
        assert wait([closed], timeout=0.2).not_done
        go_on.set()
        assert read.result(30) == bytes(10)
        closed.result(30)
    assert order == ["read", "closed"]
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
