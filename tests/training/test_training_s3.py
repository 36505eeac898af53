"""Training whose data and output lie on S3: interruptions and faults cost nothing; what refuses is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import Seen, tiny_config, train
from s3_server import Fault, FaultProxy, S3Server
from tiny import tiny_dataset

from segpipe.config.train import TrainConfig
from segpipe.errors import InputError, StorageRefused
from segpipe.storage import open_storage
from segpipe.training.checkpoint import list_checkpoints, read_checkpoint
from segpipe.training.history import read_scores, read_steps

pytestmark = pytest.mark.s3

SETS = {"train__ema_decay": 0.9, "checkpoints__every_steps": 2, "checkpoints__keep_last": 1}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_dataset(tmp_path_factory.mktemp("data"), samples=28)


@pytest.fixture(scope="module")
def local_model(uri: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The model file that an undisturbed training in a local folder makes."""
    output = tmp_path_factory.mktemp("local") / "run"
    train(tiny_config(uri, output, **SETS))
    return (output / "model.safetensors").read_bytes()


def on_s3(uri: str, prefix: str) -> TrainConfig:
    """The training with data and output below ``prefix``."""
    source, target = Path(uri), open_storage(f"{prefix}/data")
    for path in source.rglob("*"):
        if path.is_file():
            target.put(str(path.relative_to(source)), path.read_bytes())
    return tiny_config(f"{prefix}/data", f"{prefix}/run", **SETS)


def test_an_interrupted_training_on_s3_ends_with_the_bytes_of_a_local_one(
    uri: str, local_model: bytes, s3_prefix: str
) -> None:
    config = on_s3(uri, s3_prefix)
    with pytest.raises(KeyboardInterrupt):
        train(config, Seen(7))
    train(config, seen := Seen())
    assert seen.steps[0].step == 7
    storage = open_storage(f"{s3_prefix}/run")
    assert storage.read("model.safetensors") == local_model
    assert read_steps(storage)["step"].to_pylist() == list(range(1, 13))
    assert read_scores(storage)["step"].to_pylist() == [6, 12]


def test_old_checkpoints_on_s3_are_deleted_but_not_best_and_newest(uri: str, s3_prefix: str) -> None:
    config = on_s3(uri, s3_prefix)
    # So small a rate that the second score can be no better than the first.
    slow = config.train.model_copy(update={"lr": 1e-30, "ema_decay": 0.0, "batch_norm": "frozen"})
    done = train(config.model_copy(update={"train": slow}))
    storage = open_storage(f"{s3_prefix}/run")
    key = json.loads(storage.read("run.json"))["recipe_key"]
    assert read_checkpoint(storage, 12, key).progress.best_step == done.kept_step == 6
    assert list_checkpoints(storage) == [6, 12]


def test_requests_that_fail_or_lose_their_reply_change_nothing(
    uri: str, local_model: bytes, s3_prefix: str, s3_proxy: FaultProxy
) -> None:
    config = on_s3(uri, s3_prefix)
    s3_proxy.faults = [
        Fault("PUT", "checkpoints/step-00000002", "lost"),
        Fault("PUT", "checkpoints/step-00000004", "503"),
        Fault("PUT", "history/", "reset"),
        Fault("GET", "shards/", "short"),
        Fault("PUT", "model.safetensors", "lost"),
    ]
    train(config)
    assert [fault.times for fault in s3_proxy.faults] == [0] * 5, "all of them happened"
    assert open_storage(f"{s3_prefix}/run").read("model.safetensors") == local_model


def test_a_store_that_may_only_be_read_is_wrong_input(
    uri: str, s3_prefix: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_s3(uri, s3_prefix)
    with monkeypatch.context() as reading:
        for name, value in s3_server.read_only_env.items():
            reading.setenv(name, value)
        with pytest.raises(InputError, match="access denied") as refused:
            train(config)
    assert refused.value.exit_code == 2
    assert str(refused.value).startswith(f"{s3_prefix}/run/run.json: ")
    assert len(str(refused.value).splitlines()) == 1
    assert [info.key for page in open_storage(f"{s3_prefix}/run").list() for info in page] == []


def test_a_store_that_begins_to_refuse_leaves_the_checkpoint_before(
    uri: str, local_model: bytes, s3_prefix: str, s3_proxy: FaultProxy
) -> None:
    config = on_s3(uri, s3_prefix)
    s3_proxy.faults = [Fault("PUT", "step-00000008", "403", code="AccessDenied", times=99)]
    with pytest.raises(StorageRefused, match="access denied") as refused:
        train(config)
    assert refused.value.exit_code == 3
    assert str(refused.value).startswith(f"{s3_prefix}/run/checkpoints/step-00000008/")
    assert len(str(refused.value).splitlines()) == 1
    s3_proxy.faults = []
    storage = open_storage(f"{s3_prefix}/run")
    assert list_checkpoints(storage)[-1] == 6
    train(config)
    assert storage.read("model.safetensors") == local_model
