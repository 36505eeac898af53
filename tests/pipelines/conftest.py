"""What most runs of these tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from archive import make_model, write_scene


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A classifier of single pixels."""
    return make_model(tmp_path / "model.safetensors", "pixel")


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A folder of three scenes."""
    for number, name in enumerate(("a", "b", "c")):
        write_scene(tmp_path / f"in/{name}.tif", 70, 90, seed=number)
    return tmp_path / "in"
