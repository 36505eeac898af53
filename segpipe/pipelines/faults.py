"""Carries what a worker raised to the driver, as text: Ray keeps only its traceback."""

from __future__ import annotations

import json
import traceback

from segpipe import errors


def encode_fault(error: Exception) -> str:
    """Return the error as JSON: class and arguments of one of ours, else what it is and its traceback."""
    if isinstance(error, errors.SegpipeError):
        return json.dumps({"class": type(error).__name__, "args": list(map(str, error.args))})
    lines = traceback.format_exception(error)
    return json.dumps({"class": None, "args": [f"{type(error).__name__}: {error}", "".join(lines)]})


def decode_fault(text: str) -> Exception:
    """Return the error that ``encode_fault`` described; one that is not ours as a noted RuntimeError."""
    fault = json.loads(text)
    kind = getattr(errors, fault["class"], None) if fault["class"] else None
    if kind is None:
        named, lines = fault["args"]
        bug = RuntimeError(f"a worker failed: {named}")
        bug.add_note(lines)
        return bug
    return kind(*fault["args"])
