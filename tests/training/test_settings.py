"""Settings of a training do to its steps and scores what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import Seen, tiny_config, train
from tiny import tiny_dataset
from torch import Tensor

from segpipe.errors import ConfigError
from segpipe.storage import open_storage
from segpipe.training.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_dataset(tmp_path_factory.mktemp("data"), samples=12)


def weights_after(run: Path, step: int) -> Tensor:
    """All weights as one vector."""
    storage = open_storage(str(run))
    key = json.loads(storage.read("run.json"))["recipe_key"]
    parts = read_checkpoint(storage, step, key).part("model")
    return torch.cat([parts[name].double().flatten() for name in sorted(parts)])


def test_a_step_moves_the_weights_no_farther_than_clipped_gradients_do(uri: str, tmp_path: Path) -> None:
    config = tiny_config(
        uri,
        tmp_path / "run",
        train__optimizer="sgd",
        train__momentum=0.0,
        train__weight_decay=0.0,
        train__schedule="constant",
        train__batch_norm="frozen",
        train__lr=0.5,
        train__clip_norm=0.1,
        train__steps=2,
        checkpoints__every_steps=1,
        validation__splits=(),
    )
    train(config, seen := Seen())
    assert all(row.grad_norm is not None and row.grad_norm > 0.1 for row in seen.steps)
    moved = weights_after(tmp_path / "run", 2) - weights_after(tmp_path / "run", 1)
    assert moved.norm().item() == pytest.approx(0.5 * 0.1, rel=1e-3)


def test_a_network_that_cannot_be_compiled_is_told_as_such(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_compiler(*_: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: plain(model, backend=without_compiler))
    with pytest.raises(
        ConfigError, match=r"^train\.compile: torch.compile failed: .*set train\.compile to false\.$"
    ):
        train(tiny_config(uri, tmp_path / "run", train__compile=True))


def test_a_metric_of_one_class_is_its_iou(uri: str, tmp_path: Path) -> None:
    config = tiny_config(uri, tmp_path / "run", validation__metric="iou:ground")
    done = train(config, seen := Seen())
    ious = [row.class_iou["ground"] for row in seen.scores]
    assert [row.metric for row in seen.scores] == ious
    assert all(iou is not None and 0 < iou < 1 for iou in ious)
    assert done.metric == max(ious)  # type: ignore[type-var]
