"""Opening stored Parquet so that damaged bytes are told from failing storage, in one clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.errors import CheckError, ObjectMissing, SegpipeError, StorageError, first_line
from segpipe.storage import Storage

_WHOLE_OBJECT_BYTES: Final = 8 << 20  # smaller objects are fetched in one request


@contextmanager
def explain_damage(where: str) -> Iterator[None]:
    """Turn errors of decoding stored bytes into CheckError; storage's own errors pass as they are."""
    try:
        yield
    except SegpipeError:
        raise
    except OSError as error:
        if error.errno is not None:  # Arrow's own complaints about bytes carry no number
            what = os.strerror(error.errno).lower()
            raise StorageError(what, where, "Run the same command again.") from error
        raise damaged(error, where) from error
    except (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise damaged(error, where) from error


def damaged(error: BaseException, where: str) -> CheckError:
    """Return the CheckError that says what a reader complained about, on one line."""
    what = f"the object is damaged ({first_line(error, 200)})"
    fix = "Put a whole copy back. A mask object may be deleted: the run's own command writes it again."
    return CheckError(what, where, fix)


def open_parquet(
    storage: Storage, key: str, size_bytes: int | None = None, *, check_pages: bool = False
) -> Any:
    """Open a Parquet object (a ``pyarrow.parquet.ParquetFile``).

    Args:
        size_bytes: The object's size where it is known; storage is asked otherwise.
        check_pages: Compare the checksums of pages, and read nothing ahead: memory is a few pages.

    Raises ObjectMissing, and CheckError when it is damaged.
    """
    where = storage.uri(key)
    path = storage.local_path(key)
    source: Any = path
    with explain_damage(where):
        if path is not None:
            if not path.is_file():
                raise ObjectMissing("no such file", where)
        else:
            if size_bytes is None:
                info = storage.stat(key)
                if info is None:
                    raise ObjectMissing("no such object", where)
                size_bytes = info.size_bytes
            if size_bytes <= _WHOLE_OBJECT_BYTES:
                source = pa.BufferReader(storage.read(key))
            else:
                source = storage.open_range(key)
        return pq.ParquetFile(source, page_checksum_verification=check_pages, pre_buffer=not check_pages)
