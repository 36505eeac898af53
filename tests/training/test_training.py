"""Whole trainings of some seconds: the same weights however they are interrupted or spread."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from runs import Seen, started, tiny_config, train, train_in_processes
from tiny import tiny_dataset
from torch.multiprocessing import ProcessRaisedException

from segpipe.config.train import ValidationConfig
from segpipe.datasets.prepared import open_dataset
from segpipe.errors import CheckError, ConfigError, IncompleteError, InputError, StorageFull, StorageRefused
from segpipe.models.file import load_model
from segpipe.storage import open_storage
from segpipe.storage.local import LocalStorage
from segpipe.training.checkpoint import list_checkpoints, read_checkpoint
from segpipe.training.comm import Comm
from segpipe.training.finish import finish
from segpipe.training.history import read_order, read_scores, read_steps
from segpipe.training.run import make_train_job
from segpipe.training.validate import count_images

DEEPLAB = {"model__family": "deeplabv3_resnet50", "model__options": {}}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_dataset(tmp_path_factory.mktemp("data"), samples=28)


@pytest.fixture(scope="module")
def undisturbed(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(tiny_config(uri, output, train__ema_decay=0.9, train__log_order=True))
    return output


def test_a_training_leaves_model_card_curves_and_tables(undisturbed: Path) -> None:
    model, card = load_model(str(undisturbed / "model.safetensors"))
    assert not model.training
    assert [info.name for info in card.classes] == ["ground", "red", "blue"]
    assert card.training["kept_step"] in (6, 12)
    storage = open_storage(str(undisturbed))
    assert read_steps(storage)["step"].to_pylist() == list(range(1, 13))
    assert read_scores(storage)["step"].to_pylist() == [6, 12]
    text = (undisturbed / "README.md").read_text()
    assert "segpipe predict" in text
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_each_sample_is_seen_once_an_epoch(undisturbed: Path) -> None:
    rows = read_order(open_storage(str(undisturbed))).to_pylist()
    first = [row["sample_id"] for row in rows if row["step"] <= 6]  # 21 samples in batches of 4
    assert len(first) == 21
    assert len(set(first)) == 21
    assert {row["lane"] for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("stop_after", [1, 5, 6, 11])
def test_an_interrupted_training_ends_with_the_same_weights(
    uri: str, undisturbed: Path, tmp_path: Path, stop_after: int
) -> None:
    config = tiny_config(uri, tmp_path / "run", train__ema_decay=0.9, train__log_order=True)
    with pytest.raises(KeyboardInterrupt):
        train(config, Seen(stop_after))
    seen = Seen()
    train(config, seen)
    assert (tmp_path / "run/model.safetensors").read_bytes() == (
        undisturbed / "model.safetensors"
    ).read_bytes()
    assert len(seen.steps) < 12 or stop_after < 4
    columns = ["step", "loss", "lr", "valid_px", "grad_norm"]
    tables = [
        read_steps(open_storage(str(folder))).select(columns) for folder in (tmp_path / "run", undisturbed)
    ]
    assert tables[0].equals(tables[1])


def test_a_finished_training_is_left_as_it_is_and_starts_no_workers(
    uri: str, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segpipe.training.run.run_worker", None)
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("checkpoints/*/*")}
    seen = Seen()
    done = train(tiny_config(uri, undisturbed, train__ema_decay=0.9, train__log_order=True), seen)
    assert done.steps == 12
    assert not seen.steps
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("checkpoints/*/*")} == before


def test_one_worker_with_eight_equals_two_with_four_and_two_with_shards(uri: str, tmp_path: Path) -> None:
    """Without batch statistics the number of workers changes nothing but the order of sums."""
    sets = {
        "train__global_batch": 8,
        "train__steps": 20,
        "train__batch_norm": "frozen",
        "train__loss": {"cross_entropy": 1, "dice": 1, "lovasz": 0.5, "focal": 0.5},
        "validation__every_steps": 20,
    }
    losses, scores = [], []
    for name, world, parallel in (("one", 1, "ddp"), ("two", 2, "ddp"), ("sharded", 2, "fsdp")):
        config = tiny_config(uri, tmp_path / name, train__parallel=parallel, **sets)
        train_in_processes(config, world) if world > 1 else train(config)
        losses.append(read_steps(open_storage(str(tmp_path / name)))["loss"].to_numpy())
        scores += read_scores(open_storage(str(tmp_path / name))).to_pylist()
    assert len(losses[0]) == 20
    assert np.abs(losses[0] - losses[1]).max() < 1e-4
    assert np.abs(losses[0] - losses[2]).max() < 1e-4
    assert losses[0][-1] < losses[0][0]
    labelled_px = sum(open_dataset(uri).split_class_px(["val"]))
    assert [row["compared_px"] for row in scores] == [labelled_px] * 3
    assert [row["miou"] for row in scores] == pytest.approx([scores[0]["miou"]] * 3, abs=2e-3)


def test_a_stopped_training_goes_on_with_another_number_of_workers(uri: str, tmp_path: Path) -> None:
    """Stopped within an epoch, whose other samples then fall to one worker."""
    sets = {"train__batch_norm": "frozen", "train__log_order": True}
    train(tiny_config(uri, tmp_path / "undisturbed", **sets))
    config = tiny_config(uri, tmp_path / "run", **sets)
    storage = open_storage(str(tmp_path / "run"))
    with pytest.raises(ProcessRaisedException):
        train_in_processes(config, 2, stop_after=5)
    assert list_checkpoints(storage) == [4]
    seen = Seen()
    train(config, seen)
    assert [row.step for row in seen.steps] == list(range(5, 13))
    whole = read_steps(open_storage(str(tmp_path / "undisturbed")))["loss"].to_numpy()
    found = read_steps(storage)["loss"].to_numpy()
    assert len(found) == 12
    assert np.abs(found - whole).max() < 1e-4
    rows = read_order(storage).to_pylist()
    for steps in (range(1, 7), range(7, 13)):  # an epoch has 21 samples in batches of 4
        ids = [row["sample_id"] for row in rows if row["step"] in steps]
        assert len(ids) == len(set(ids)) == 21


def test_accumulated_micro_batches_equal_one_batch(uri: str, tmp_path: Path) -> None:
    sets = {"train__batch_norm": "frozen", "train__global_batch": 8, "train__steps": 8}
    losses = []
    for size in (8, 3):
        train(tiny_config(uri, tmp_path / str(size), train__micro_batch=size, **sets))
        losses.append(read_steps(open_storage(str(tmp_path / str(size))))["loss"].to_numpy())
    assert np.abs(losses[0] - losses[1]).max() < 1e-4


def test_shares_of_other_sizes_and_micro_batches_make_the_same_steps(uri: str, tmp_path: Path) -> None:
    """Five samples over two workers are three and two; micro-batches of one are three on both."""
    sets = {
        "train__global_batch": 5,
        "train__batch_norm": "frozen",
        "train__steps": 6,
        "train__micro_batch": 1,
    }
    config = tiny_config(uri, tmp_path / "two", train__loss={"cross_entropy": 1, "lovasz": 1}, **sets)
    train_in_processes(config, 2)
    alone = tiny_config(uri, tmp_path / "one", train__loss={"cross_entropy": 1, "lovasz": 1}, **sets)
    train(alone)
    two, one = (read_steps(open_storage(str(tmp_path / name)))["loss"].to_numpy() for name in ("two", "one"))
    assert np.abs(two - one).max() < 1e-4


class OneOf(Comm):
    """A worker of several whose sums are added up by the test."""

    def all_reduce(self, tensor):  # type: ignore[no-untyped-def]
        return tensor


@pytest.mark.parametrize("world", [2, 3, 5])
def test_validation_counts_are_the_same_for_every_number_of_workers(
    uri: str, undisturbed: Path, world: int
) -> None:
    model, card = load_model(str(undisturbed / "model.safetensors"))
    config = ValidationConfig(splits=("val",), tile_px=32, margin_px=4)
    dataset = open_dataset(uri)

    def counted(rank: int, of: int) -> np.ndarray:
        return count_images(model, card, dataset, config, OneOf(rank, of), "cpu", 1)

    alone = counted(0, 1)
    assert alone.sum() == sum(dataset.split_class_px(["val"]))
    assert (sum(counted(rank, world) for rank in range(world)) == alone).all()


def test_newest_and_best_checkpoints_stay(uri: str, tmp_path: Path) -> None:
    config = tiny_config(
        uri, tmp_path / "run", checkpoints__every_steps=2, checkpoints__keep_last=1, train__lr=1e-9
    )
    train(config)
    storage = open_storage(str(tmp_path / "run"))
    best = read_checkpoint(storage, 12, json.loads(storage.read("run.json"))["recipe_key"]).progress.best_step
    assert list_checkpoints(storage) == sorted({best, 12})


def test_patience_ends_a_training_and_the_best_weights_are_kept(uri: str, tmp_path: Path) -> None:
    sets = {"validation__every_steps": 2, "validation__patience": 2, "train__steps": 60}
    config = tiny_config(uri, tmp_path / "run", train__lr=1e-9, train__schedule="constant", **sets)
    done = train(config)
    assert done.stopped_early
    assert done.steps < 60
    assert done.kept_step <= done.steps - 4
    assert train(config, seen := Seen()).steps == done.steps
    assert not seen.steps


def test_without_validation_the_last_weights_are_kept(uri: str, tmp_path: Path) -> None:
    done = train(tiny_config(uri, tmp_path / "run", validation__splits=()))
    assert (done.kept_step, done.metric) == (12, None)


def test_a_loss_that_is_not_finite_ends_with_step_samples_and_checkpoint(uri: str, tmp_path: Path) -> None:
    config = tiny_config(
        uri, tmp_path / "run", train__optimizer="sgd", train__lr=1e30, train__clip_norm="-", train__steps=40
    )
    config = config.model_copy(update={"train": config.train.model_copy(update={"clip_norm": None})})
    with pytest.raises(
        CheckError, match=r"the loss of step \d+ is (nan|inf); its samples: \d{3}, "
    ) as raised:
        train(config)
    assert "newest checkpoint: " in str(raised.value)
    storage = open_storage(str(tmp_path / "run"))
    key = json.loads(storage.read("run.json"))["recipe_key"]
    for step in list_checkpoints(storage):
        for name, tensor in read_checkpoint(storage, step, key).part("model").items():
            assert tensor.isfinite().all(), (step, name)


@pytest.mark.parametrize("step", [3, 4])  # a checkpoint comes after each second one
@pytest.mark.parametrize("clip", [1.0, None])
def test_gradients_that_are_not_finite_end_with_step_samples_and_checkpoint(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float | None, step: int
) -> None:
    from segpipe.training.steps import Stepper

    plain = Stepper._apply

    def poisoned(self: Stepper) -> object:
        if (calls := getattr(self, "calls", 0) + 1) == step:
            next(self._network.plain.parameters()).grad[:] = float("inf")  # type: ignore[index]
        self.calls = calls  # type: ignore[attr-defined]
        return plain(self)

    monkeypatch.setattr(Stepper, "_apply", poisoned)
    config = tiny_config(uri, tmp_path / "run", checkpoints__every_steps=2)
    config = config.model_copy(update={"train": config.train.model_copy(update={"clip_norm": clip})})
    found = rf"the gradients of step {step} have the norm inf; its samples: \d{{3}}, .*: .*step-00000002/"
    with pytest.raises(CheckError, match=found):
        train(config)
    assert list_checkpoints(open_storage(str(tmp_path / "run"))) == [2]


def test_weights_that_are_not_finite_reach_no_checkpoint(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of finite gradients: the optimiser overflows, or the statistics of batch norm do."""
    from segpipe.training.network import Network

    def poisoned(self: Network, step: int) -> None:
        if step == 3:
            next(self.plain.buffers())[0] = float("inf")

    monkeypatch.setattr(Network, "update_average", poisoned)
    with pytest.raises(CheckError, match=r"the weights after step 4 are not finite; newest .*step-00000002/"):
        train(tiny_config(uri, tmp_path / "run", checkpoints__every_steps=2))
    assert list_checkpoints(open_storage(str(tmp_path / "run"))) == [2]


