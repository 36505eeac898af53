"""Let glibc keep the pages that torch frees: mapping them anew costs up to half of a forward pass on CPU."""

from __future__ import annotations

import ctypes
import platform
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST: Final = 2**31 - 1


def keep_freed_pages() -> bool:
    """Tell malloc to serve large arrays from its heap and never to give the heap back.

    Holds for the whole process and cannot be undone; call it once, before the first forward pass. Returns
    whether it took effect: not without glibc (musl, macOS), where nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    done = [libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST), libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST)]
    return all(done)
