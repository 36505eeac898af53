"""The driver of ``segpipe prepare``: list, plan shards, let workers make them, write dataset.json last."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from segpipe.config.prepare import PrepareConfig
from segpipe.config.recipe import DATASET_KEY, RUN_KEY
from segpipe.datasets.dataset_file import dataset_tree, read_dataset, to_json, with_licence
from segpipe.datasets.layout import LEFT_OUT, Layout, SampleRef
from segpipe.datasets.layouts import make_layout
from segpipe.datasets.plan import ShardPlan, dataset_key, plan_shards
from segpipe.datasets.shards import ShardMeta
from segpipe.datasets.write import Fault, ShardTask, fault_of, make_shard, of_another_kind
from segpipe.errors import ConfigError, InputError, SceneError, nothing_written
from segpipe.geometry.resolution import MAX_DOWNSAMPLE, is_coarser, is_finer
from segpipe.pipelines.events import Events
from segpipe.pipelines.executor import Executor, start_executor
from segpipe.pipelines.local import LocalExecutor
from segpipe.storage import Storage, open_storage
from segpipe.storage.uris import normalize_root
from segpipe.wording import counted, few

_SCENES_PER_TASK: Final = 16
_MESSAGE_EVERY_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """How ``prepare`` ended; ``dataset`` is the content of dataset.json."""

    output: str
    dataset: dict[str, Any]
    written: int
    """Shards written now; the others were there."""


@dataclass(frozen=True, slots=True)
class PreparePlan:
    """What ``prepare`` is to make."""

    shards: list[ShardPlan]
    splits: dict[str, int]
    """Samples of each split, 0 for one that was asked for and gets none."""
    left_out: int
    """Samples that the layout leaves out."""


def run_prepare(config: PrepareConfig, events: Events) -> Prepared:
    """Make the data set whole. The same call again goes on where it stopped, to the same bytes.

    Raises `InputError` for input that is wrong, with the samples named; dataset.json is not written then.
    """
    if config.output is None:
        raise ConfigError("no output", "output", "Give --output URI.")
    storage = open_storage(config.output)
    with nothing_written():
        layout = make_layout(config)
    executor = start_executor(config.cluster, events.warning)
    try:
        with nothing_written():
            plan = _plan(config, layout, executor, events)
            shards, left_out = plan.shards, plan.left_out
            there = _existing_dataset(storage, shards)
        if there is not None:
            again = _replace_lost(storage, config, layout, shards, executor, events)
            return Prepared(config.output, _adopted(storage, config, there, again, events), again)
        events.message(f"{counted(sum(plan.splits.values()), 'sample')} in {counted(len(shards), 'shard')}")
        if left_out:
            events.message(f"{counted(left_out, 'sample')} left out: excluded, or in two splits at once")
        metas, written = _make_shards(config, layout, shards, executor, events)
    finally:
        executor.close()
    tree = dataset_tree(config, layout.classes, shards, metas, left_out)
    if not tree["samples"]:
        raise InputError(
            "no sample has enough labelled pixels",
            ", ".join(config.sources),
            "Check the labels and archive.min_label_fraction.",
        )
    if absent := tree["absent_classes"]:
        events.warning(f"classes that never occur in the labels: {few(absent)}")
    _warn_of_pixel_sizes(config, tree, events)
    if not storage.put_if_absent(DATASET_KEY, to_json(tree)):
        tree = _adopted(storage, config, _existing_dataset(storage, shards) or tree, written, events)
    return Prepared(config.output, tree, written)


def _adopted(
    storage: Storage, config: PrepareConfig, there: dict[str, Any], written: int, events: Events
) -> dict[str, Any]:
    """The data set that is there, of the same samples; a licence text of this config replaces its own."""
    tree = with_licence(there, config)
    if tree == there:
        if not written:
            events.message("the data set is there already; nothing to do")
        return there
    storage.put(DATASET_KEY, to_json(tree))
    events.message("the data set is there already; its licence text is replaced")
    return tree


def _replace_lost(
    storage: Storage,
    config: PrepareConfig,
    layout: Layout,
    shards: Sequence[ShardPlan],
    executor: Executor,
    events: Events,
) -> int:
    """Make the shards again that a finished data set has lost, to the same bytes; returns how many."""
    there = {info.key for page in storage.list("shards/") for info in page}
    lost = [shard for shard in shards if shard.key not in there]
    if not lost:
        return 0
    verb = "is" if len(lost) == 1 else "are"
    events.message(f"the data set is there, but {len(lost)} of its shards {verb} gone and {verb} made again")
    return _make_shards(config, layout, lost, executor, events)[1]


def _warn_of_pixel_sizes(config: PrepareConfig, tree: dict[str, Any], events: Events) -> None:
    asked = config.archive.pixel_m
    if config.layout != "archive" or asked is None:
        return
    if unknown := tree["pixel_m_unknown"]:
        events.warning(f"{counted(unknown, 'sample')} without ground pixel size: not reduced to {asked} m")
    sizes = tree["pixel_m_range"]
    if sizes is not None and is_coarser(asked, sizes[1]):
        events.warning(f"pixels of up to {sizes[1]:.3g} m, much coarser than archive.pixel_m, {asked} m")
    if sizes is not None and is_finer(asked, sizes[0]):
        events.warning(
            f"pixels of {sizes[0]:.3g} m, much finer than archive.pixel_m, {asked} m: "
            f"a scene is reduced by {MAX_DOWNSAMPLE} at most"
        )


def plan_prepare(config: PrepareConfig, events: Events) -> PreparePlan:
    """List and plan, and write nothing; headers are read in this process."""
    executor = LocalExecutor()
    try:
        with nothing_written():
            return _plan(config, make_layout(config), executor, events)
    finally:
        executor.close()


def _plan(config: PrepareConfig, layout: Layout, executor: Executor, events: Events) -> PreparePlan:
    """Plan the shards; warns here of empty splits, before hours of work go into a data set without them."""
    listed = list(_samples(layout, executor, ", ".join(config.sources)))
    kept = [ref for ref in listed if ref.split != LEFT_OUT]
    shards = plan_shards(kept, config)
    if not shards:
        fix = "Look at the exclusions, and at split.grid_m: its cells must be much larger than a chip."
        raise InputError(f"no sample is left of {len(listed)}", ", ".join(config.sources), fix)
    samples = Counter[str]()
    for shard in shards:
        samples[shard.split] += len(shard.refs)
    if empty := sorted({*config.split.fractions, *config.split.globs} - samples.keys()):
        by_ground = config.layout == "archive" and config.split.fractions
        hint = "; a smaller split.grid_m gives the ground more cells" if by_ground else ""
        events.warning(f"splits without a sample: {few(empty)}{hint}")
    return PreparePlan(shards, dict(samples) | dict.fromkeys(empty, 0), len(listed) - len(kept))


def _samples(layout: Layout, executor: Executor, where: str) -> Iterator[SampleRef]:
    if not layout.expands:
        yield from layout.listing()
        return
    scenes = list(layout.listing())
    chunks = [scenes[i : i + _SCENES_PER_TASK] for i in range(0, len(scenes), _SCENES_PER_TASK)]

    def expand(chunk: Sequence[SampleRef]) -> tuple[list[SampleRef], list[Fault]]:
        refs, faults = list[SampleRef](), list[Fault]()
        for scene in chunk:
            try:
                refs += layout.expand(scene)
            except SceneError as error:
                faults.append(fault_of(scene, error))
        return refs, faults

    faulty: list[Fault] = []
    for refs, faults in executor.map_ordered(expand, chunks):
        faulty += faults
        yield from refs
    _refuse(faulty, "scene", where, "Then run the same command again.")


def _existing_dataset(storage: Storage, shards: Sequence[ShardPlan]) -> dict[str, Any] | None:
    """The finished data set that is there; None = it is to be made. InputError for another one."""
    there = read_dataset(storage)
    if there is not None:
        if there.get("key") == dataset_key(shards):
            return there
        raise InputError(
            "the output holds a data set of other samples or another config",
            storage.root,
            "Choose another --output, or remove the old data set.",
        )
    if storage.stat(RUN_KEY) is not None:
        raise InputError("the output holds a run", storage.root, "Choose another --output.")
    planned = {shard.key for shard in shards}
    for page in storage.list("shards/"):
        if strange := [info.key for info in page if info.key not in planned]:
            raise InputError(
                f"the output holds objects that are not planned: {few(strange)}",
                storage.root,
                "Choose another --output, or remove the old data set.",
            )
    return None


def _make_shards(
    config: PrepareConfig, layout: Layout, shards: Sequence[ShardPlan], executor: Executor, events: Events
) -> tuple[list[ShardMeta], int]:
    """The meta of every shard in order, and how many were written now."""
    assert config.output is not None
    # Absolute: workers may have another working folder.
    tasks = [ShardTask(shard, layout, normalize_root(config.output), config.format) for shard in shards]
    metas: list[ShardMeta] = []
    kinds: list[tuple[str, str, int]] = []
    faults: list[Fault] = []
    written, said_s = 0, time.monotonic()
    for done, result in enumerate(executor.map_ordered(make_shard, tasks), start=1):
        faults += result.faults
        kinds += result.kinds
        if result.meta is not None:
            metas.append(result.meta)
            written += not result.skipped
        if time.monotonic() - said_s > _MESSAGE_EVERY_S and done < len(shards):
            said_s = time.monotonic()
            events.message(f"{done} of {len(shards)} shards")
    faults += of_another_kind(kinds)
    fix = (
        "After repairs the same command goes on; if you leave samples out or change the config instead, "
        f"remove the shards in {config.output} first: they are cut anew."
    )
    _refuse(faults, "sample", ", ".join(config.sources), fix)
    return metas, written


def _refuse(faults: Sequence[Fault], noun: str, where: str, fix: str) -> None:
    """Name the first faults, with their own advice where all have the same."""
    if not faults:
        return
    advice = {fault.fix for fault in faults}
    own = advice.pop() if len(advice) == 1 else "Repair them, or leave them out."
    named = few([fault.text for fault in faults], separator="; ")
    raise InputError(f"{counted(len(faults), noun)} cannot be used: {named}", where, f"{own} {fix}")
