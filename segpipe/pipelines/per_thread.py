"""Things that each thread of a worker opens for itself, such as the readers of a scene."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from segpipe.errors import SceneError

Value = TypeVar("Value")
Result = TypeVar("Result")

_OPEN_PER_THREAD: Final = 2
"""The scene being read, and the one before it whose last block may be asked for again."""

_UNREAD: Final = ("header", "decode", "valid_mask", "label_read")
"""Kinds of faults that may be of reading and not of the file."""


class PerThread(Generic[Value]):
    """Keeps the last few opened things of each thread: readers must not be shared between threads."""

    def __init__(self, close: Callable[[Value], None] | None = None) -> None:
        self._local = threading.local()
        self._close = close

    def get(self, key: str, opener: Callable[[], Value]) -> Value:
        opened: OrderedDict[str, Value] | None = getattr(self._local, "opened", None)
        if opened is None:
            opened = self._local.opened = OrderedDict()
        if key in opened:
            opened.move_to_end(key)
            return opened[key]
        while len(opened) >= _OPEN_PER_THREAD:
            _, old = opened.popitem(last=False)
            if self._close is not None:
                self._close(old)
        value = opened[key] = opener()
        return value

    def use(self, key: str, opener: Callable[[], Value], action: Callable[[Value], Result]) -> Result:
        """Return what ``action`` gives of the opened thing; one that fails is closed.

        One whose file could not be read is opened anew, once: a network file system gives up open files.
        """
        try:
            return self._use(key, opener, action)
        except SceneError as error:
            if error.kind not in _UNREAD:
                raise
        return self._use(key, opener, action)

    def _use(self, key: str, opener: Callable[[], Value], action: Callable[[Value], Result]) -> Result:
        try:
            return action(self.get(key, opener))
        except BaseException:
            self._drop(key)
            raise

    def _drop(self, key: str) -> None:
        value = getattr(self._local, "opened", {}).pop(key, None)
        if value is not None and self._close is not None:
            self._close(value)
