"""Telling damaged bytes from failing storage: what a Parquet reader raises becomes one clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from segpipe.errors import CheckError, SegpipeError, StorageError


@contextmanager
def explain_damage(where: str) -> Iterator[None]:
    """Turn errors of decoding stored bytes into CheckError; storage's own errors pass as they are."""
    try:
        yield
    except SegpipeError:
        raise
    except OSError as error:
        if error.errno is not None:  # Arrow's own complaints about bytes carry no number
            raise StorageError(os.strerror(error.errno).lower(), where) from error
        raise damaged(error, where) from error
    except (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise damaged(error, where) from error


def damaged(error: BaseException, where: str) -> CheckError:
    """Return the CheckError that says what a reader complained about, on one line."""
    lines = str(error).splitlines()
    return CheckError(f"the object is damaged ({lines[0][:200] if lines else type(error).__name__})", where)
