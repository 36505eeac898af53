"""The layers of the package, proved from the imports in its source."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "segpipe"

# Higher imports lower; on one level only the named pairs may.
LEVELS = {
    "cli": 6,
    "demo": 6,
    "pipelines": 5,
    "training": 5,
    "reports": 4,
    "inference": 4,
    "datasets": 4,
    "models": 3,
    "masks": 3,
    "rasters": 3,
    "storage": 2,
    "metrics": 1,
    "geometry": 1,
    "config": 1,
    "errors": 0,
    "imports": 0,
    "compiled": 0,
    "pages": 0,
    "threads": 0,
    "versions": 0,
    "wording": 0,
    "segpipe": 0,
}
SIDEWAYS = {("masks", "rasters"), ("cli", "demo"), ("demo", "cli"), ("training", "pipelines")}

# Third-party packages that only some layers may import.
ONLY_IN = {
    "ray": {"pipelines", "training"},
    "torch": {"models", "inference", "datasets", "pipelines", "training"},
    "torchvision": {"models", "inference", "datasets", "training"},
    "rasterio": {"rasters"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "typer": {"cli"},
}
PURE = {"geometry": {"numpy"}, "metrics": {"numpy", "numba"}}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        layer = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        found.append(("segpipe" if layer == "__init__" else layer, path))
    return found


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Absolute names of all modules that a file imports, in functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.append((node.module or "", node.lineno))
    return names


def test_imports_go_down_only() -> None:
    wrong = []
    for layer, path in modules():
        for name, line in imports_of(path):
            parts = name.split(".")
            if parts[0] != "segpipe" or len(parts) == 1 or parts[1] == layer:
                continue
            other = parts[1]
            allowed = LEVELS[other] < LEVELS[layer] or (layer, other) in SIDEWAYS
            if not allowed:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {layer} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_stay_in_their_layers() -> None:
    wrong = []
    for layer, path in modules():
        for name, line in imports_of(path):
            top = name.split(".")[0]
            if top in ONLY_IN and layer not in ONLY_IN[top]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {layer} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_geometry_and_metrics_are_pure() -> None:
    import sys

    wrong = []
    for layer, path in modules():
        for name, line in imports_of(path):
            top = name.split(".")[0]
            allowed = top in sys.stdlib_module_names or top == "segpipe" or top in PURE.get(layer, {top})
            if not allowed:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {layer} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_files_stay_short() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}: {lines} lines"
        for _, path in modules()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    ]
    assert not long, "\n".join(long)
