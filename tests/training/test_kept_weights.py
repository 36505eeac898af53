"""Which weights become the model: the best, the newest where those are gone, the running average."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runs import Seen, tiny_config, train
from tiny import tiny_dataset
from torch import Tensor, nn

from segpipe.errors import InputError
from segpipe.models.families import build_of
from segpipe.models.file import load_model
from segpipe.storage import open_storage
from segpipe.training.checkpoint import list_checkpoints, read_checkpoint
from segpipe.training.run_file import read_train_run
from segpipe.training.validate import count_images
from segpipe.training.worker import _Training


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_dataset(tmp_path_factory.mktemp("data"), samples=28)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The scores that validations find, by step."""
    scores: dict[int, float] = {}
    found: list[float] = []
    plain = _Training._validate

    def validate(self: _Training, step: int) -> None:
        found[:] = [scores[step]]
        plain(self, step)

    monkeypatch.setattr(_Training, "_validate", validate)
    monkeypatch.setattr("segpipe.training.worker.metric_of", lambda *_: found[0])
    return scores


def weights(folder: Path, step: int, part: str) -> dict[str, Tensor]:
    """A part of the checkpoint of one step."""
    storage = open_storage(str(folder))
    run = read_train_run(storage)
    assert run is not None
    return read_checkpoint(storage, step, run.key).part(part)


def is_model(folder: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether the model file below a folder holds exactly these."""
    state = load_model(str(folder / "model.safetensors"))[0].state_dict()
    assert state.keys() == tensors.keys()
    return all(torch.equal(value, tensors[name]) for name, value in state.items())


def test_a_damaged_best_checkpoint_that_is_deleted_leaves_the_newest_weights(
    uri: str, tmp_path: Path, scored: dict[int, float]
) -> None:
    folder = tmp_path / "run"
    config = tiny_config(uri, folder, validation__every_steps=4, checkpoints__keep_last=1)
    scored |= {4: 0.3, 8: 0.6, 12: 0.5}
    assert train(config).kept_step == 8
    assert is_model(folder, weights(folder, 8, "model"))
    (folder / "model.safetensors").unlink()
    best = folder / "checkpoints/step-00000008/state.safetensors"
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"step-00000008.*the checkpoint is damaged.*Delete it"):
        train(config)
    assert not (folder / "model.safetensors").exists()
    best.unlink()
    for _ in range(2):  # a repeat ends the same
        done = train(config, seen := Seen())
        assert (done.kept_step, done.metric) == (12, 0.5)
        assert [line for line in seen.texts if "that of step 8, is not there" in line] == seen.texts
        assert len(seen.texts) == 1
    assert is_model(folder, weights(folder, 12, "model"))
    assert "the newest weights are kept, those of step 12" in (folder / "README.md").read_text()


def test_a_best_checkpoint_that_made_way_for_a_deleted_one_is_not_missed(
    uri: str, tmp_path: Path, scored: dict[int, float]
) -> None:
    folder = tmp_path / "run"
    config = tiny_config(uri, folder, validation__every_steps=4)
    scored |= {4: 0.6, 8: 0.5, 12: 0.7}
    assert train(config).kept_step == 12
    assert list_checkpoints(open_storage(str(folder))) == [8, 12]  # of step 8 the best was that of step 4
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "checkpoints/step-00000012")
    scored[12] = 0.55
    done = train(config, seen := Seen())
    assert done.kept_step == 12
    assert "that of step 4, is not there" in seen.texts[-1]
    assert is_model(folder, weights(folder, 12, "model"))


@pytest.mark.parametrize("splits", [("val",), ()])
def test_the_model_is_the_running_average(uri: str, tmp_path: Path, splits: tuple[str, ...]) -> None:
    """Followed here from the weights of every step."""
    folder, decay = tmp_path / "run", 0.9
    config = tiny_config(
        uri,
        folder,
        train__ema_decay=decay,
        train__steps=4,
        checkpoints__every_steps=1,
        checkpoints__keep_last=4,
        validation__splits=splits,
        validation__keep="last",
    )
    assert train(config).kept_step == 4
    model, card = load_model(str(folder / "model.safetensors"))
    torch.manual_seed(config.train.seed)
    wanted = {name: value.double() for name, value in build_of(card).state_dict().items()}
    for step in range(4):
        d = min(decay, (1 + step) / (10 + step))
        for name, value in weights(folder, step + 1, "model").items():
            average = d * wanted[name] + (1 - d) * value.double()
            wanted[name] = average if value.is_floating_point() else value.double()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    assert is_model(folder, weights(folder, 4, "average"))
    assert not is_model(folder, weights(folder, 4, "model"))


def test_the_running_average_of_the_best_step_is_scored_and_kept(
    uri: str, tmp_path: Path, scored: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []

    def count(model: nn.Module, *rest: object) -> object:
        judged.append({name: value.clone() for name, value in model.state_dict().items()})
        return count_images(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("segpipe.training.worker.count_images", count)
    folder = tmp_path / "run"
    scored |= {4: 0.3, 8: 0.6, 12: 0.5}
    assert train(tiny_config(uri, folder, train__ema_decay=0.9, validation__every_steps=4)).kept_step == 8
    average = weights(folder, 8, "average")
    assert is_model(folder, average)
    assert not is_model(folder, weights(folder, 8, "model"))
    assert all(torch.equal(value, average[name]) for name, value in judged[1].items())
