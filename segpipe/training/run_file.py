"""run.json of a training: what was asked, its key, and what ``auto`` became."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from segpipe.config.card import ModelCard
from segpipe.config.recipe import RUN_KEY, differences, recipe_key
from segpipe.config.train import TrainConfig
from segpipe.datasets.prepared import PreparedDataset
from segpipe.errors import InputError
from segpipe.masks.run import refuse_other_folder
from segpipe.storage import Storage

MODEL_KEY: Final = "model.safetensors"
FORMAT: Final = 1

TRAINING_VERSION: Final = 1
"""Raised only when the weights change for the same recipe."""


@dataclass(frozen=True, slots=True)
class TrainFacts:
    """What ``auto`` became at the first start; a later start of the same training adopts it."""

    threads_per_worker: int
    precision: str
    device: str
    """Kind of device: cpu or cuda."""


@dataclass(frozen=True, slots=True)
class TrainRun:
    """The content of run.json."""

    recipe: dict[str, Any]
    facts: TrainFacts
    card: ModelCard
    config: dict[str, Any]
    versions: dict[str, str]

    @property
    def key(self) -> str:
        return recipe_key(self.recipe)

    def to_json(self) -> bytes:
        tree = {
            "format": FORMAT,
            "kind": "training",
            "recipe_key": self.key,
            "recipe": self.recipe,
            "facts": asdict(self.facts),
            "card": self.card.model_dump(mode="json"),
            "config": self.config,
            "versions": self.versions,
        }
        return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()


def make_recipe(config: TrainConfig, dataset: PreparedDataset, init_sha256: str | None) -> dict[str, Any]:
    """All that decides the weights: samples, network, start, steps, validation; JSON-ready.

    Left out: output, cluster, checkpoints, tracking and every path, so that the same question asked from
    another place has the same key.
    """
    asked = config.model_dump(mode="json")
    steps = {name: value for name, value in asked["train"].items() if name != "log_order"}
    return {
        "format": FORMAT,
        "training_version": TRAINING_VERSION,
        "data": {
            "key": dataset.key,
            "classes": [{"name": info.name, "color": list(info.color)} for info in dataset.classes],
            "train_splits": asked["data"]["train_splits"],
            "augment": asked["data"]["augment"],
        },
        "model": asked["model"],
        "init_sha256": init_sha256,
        "train": steps,
        "validation": asked["validation"],
    }


def read_train_run(storage: Storage) -> TrainRun | None:
    """The training that was started here, None where there is none. Raises `InputError` for another thing."""
    if storage.stat(RUN_KEY) is None:
        return None
    where = storage.uri(RUN_KEY)
    try:
        tree = json.loads(storage.read(RUN_KEY))
        if tree.get("kind") != "training":
            raise InputError("the output holds a run of another kind", where, "Choose another --output.")
        if int(tree["format"]) > FORMAT:
            raise InputError(
                f"the training has format {tree['format']}, this version of segpipe reads up to {FORMAT}",
                where,
                "Install a newer segpipe.",
            )
        return TrainRun(
            recipe=tree["recipe"],
            facts=TrainFacts(**tree["facts"]),
            card=ModelCard.model_validate(tree["card"]),
            config=tree["config"],
            versions=tree["versions"],
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"run.json cannot be read ({type(error).__name__})", where, "Choose another --output."
        ) from error


def adopt_or_create(storage: Storage, run: TrainRun) -> TrainRun:
    """Put run.json create-only, or adopt the one that is there. `InputError` for another recipe."""
    there = read_train_run(storage)
    if there is None:
        refuse_other_folder(storage)
        storage.put_if_absent(RUN_KEY, run.to_json())
        there = read_train_run(storage)  # also our own: what is read back is what every start sees
    assert there is not None
    return adopt(there, run.recipe, storage.root)


def adopt(there: TrainRun, recipe: dict[str, Any], where: str) -> TrainRun:
    """The training that is there. `InputError` where it has another recipe."""
    if there.key != recipe_key(recipe):
        changes = "; ".join(differences(recipe, there.recipe)[:5])
        raise InputError(
            f"the output holds a training by another recipe ({changes})",
            where,
            "Choose another --output, or ask for what that training was asked for.",
        )
    return there
