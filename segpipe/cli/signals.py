"""Ctrl-C and SIGTERM: raised where they arrive, and once more at the next event if a library swallowed that.

Imports within C code do so, such as those of pandas and numpy.random.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM; like Ctrl-C no error that a step of the work may take for its own."""


_EXCEPTIONS: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
}
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_asked: list[int] = []


@contextmanager
def heard() -> Iterator[None]:
    """Handle both in this context, except one that the parent told us to ignore, as shells do for ``&``."""
    _asked.clear()
    before = {number: signal.getsignal(number) for number in _EXCEPTIONS}
    ours = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def check() -> None:
    """Raise a signal again that a library swallowed."""
    if _asked:
        raise _EXCEPTIONS[_asked[-1]]


def exit_code() -> int | None:
    """The exit code of the last signal; None = there was none."""
    return _EXIT_CODES[signal.Signals(_asked[-1])] if _asked else None


def _on_signal(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    raise _EXCEPTIONS[number]
