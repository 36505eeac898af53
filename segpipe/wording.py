"""Numbers and names in messages."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str) -> str:
    """Return ``1 scene``, ``2 scenes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def few(names: Sequence[str], most: int = 5, separator: str = ", ", total: int | None = None) -> str:
    """Return the first names and how many more there are.

    ``total``: how many there are in all, where ``names`` has only the first of them.
    """
    more = (len(names) if total is None else total) - min(len(names), most)
    return separator.join(names[:most]) + (f" and {more} more" if more > 0 else "")
