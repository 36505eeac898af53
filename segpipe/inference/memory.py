"""Let glibc keep the pages that torch frees: mapping them anew costs up to half of a forward pass on CPU."""

from __future__ import annotations

import ctypes
import platform
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGEST: Final = 2**31 - 1


def keep_freed_pages() -> bool:
    """Tell malloc to serve large arrays from its one heap and never to give the heap back.

    Threads share the heap: arenas of their own are cut into pieces of 64 MB that are unmapped when empty.
    Holds for the whole process and cannot be undone; call it before other threads start, then they have no
    arena yet. Returns whether it took effect: not without glibc (musl, macOS), where nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    options = (_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _LARGEST), (_M_ARENA_MAX, 1)
    results = [libc.mallopt(option, value) for option, value in options]  # every one is to be tried
    return all(results)