def test_a_checkpoint_of_another_network_is_refused(uri: str, tmp_path: Path) -> None:
    config = tiny_config(uri, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, Seen(5))
    other = tiny_config(uri, tmp_path / "other", model__options={"width": 8, "depth": 2})
    with pytest.raises(KeyboardInterrupt):
        train(other, Seen(5))
    key = "checkpoints/step-00000004/state.safetensors"
    (tmp_path / "run" / key).write_bytes((tmp_path / "other" / key).read_bytes())
    with pytest.raises(InputError, match="belongs to another training"):
        train(config)
    (tmp_path / "run" / key).write_bytes(b"\x10" + bytes(40))
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        train(config)


def test_another_recipe_in_the_same_folder_is_refused(uri: str, undisturbed: Path) -> None:
    with pytest.raises(InputError, match=r"another recipe .*train\.lr: 0\.5 here, 0\.02 there"):
        train(tiny_config(uri, undisturbed, train__ema_decay=0.9, train__lr=0.5))
    with pytest.raises(ConfigError, match=r"threads_per_worker is 2 here, .* started with 1"):
        train(tiny_config(uri, undisturbed, train__ema_decay=0.9, cluster__threads_per_worker=2))


def test_a_full_disk_leaves_the_checkpoint_before(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(uri, tmp_path / "run")
    plain = LocalStorage.put_if_absent

    def full(self: LocalStorage, key: str, data: bytes) -> bool:
        if "step-00000008" in key:
            raise StorageFull("no space left", self.uri(key))
        return plain(self, key, data)

    monkeypatch.setattr(LocalStorage, "put_if_absent", full)
    with pytest.raises(StorageFull, match="no space for the checkpoint of step 8") as raised:
        train(config)
    assert raised.value.exit_code == 3
    monkeypatch.undo()
    assert list_checkpoints(open_storage(str(tmp_path / "run"))) == [4, 6]
    assert train(config).steps == 12


def test_a_store_that_refuses_to_delete_keeps_all_checkpoints_and_says_so_once(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LocalStorage, key: str) -> None:
        raise StorageRefused("access denied", self.uri(key))

    monkeypatch.setattr(LocalStorage, "delete", refuse)
    seen = Seen()
    train(tiny_config(uri, tmp_path / "run", checkpoints__every_steps=2, checkpoints__keep_last=1), seen)
    assert list_checkpoints(open_storage(str(tmp_path / "run"))) == [2, 4, 6, 8, 10, 12]
    assert [text for text in seen.texts if "old checkpoints stay: " in text] == seen.texts[-1:]


def test_a_training_that_is_not_at_its_end_is_not_finished(uri: str, tmp_path: Path) -> None:
    config = tiny_config(uri, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, Seen(6))
    job = make_train_job(config)
    with pytest.raises(IncompleteError, match="ended after step 4 of 12"):
        finish(open_storage(job.output), job.config, started(job), job.dataset, job.total_steps, print)
    assert not (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        ({"data__train_splits": ("trian",)}, r"no split 'trian'.*There are: train, val"),
        ({"validation__splits": ("test",)}, "no split 'test'"),
        ({"validation__splits": ("train",)}, "used for both training and validation"),
        ({"validation__metric": "iou:roof"}, "no class 'roof' in the data set.*ground, red, blue"),
        ({"model__family": "unnet"}, "Did you mean 'unet'"),
        ({"model__options": {"widht": 4}}, "Did you mean 'width'"),
        ({"model__bands": ("red",)}, "1 bands are named, the data set has 3"),
        ({"train__batch_norm": "sync"}, "sync needs GPUs"),
        ({"train__parallel": "fsdp"}, "fsdp needs GPUs"),
        ({"train__precision": "fp16"}, "fp16 needs GPUs"),
        ({"train__warmup_steps": 12}, r"train\.warmup_steps: .*rises for 12 steps, .*has 12: .*to 11 at"),
        (
            {"train__warmup_steps": 18, "train__steps": None, "train__epochs": 3, "train__schedule": "poly"},
            r"train\.warmup_steps: .*rises for 18 steps, .*has 18: .*to 17 at most",
        ),
        ({"train__warmup_steps": 50, "train__schedule": "one_cycle"}, "rises for 50 steps"),
        (DEEPLAB | {"train__micro_batch": 1}, r"train\.micro_batch: a pass of one 32 px crop .* deeplabv3"),
        (DEEPLAB | {"train__global_batch": 1}, r"train\.global_batch: a pass of one .*batch_norm to frozen"),
        ({"init__weights": "/nowhere/weights.pth"}, "no such"),
        ({"init__weights": __file__}, "not a safetensors file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    uri: str, tmp_path: Path, sets: dict[str, object], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        train(tiny_config(uri, tmp_path / "run", **sets))
    assert not (tmp_path / "run").exists()


def test_a_rate_may_rise_until_the_step_before_the_last(uri: str, tmp_path: Path) -> None:
    seen = Seen()
    train(tiny_config(uri, tmp_path / "run", train__schedule="constant", train__warmup_steps=11), seen)
    assert [row.step for row in seen.steps if row.lr == 0.02] == [12]


def test_a_batch_that_workers_cannot_share_names_one_that_they_can(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 samples cannot be shared evenly by 3 workers; 9 can"):
        tiny_config(uri, tmp_path, train__global_batch=8, cluster__workers=3, cluster__executor="ray")
    with pytest.raises(ConfigError, match="executor local runs one worker"):
        tiny_config(uri, tmp_path, cluster__workers=2)


def test_classes_that_never_occur_are_named(tmp_path: Path) -> None:
    from segpipe.config.card import ClassInfo

    uri = tiny_dataset(tmp_path, samples=12)
    tree = json.loads((tmp_path / "prepared/dataset.json").read_text())
    tree["classes"].append(ClassInfo(name="ghost", color=(1, 2, 3)).model_dump(mode="json"))
    for split in tree["splits"].values():
        split["class_px"].append(0)
    (tmp_path / "prepared/dataset.json").write_text(json.dumps(tree))
    seen = Seen()
    train(tiny_config(uri, tmp_path / "run", train__steps=3, train__loss={"class_weights": "inverse"}), seen)
    assert any("never occur in the training splits: ghost" in text for text in seen.texts)
    assert all(np.isfinite(row.loss) for row in seen.steps)
