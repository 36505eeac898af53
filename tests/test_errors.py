"""Every message says what to do, in whole sentences: proved from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
# May have none.
MAY_ADVISE = dict.fromkeys(("SegpipeError", "ObjectMissing", "ObjectChanged", "CheckError"), 3)


def raised(least_of: dict[str, int]) -> Iterator[tuple[Path, ast.Module, ast.Call, ast.expr | None]]:
    """All calls of the classes in ``least_of`` with the file, its tree, and the advice if there is one."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            least = least_of.get(node.func.id)
            if least is None or any(isinstance(argument, ast.Starred) for argument in node.args):
                continue
            named = [keyword.value for keyword in node.keywords if keyword.arg == "fix"]
            yield path, tree, node, next(iter([*node.args[least - 1 : least], *named]), None)


def ends_of(tree: ast.Module, text: ast.expr) -> Iterator[str]:
    """How a text may end: looks into names and functions of its file; passes over what comes from outside."""
    if isinstance(text, ast.Constant):
        yield str(text.value)
    elif isinstance(text, ast.JoinedStr):
        yield from ends_of(tree, text.values[-1])
    elif isinstance(text, ast.FormattedValue):
        known = list(ends_of(tree, text.value)) if isinstance(text.value, ast.Name) else []
        yield from known or [f"{{{ast.unparse(text.value)}}}"]
    elif isinstance(text, ast.BinOp):
        yield from ends_of(tree, text.right)
    elif isinstance(text, ast.IfExp):
        yield from ends_of(tree, text.body)
        yield from ends_of(tree, text.orelse)
    elif isinstance(text, ast.Name):
        for value in values_of(tree, text.id):
            yield from ends_of(tree, value)
    elif isinstance(text, ast.Call) and isinstance(text.func, ast.Name):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == text.func.id:
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        yield from ends_of(tree, inner.value)


def values_of(tree: ast.Module, name: str) -> Iterator[ast.expr]:
    """What is assigned to a name anywhere in a file, alone or in a tuple."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        for target in targets:
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
            else:
                pairs = zip([target], [node.value], strict=True)
            for part, value in pairs:
                if isinstance(part, ast.Name) and part.id == name and value is not None:
                    yield value


def test_errors_of_input_and_storage_say_what_to_do() -> None:
    calls = list(raised(UP_TO_FIX))
    without = [f"{path}:{node.lineno}: {ast.unparse(node)}" for path, _, node, fix in calls if fix is None]
    assert len(calls) > 100
    assert without == []


def test_all_advice_ends_with_a_full_stop() -> None:
    open_ended, num_ends = [], 0
    for path, tree, node, fix in raised(UP_TO_FIX | MAY_ADVISE):
        for end in ends_of(tree, fix) if fix is not None else ():
            num_ends += 1
            if end and not end.endswith((".", "?")):
                open_ended.append(f"{path}:{node.lineno}: {end}")
    assert num_ends > 200
    assert open_ended == []
