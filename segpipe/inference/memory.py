"""Which freed pages glibc keeps: all where a model runs, none where a driver goes over to other work."""

from __future__ import annotations

import ctypes
import platform
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGEST: Final = 2**31 - 1
_HEAP_BYTES: Final = 2**26
"""Size of the pieces in which glibc grows every arena but the first."""


def keep_freed_pages() -> bool:
    """Tell malloc to serve large arrays from its heaps and never to give the heaps back.

    Mapping pages anew costs up to half of a forward pass on CPU. Threads to come share one heap; those that
    are here already, or take the place of such, have arenas of pieces of 64 MB, which malloc unmaps when
    empty unless it is told to keep that much in reserve. Holds for the whole process and cannot be undone.
    Returns whether it took effect: not without glibc (musl, macOS), where nothing is changed.
    """
    libc = _glibc()
    if libc is None:
        return False
    options = (
        (_M_MMAP_THRESHOLD, _LARGEST),
        (_M_TRIM_THRESHOLD, _LARGEST),
        (_M_ARENA_MAX, 1),
        (_M_TOP_PAD, 2 * _HEAP_BYTES),
    )
    results = [libc.mallopt(option, value) for option, value in options]  # every one is to be tried
    return all(results)


def return_freed_pages() -> None:
    """Give the system the freed pages that lie between used ones too; does nothing without glibc.

    The many threads of Ray leave some 10 MB of them in a driver after a few thousand results.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
