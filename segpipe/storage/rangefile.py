"""A seekable file over range reads: a bounded cache of blocks, read ahead when reading goes on."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

BLOCK_BYTES: Final = 1 << 16
READ_AHEAD_BYTES: Final = 4 << 20
CACHE_BYTES: Final = 32 << 20
PIECE_BYTES: Final = 8 << 20
"""Long reads are cut into pieces of this size, fetched side by side."""

FetchRanges = Callable[[Sequence[tuple[int, int]]], list[bytes]]
"""(start, length) pairs, all inside the object -> their bytes, exactly."""


class RangeFile(io.RawIOBase):
    """A read-only file of ``size_bytes`` bytes over ``fetch``.

    A read fetches the missing blocks that it touches, each contiguous run as one range. When a read begins
    where the last one ended, the fetch grows by doubling up to ``READ_AHEAD_BYTES``; a jump ends that, so
    windowed readers pay for at most a block on each side. At most ``CACHE_BYTES`` are kept. Thread-safe.
    """

    def __init__(self, fetch: FetchRanges, size_bytes: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.size_bytes = size_bytes
        self._fetch = fetch
        self._position = 0
        self._last_end = -1
        self._ahead = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.RLock()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._lock:
            base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
            if base + offset < 0:
                raise ValueError(f"negative seek position {base + offset}")
            self._position = base + offset
            return self._position

    def read(self, size: int | None = -1) -> bytes:
        with self._lock:
            if self.closed:
                raise ValueError("read of a closed file")
            left = max(0, self.size_bytes - self._position)
            length = left if size is None or size < 0 else min(size, left)
            data = self._read_at(self._position, length)
            self._position += length
            return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch the blocks of several (start, length) ranges side by side, as far as the cache holds them."""
        with self._lock:
            wanted: set[int] = set()
            for start, length in ranges:
                end = min(start + length, self.size_bytes)
                if end > start >= 0:
                    wanted.update(range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)))
            missing = sorted(wanted - self._blocks.keys())[: CACHE_BYTES // BLOCK_BYTES]
            for run, data in self._fetch_runs(missing):
                self._keep(run, data)

    def close(self) -> None:
        with self._lock:  # a thread of a library that still reads ends first: it may not outlive Python
            self._blocks.clear()
            super().close()

    def _read_at(self, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``start``; both lie inside the object."""
        if not length:
            return b""
        end = start + length
        if start == self._last_end:
            self._ahead = min(max(2 * self._ahead, BLOCK_BYTES), READ_AHEAD_BYTES)
        else:
            self._ahead = 0
        self._last_end = end
        first, last = start // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        missing = [index for index in range(first, last) if index not in self._blocks]
        if missing and missing[-1] == last - 1 and self._ahead:
            stop = min(-(-(end + self._ahead) // BLOCK_BYTES), -(-self.size_bytes // BLOCK_BYTES))
            missing += [index for index in range(last, stop) if index not in self._blocks]
        pieces: dict[int, bytes] = {}
        for index in range(first, last):  # taken out first: keeping new blocks may push old ones out
            if (block := self._blocks.get(index)) is not None:
                self._blocks.move_to_end(index)
                pieces[index] = block
        for run, data in self._fetch_runs(missing):
            for offset, index in enumerate(run):
                if first <= index < last:
                    pieces[index] = data[offset * BLOCK_BYTES : (offset + 1) * BLOCK_BYTES]
            self._keep(run, data)
        joined = b"".join(pieces[index] for index in range(first, last))
        return joined[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def _fetch_runs(self, missing: Sequence[int]) -> list[tuple[range, bytes]]:
        """Fetch blocks as contiguous runs, none longer than a piece."""
        runs: list[range] = []
        longest = PIECE_BYTES // BLOCK_BYTES
        for index in missing:
            if runs and runs[-1].stop == index and len(runs[-1]) < longest:
                runs[-1] = range(runs[-1].start, index + 1)
            else:
                runs.append(range(index, index + 1))
        if not runs:
            return []
        ranges = [
            (run.start * BLOCK_BYTES, min(run.stop * BLOCK_BYTES, self.size_bytes) - run.start * BLOCK_BYTES)
            for run in runs
        ]
        return list(zip(runs, self._fetch(ranges), strict=True))

    def _keep(self, run: range, data: bytes) -> None:
        for offset, index in enumerate(run):
            self._blocks[index] = data[offset * BLOCK_BYTES : (offset + 1) * BLOCK_BYTES]
        while len(self._blocks) > CACHE_BYTES // BLOCK_BYTES:
            self._blocks.popitem(last=False)
