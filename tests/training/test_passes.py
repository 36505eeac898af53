"""How a worker's share is cut into forward passes."""

from __future__ import annotations

import pytest

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.config.train import load_train
from segpipe.errors import ConfigError
from segpipe.training.passes import check_passes, passes


@pytest.mark.parametrize(
    ("lanes", "micro_batch", "sizes"),
    [
        (8, None, [8]),
        (8, 8, [8]),
        (8, 20, [8]),
        (8, 4, [4, 4]),
        (4, 3, [2, 2]),
        (7, 3, [2, 2, 3]),
        (3, 1, [1, 1, 1]),
        (1, None, [1]),
    ],
)
def test_passes_are_as_few_and_as_even_as_can_be(
    lanes: int, micro_batch: int | None, sizes: list[int]
) -> None:
    found = passes(lanes, micro_batch)
    assert [stop - start for start, stop in found] == sizes
    assert [place for start, stop in found for place in range(start, stop)] == list(range(lanes))


@pytest.mark.parametrize(
    ("workers", "batch_norm", "refused"),
    [
        ((4, 4), "train", None),
        ((3, 4), "train", None),
        ((2, 4), "train", "2 workers"),  # shares of three: passes of one and two
        ((2, 8), "train", "2 workers"),
        ((3, 6), "train", "6 workers"),
        ((2, 4), "frozen", None),
        ((2, 4), "sync", None),
        ((1, 4), "sync", None),
    ],
)
def test_passes_of_one_sample_are_looked_for_with_every_number_of_workers(
    workers: tuple[int, int], batch_norm: str, refused: str | None
) -> None:
    card = ModelCard(
        family="deeplabv3_resnet50",
        bands=("red", "green", "blue"),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in "ab"),
    )
    overrides = {
        "data.uri": "s3://bucket/prepared",
        "train.steps": 1,
        "train.global_batch": 6,
        "train.micro_batch": 2,
        "train.batch_norm": batch_norm,
    }
    config = load_train(None, overrides, (), "test")
    if refused is None:
        check_passes(config, card, *workers)
        return
    with pytest.raises(ConfigError, match=rf"train\.micro_batch: .*\(with {refused}\)"):
        check_passes(config, card, *workers)
