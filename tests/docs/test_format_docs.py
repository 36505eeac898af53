"""What docs/format.md shows runs, and does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive import make_model, ok, predict, tell_changed, whole_masks, write_scene

TEXT = (Path(__file__).parents[2] / "docs/format.md").read_text(encoding="utf-8")


def test_the_python_example_reads_the_newest_mask_of_a_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model.safetensors", "pixel")
    write_scene(tmp_path / "in/other.tif", 50, 60)
    found = []
    for seed, width in ((1, 150), (2, 130)):
        write_scene(tmp_path / "in/scene0.tif", 110, width, seed=seed)
        tell_changed(tmp_path / "in/scene0.tif")
        ok(predict("in", model, "run", block_px=64, unit_px=8000))
        names: dict[str, Any] = {}
        exec(compile(code, "docs/format.md", "exec"), names)
        assert np.array_equal(names["mask"], whole_masks("run")["scene0"])
        assert len(names["rows"]) > 1
        found.append((names["newest"], names["mask"].shape))
    assert found == [(0, (110, 150)), (1, (110, 130))]
