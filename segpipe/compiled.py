"""Loops over pixels, compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function`` at its first call, kept on disk where a folder can be written.

    Only for functions of a module: what is defined within another is never found on disk again. It releases
    the GIL, keeps the order of floating-point sums, and divides as numpy does.
    """
    options = {"nogil": True, "fastmath": False, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor a cache folder can be written
        return numba.njit(**options)(function)
