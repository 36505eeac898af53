"""The exception tree: a class says what a handler does, and so carries the exit code.

SegpipeError        1  a bug, or an error nobody classified
  InputError        2  wrong input or config; nothing was written
    ConfigError     2  the config itself is wrong
  StorageError      3  storage failed; the same command goes on where it stopped
    ObjectMissing   3  no object under that key
    ObjectChanged   3  the object is no longer the version that was pinned
    StorageRefused  3  storage answers and says no (no bucket, 401, 403)
    StorageFull     3  no space left
  IncompleteError   3  a run ended with units missing
  CheckError        4  a gate or a check failed
  SceneError        5  one scene's fault: mostly caught, and then a failed row with a ``kind``
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# Kinds are part of the stored format: append only, never rename.
ERROR_KINDS: Final = (
    "not_found",  # the scene's file is gone
    "not_raster",  # the content is no raster that we open (text, VRT, 0 bytes)
    "header",  # a raster whose header cannot be read
    "limit",  # the header claims more than the limits allow
    "decode",  # pixels cannot be decoded (truncated, CRC)
    "bands",  # fewer bands than are wanted
    "dtype",  # a pixel type that the model cannot take
    "valid_mask",  # the validity sidecar is missing, unreadable or of another size
    "scene_changed",  # another version than the plan's was found while reading
    "shard_count",  # an image shard has not the member count that was planned
    "label_read",  # the label is missing or cannot be read
    "label_size",  # the label is not on the scene's grid
    "label_value",  # the label holds values that no class maps
    "kills_worker",  # the unit ended its worker twice, alone
    "mask_missing",  # evaluate --masks: the run has no mask for these pixels
)


class SegpipeError(Exception):
    """Base of all errors. A message says what is wrong, where, and what to do.

    The three parts stay positional so that instances survive pickling between processes.
    """

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.fix}" if self.fix else text


class InputError(SegpipeError, ValueError):
    """Wrong input or config, nearly always found before anything is written.

    A training may meet damaged shards, or too little memory, only later.
    """

    exit_code = 2


class ConfigError(InputError):
    """The config is wrong: unknown key, bad value, contradiction."""


class StorageError(SegpipeError, OSError):
    """Storage failed after all retries; nothing half-written is left."""

    exit_code = 3


class ObjectMissing(StorageError):
    """There is no object under that key."""


class ObjectChanged(StorageError):
    """The object is there, but not in the version that was asked for."""


class StorageRefused(StorageError):
    """Storage says no for good: no such bucket, 401, 403, no write permission."""


class StorageFull(StorageError):
    """No space left on the device."""


class IncompleteError(SegpipeError):
    """A run ended with units missing; the same command again goes on."""

    exit_code = 3


class CheckError(SegpipeError):
    """A check failed: a damaged object, a gate that was not passed."""

    exit_code = 4


class SceneError(SegpipeError):
    """The fault of one scene. ``kind`` is one of ERROR_KINDS; the rest of the archive goes on."""

    exit_code = 5

    def __init__(self, kind: str, what: str, where: str = "", fix: str = "") -> None:
        if kind not in ERROR_KINDS:
            raise ValueError(f"unknown error kind {kind!r}")
        super().__init__(what, where, fix)
        self.kind = kind
        self.args = (kind, what, where, fix)  # what pickle hands to __init__


@contextmanager
def nothing_written() -> Iterator[None]:
    """Turn storage that refuses, or lacks an object, into wrong input: nothing is written yet (exit 2)."""
    try:
        yield
    except (StorageRefused, ObjectMissing) as error:
        raise InputError(error.what, error.where, error.fix or "Correct the path.") from error


def first_line(error: BaseException, most_chars: int = 300) -> str:
    """The first line of an error's text: other programs' go on for many. Of ours without place and advice."""
    text = error.what if isinstance(error, SegpipeError) else str(error)
    return text.strip().partition("\n")[0][:most_chars] or type(error).__name__
