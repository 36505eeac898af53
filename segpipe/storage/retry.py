"""The one retry policy. The clients below it retry nothing themselves, so waits never multiply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from segpipe.errors import StorageError

T = TypeVar("T")

ATTEMPTS: Final = 8
TOTAL_S: Final = 60.0
FIRST_WAIT_S: Final = 0.2
LONGEST_WAIT_S: Final = 10.0


class Transient(Exception):
    """A fault that may pass: throttling, 5xx, a reset, a timeout, a short body. Never leaves storage.

    ``reason`` is free of credentials and of URLs with signatures.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


_STOP: Final = stop_after_attempt(ATTEMPTS) | stop_after_delay(TOTAL_S)
_WAIT: Final = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)  # full jitter
_RETRY: Final = retry_if_exception_type(Transient)


def retry(call: Callable[[], T], where: str) -> T:
    """``call()``, again after each ``Transient``; a ``StorageError`` naming ``where`` when no try is left."""
    try:
        return Retrying(stop=_STOP, wait=_WAIT, retry=_RETRY, reraise=True)(call)
    except Transient as fault:
        raise _given_up(fault, where) from None


async def retry_async(call: Callable[[], Awaitable[T]], where: str) -> T:
    """``retry`` for a coroutine function."""

    async def attempt() -> T:  # tenacity awaits only what was defined as async
        return await call()

    try:
        return await AsyncRetrying(stop=_STOP, wait=_WAIT, retry=_RETRY, reraise=True)(attempt)
    except Transient as fault:
        raise _given_up(fault, where) from None


def _given_up(fault: Transient, where: str) -> StorageError:
    what = f"storage failed {ATTEMPTS} times or for {TOTAL_S:.0f} s: {fault.reason}"
    return StorageError(what, where, "Run the same command again when it answers.")
