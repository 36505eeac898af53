"""Which source gave which key of a config, so that a message sends nobody to a file that is right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

FLAGS: Final = "flags"
SETS: Final = "--set"


class Fault(NamedTuple):
    """What is wrong with a key; "" where no source gave it."""

    key: str
    text: str
    rule: str = ""
    """A rule across keys: the other keys that it names are at fault as well."""


class Origins:
    """The text's own keys, and what flags and sets gave over them."""

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._in_text = set(_dotted(tree))
        self._given: dict[str, str] = {}

    def add(self, key: str, source: str) -> None:
        """``source`` gave ``key``, in place of all that was there."""
        kept = {name: one for name, one in self._given.items() if not name.startswith(f"{key}.")}
        self._given = kept | {key: source}

    def message(self, faults: Iterable[Fault]) -> tuple[str, str]:
        """Where the first faults lie, and all faults, those of other sources with their own place."""
        found: dict[str, list[str]] = {}
        for fault in faults:
            found.setdefault(self._of(fault), []).append(fault.text)
        (where, first), *others = found.items()
        return where, "; ".join([*first, *(f"{source}: {'; '.join(texts)}" for source, texts in others)])

    def _of(self, fault: Fault) -> str:
        key = fault.key.partition("[")[0]
        above = [name for name in self._given if f"{key}.".startswith(f"{name}.")]
        below = [source for name, source in self._given.items() if name.startswith(f"{key}.")]
        words = set(re.findall(r"\w+", fault.rule))
        others = [source for name, source in self._given.items() if name.rpartition(".")[2] in words]
        sources = [self._given[max(above, key=len)]] if above else []
        if not above and (key in self._in_text or not below):
            sources = [self._where]
        return " and ".join(dict.fromkeys([*sources, *below, *others]))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
