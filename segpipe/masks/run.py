"""A run folder: the names of its objects, run.json, and which units are done."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from segpipe.config.card import ModelCard
from segpipe.config.recipe import DATASET_KEY, FORMAT, RUN_KEY, differences
from segpipe.errors import InputError, StorageError
from segpipe.geometry.grid import Blend
from segpipe.rasters.scene_ids import RASTER_SUFFIXES, has_suffix
from segpipe.storage import Storage

SUCCESS_KEY: Final = "_SUCCESS"
FAILURES_KEY: Final = "reports/failures.parquet"

_PLAN_NAME = re.compile(r"^plan/part-(\d{5,})\.parquet$")
_UNIT_NAME = re.compile(r"^masks/part-(\d{5,})/unit-(\d{7,})\.parquet$")


def plan_key(part: int) -> str:
    return f"plan/part-{part:05d}.parquet"


def masks_prefix(part: int) -> str:
    return f"masks/part-{part:05d}/"


def unit_key(part: int, unit: int) -> str:
    return f"{masks_prefix(part)}unit-{unit:07d}.parquet"


def index_key(part: int) -> str:
    return f"index/part-{part:05d}.parquet"


def parse_unit_key(key: str) -> tuple[int, int] | None:
    """Return (part, unit) of a mask object's name, None for any other name."""
    match = _UNIT_NAME.match(key)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True, slots=True)
class Facts:
    """What ``auto`` became at the first start of a run; a later start adopts it."""

    tile_px: int
    margin_px: int
    block_px: int
    unit_px: int
    blend: Blend
    batch_size: int
    threads_per_worker: int
    precision: str
    compile: bool
    device: str
    """Kind of device: cpu or cuda."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The content of run.json: what was asked, and what it became."""

    recipe: dict[str, Any]
    recipe_key: str
    facts: Facts
    card: ModelCard
    model_sha256: str
    config: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    masks_uri: str | None = None
    """evaluate --masks: the run whose masks are scored."""
    format: int = FORMAT

    def to_json(self) -> bytes:
        tree = {
            "format": self.format,
            "recipe_key": self.recipe_key,
            "recipe": self.recipe,
            "facts": asdict(self.facts),
            "model_sha256": self.model_sha256,
            "masks_uri": self.masks_uri,
            "card": self.card.model_dump(mode="json"),
            "config": self.config,
            "versions": self.versions,
        }
        return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> RunInfo:
        try:
            tree = json.loads(data)
            if tree.get("kind") == "training":
                fix = "Give the folder of a run, or an --output of its own."
                raise InputError("this folder holds a training, and no masks or scores", where, fix)
            if int(tree["format"]) > FORMAT:
                raise InputError(
                    f"the run has format {tree['format']}, this version of segpipe reads up to {FORMAT}",
                    where,
                    "Install a newer segpipe.",
                )
            return cls(
                recipe=tree["recipe"],
                recipe_key=tree["recipe_key"],
                facts=Facts(**tree["facts"]),
                card=ModelCard.model_validate(tree["card"]),
                model_sha256=tree["model_sha256"],
                config=tree["config"],
                versions=tree["versions"],
                masks_uri=tree["masks_uri"],
                format=int(tree["format"]),
            )
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"run.json cannot be read ({_one_line(error)})", where, "Is this the folder of a run?"
            ) from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def read_run(storage: Storage) -> RunInfo | None:
    """Return the run's info, or None where no run was started."""
    if storage.stat(RUN_KEY) is None:
        return None
    return RunInfo.from_json(storage.read(RUN_KEY), storage.uri(RUN_KEY))


def require_run(storage: Storage) -> RunInfo:
    """Return the run's info; InputError where the folder holds no run."""
    info = read_run(storage)
    if info is None:
        raise InputError(
            "no run.json here, so this is not a run", storage.root, "Give the --output of a run."
        )
    return info


def adopt_or_create(storage: Storage, info: RunInfo) -> RunInfo:
    """Put run.json create-only, or adopt the one that is there when it has the same recipe key."""
    existing = read_run(storage)
    if existing is None:
        refuse_other_folder(storage)
    if existing is None and not storage.put_if_absent(RUN_KEY, info.to_json()):
        existing = require_run(storage)
    return adopt(existing, info, storage.root)


def refuse_other_folder(storage: Storage) -> None:
    """Raise InputError where the output of a new run is a prepared data set, or a folder of images.

    Once run.json lies there, inputs pass over the folder.
    """
    fix = "Choose another --output."
    if storage.stat(DATASET_KEY) is not None:
        raise InputError("the output holds a prepared data set", storage.root, fix)
    first = (info.key for info in next(iter(storage.list()), []))
    if image := next((key for key in first if has_suffix(key, RASTER_SUFFIXES)), None):
        raise InputError(f"the output holds images that are no run's, such as {image}", storage.root, fix)


def adopt(existing: RunInfo | None, info: RunInfo, where: str) -> RunInfo:
    """Return the run that is there, else ``info``; InputError where the two have different recipe keys."""
    if existing is None:
        return info
    if existing.recipe_key != info.recipe_key:
        changes = "; ".join(differences(info.recipe, existing.recipe)[:5])
        raise InputError(
            f"the output holds a run made by another recipe ({changes})",
            where,
            "Choose another --output, or ask for what that run was asked for.",
        )
    return existing


def list_parts(storage: Storage) -> list[int]:
    """Return the numbers of all planned parts, in order."""
    parts = []
    for page in storage.list("plan/"):
        parts += [int(match[1]) for info in page if (match := _PLAN_NAME.match(info.key))]
    return sorted(parts)


def list_units(storage: Storage, part: int) -> Iterator[list[tuple[int, int]]]:
    """Iterate over pages of (unit, object size in bytes) of all mask objects of a part."""
    for page in storage.list(masks_prefix(part)):
        found = [(parse_unit_key(info.key), info.size_bytes) for info in page]
        yield [(name[1], size) for name, size in found if name is not None and name[0] == part]


def take_back(storage: Storage) -> None:
    """Delete run.json and plan of a run without any mask object; storage that refuses keeps them."""
    with suppress(StorageError):
        parts = list_parts(storage)
        if any(units for part in parts for units in list_units(storage, part)):
            return
        for part in parts:
            storage.delete(plan_key(part))
        storage.delete(RUN_KEY)


def done_units(storage: Storage, part: int, num_units: int) -> bytearray:
    """Return one byte a unit of the part: 1 where its object is there."""
    done = bytearray(num_units)
    for page in list_units(storage, part):
        for unit, _ in page:
            if unit < num_units:
                done[unit] = 1
    return done
