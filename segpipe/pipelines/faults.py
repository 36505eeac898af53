"""Carries what a worker raised to the driver, as text: Ray keeps only its traceback."""

from __future__ import annotations

import json
import traceback

from segpipe import errors


def encode_fault(error: Exception) -> str:
    """Return the error as JSON: nearest public class and arguments of ours, else its kind and traceback."""
    if isinstance(error, errors.SegpipeError):
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return json.dumps({"class": kind.__name__, "args": list(map(str, error.args))})
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
