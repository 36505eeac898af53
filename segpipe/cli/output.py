"""Results on stdout: one JSON object with --json, lines for people without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

_SCHEMA_VERSION: Final = 1


def print_json(tree: Mapping[str, Any], exit_code: int = 0) -> None:
    """Print one JSON object, of every command with ``schema_version`` and ``exit_code``."""
    print(json.dumps({"schema_version": _SCHEMA_VERSION, **tree, "exit_code": exit_code}))


def print_fields(tree: Mapping[str, Any], as_json: bool) -> None:
    """Print what a dry run found: a JSON object, or a line a field."""
    if as_json:
        print_json(tree)
        return
    width = max(map(len, tree))
    for name, value in tree.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        print(f"{name:<{width}}  {value}")
