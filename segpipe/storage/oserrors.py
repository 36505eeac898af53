"""The system's errors about local files, in this package's words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from segpipe.errors import InputError, ObjectMissing, StorageError, StorageFull, StorageRefused

_NO_FILE: Final = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "no such file"),
    errno.EISDIR: "a folder, and no file",
    errno.ELOOP: "a link that leads to itself",
}
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_DENIED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn the system's errors into this package's, with the path and what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise _explain(error, path) from error


def _explain(error: OSError, path: str) -> Exception:
    code = error.errno
    if code in _NO_FILE:
        return ObjectMissing(_NO_FILE[code], path)
    if code in _FULL:
        return StorageFull("no space left on the device", path, "Free space and run the same command again.")
    if code in _DENIED:
        text = (error.strerror or "not permitted").lower()
        return StorageRefused(text, path, "Check the permissions or choose another place.")
    if code == errno.ENAMETOOLONG:
        return InputError((error.strerror or "bad path").lower(), path, "Choose another name.")
    what = f"{(error.strerror or str(error)).lower()} (errno {code})"
    return StorageError(what, path, "Check the disk, then run the same command again.")
