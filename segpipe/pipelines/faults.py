"""Carries what a worker's constructor raised to the driver, as text: Ray keeps only its traceback."""

from __future__ import annotations

import json

from segpipe import errors


def encode_fault(error: Exception) -> str:
    """Return the error as JSON: the class and arguments of one of ours, else one line that names it."""
    if isinstance(error, errors.SegpipeError):
        return json.dumps({"class": type(error).__name__, "args": list(map(str, error.args))})
    return json.dumps({"class": None, "args": [f"{type(error).__name__}: {error}"]})


def decode_fault(text: str) -> Exception:
    """Return the error that ``encode_fault`` described; one that is not ours comes as a RuntimeError."""
    fault = json.loads(text)
    kind = getattr(errors, fault["class"], None) if fault["class"] else None
    if kind is None:
        return RuntimeError(f"a worker failed: {fault['args'][0]}")
    return kind(*fault["args"])
