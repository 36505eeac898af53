"""What keeps the start of a process short. Settings of the process are changed only where it is our own."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


class _Process:
    own = False
    thresholds: tuple[int, int, int] | None = None
    """Of the garbage collector, before `collect_rarely`."""


def declare_own_process() -> None:
    """Say that this process is the command line's, so that `quick_start` may change its settings."""
    _Process.own = True
    # Else pydantic looks through all installed packages for plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def quick_start(*, pandas: bool) -> None:
    """In a process of our own collect rarely, and spare pandas where nothing needs it; else do nothing."""
    if _Process.own:
        collect_rarely()
        if not pandas:
            _spare_pandas()


@contextmanager
def no_collection() -> Iterator[None]:
    """Leave the garbage collector out of imports. See `collect_rarely`.

    In a process of our own it never looks at what they made: modules stay to the end.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _Process.own or _Process.thresholds is not None:
            gc.freeze()
        if enabled:
            gc.enable()


def collect_rarely() -> None:
    """Have the garbage collector wait for 500,000 new objects instead of some hundreds.

    The imports of a worker make 600,000 objects that stay, and it walks over them again and again (0.4 s).
    Units leave it nothing to find; the driver of a Ray cluster goes back by `collect_as_usual`.
    """
    _Process.thresholds = _Process.thresholds or gc.get_threshold()
    gc.set_threshold(500_000, 10, 10)


def collect_as_usual() -> None:
    """Undo `collect_rarely`, if it was called."""
    if _Process.thresholds is not None:
        gc.set_threshold(*_Process.thresholds)
        _Process.thresholds = None


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is not looked for here", name=fullname)
        return None


def _spare_pandas() -> None:
    """Keep pyarrow from importing pandas in this process, unless something else has.

    With its first list pyarrow imports pandas (0.3 s), only to see whether that list is a Series; it looks
    once. Afterwards no Arrow table can be made into a data frame in this process.
    """
    if "pandas" in sys.modules:
        return
    import pyarrow as pa

    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)
