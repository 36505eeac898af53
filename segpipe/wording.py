"""Numbers and names in messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

_MOST_KEPT: Final = 20


def counted(count: int, noun: str) -> str:
    """Return ``1 scene``, ``2 scenes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def plain(value: float) -> str:
    """Return four digits of a number, or all before its point, grouped and never with an exponent."""
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def few(names: Sequence[str], most: int = 5, separator: str = ", ", total: int | None = None) -> str:
    """Return the first names and how many more there are.

    ``total``: how many there are in all, where ``names`` has only the first of them.
    """
    more = (len(names) if total is None else total) - min(len(names), most)
    return separator.join(names[:most]) + (f" and {more} more" if more > 0 else "")


@dataclass(slots=True)
class Named:
    """A count, with the first few names: memory is bounded whatever the archive."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < _MOST_KEPT:
            self.first.append(name)

    def text(self, most: int = 5) -> str:
        """Return the first names and how many more there are."""
        return few(self.first, most, total=self.count)
