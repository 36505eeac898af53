"""Which versions made something: kept in run files."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of installed packages by name, and that of ``python``.

    Raises `importlib.metadata.PackageNotFoundError` for a package that is not installed.
    """
    return {name: importlib.metadata.version(name) for name in packages} | {
        "python": platform.python_version()
    }
