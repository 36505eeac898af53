"""Arrays of whole blocks, in memory of their own."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

_LEAST_BYTES: Final = 2**21
"""One huge page; what is smaller fits the holes of the heap."""


def block_zeros(shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
    """Return zeros like ``np.zeros``, from 2 MB on outside of the heap, as huge pages where there are any.

    Blocks come and go between what a network keeps, so in a heap whose pages are kept they would leave holes
    that grow for minutes; and mapping them in pages of 4 kB would cost a reader as much as decoding.

    Raises:
        MemoryError: There is not that much.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_bytes < _LEAST_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.zeros(shape, dtype)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {num_bytes} bytes of a block: {error.strerror}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.ndarray(shape, dtype, buffer=pages)
