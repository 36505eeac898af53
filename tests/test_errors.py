"""Every message says what to do, proved from the source."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "segpipe"

# Positional arguments up to the advice.
UP_TO_FIX = {
    "SceneError": 4,
    "InputError": 3,
    "ConfigError": 3,
    "StorageError": 3,
    "StorageRefused": 3,
    "StorageFull": 3,
    "IncompleteError": 3,
}


def test_errors_of_input_and_storage_say_what_to_do() -> None:
    without, num_calls = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            least = UP_TO_FIX.get(node.func.id)
            if least is None or any(isinstance(argument, ast.Starred) for argument in node.args):
                continue
            num_calls += 1
            if len(node.args) < least and "fix" not in {keyword.arg for keyword in node.keywords}:
                without.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert num_calls > 100
    assert without == []
