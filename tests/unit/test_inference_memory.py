"""Which freed pages glibc keeps, in processes of their own: both calls change the whole process."""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from segpipe.inference.memory import keep_freed_pages, return_freed_pages

STATM = Path("/proc/self/statm")
SMALL_BYTES = 2_000  # of malloc's heap: larger than Python's own small objects
NUM_SMALL = 20_000
LARGE_BYTES = 20 * 2**20
NUM_LARGE = 40

on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not STATM.exists(), reason="reads /proc of a Linux with glibc"
)


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * 4096


def freed_and_returned() -> tuple[int, int]:
    """Free many small pieces below one that stays; return resident bytes before and after the call."""
    pieces = [bytes(SMALL_BYTES) for _ in range(NUM_SMALL)]
    last = bytes(SMALL_BYTES)  # the heap cannot shrink from its end
    del pieces
    before = resident_bytes()
    return_freed_pages()
    assert len(last) == SMALL_BYTES
    return before, resident_bytes()


@on_glibc
def test_freed_pages_below_used_ones_go_back_to_the_system() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, after = pool.apply(freed_and_returned)
    assert before - after > 0.8 * SMALL_BYTES * NUM_SMALL


@on_glibc
def test_pages_are_kept_where_that_was_asked_for() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(keep_freed_pages) is True


def faults_of_a_thread_with_an_arena_of_its_own() -> int:
    """Page faults of a thread that fills and frees 100 MB over and over, in an arena left by another one."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def use(times: int) -> int:
        begin = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(times):
            places = [libc.malloc(ctypes.c_size_t(LARGE_BYTES)) for _ in range(5)]  # more than a piece
            for place in places:
                ctypes.memset(place, 1, LARGE_BYTES)
                libc.free(ctypes.c_void_p(place))
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - begin

    with ThreadPoolExecutor(1) as first:
        first.submit(use, 1).result()
    keep_freed_pages()
    with ThreadPoolExecutor(1) as second:
        return second.submit(use, NUM_LARGE).result()


@on_glibc
def test_pages_are_kept_in_the_arenas_of_threads_that_were_there_before() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        faults = pool.apply(faults_of_a_thread_with_an_arena_of_its_own)
    assert faults < 2 * 5 * LARGE_BYTES / 4096, "they are mapped once, not every time"


def test_malloc_is_left_alone_without_glibc(monkeypatch: Any) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_pages() is False
    return_freed_pages()
