"""The command that makes training shards."""

from __future__ import annotations

from typing import Any

from segpipe.cli.jobs import read_text
from segpipe.cli.output import print_fields, print_json
from segpipe.cli.progress import ProgressEvents
from segpipe.config.prepare import load_prepare
from segpipe.errors import ConfigError
from segpipe.pipelines.prepare import Prepared, PreparePlan, plan_prepare, run_prepare
from segpipe.wording import counted


def prepare_command(
    config_uri: str | None,
    flags: dict[str, Any],
    sets: list[str],
    *,
    splits: list[str],
    dry_run: bool,
    as_json: bool,
) -> int:
    """Prepare a data set and return the exit code. ``splits``: "val=0.2" or "val=GLOB", as typed."""
    config = load_prepare(
        read_text(config_uri), {**flags, **_split_flags(splits)}, sets, config_uri or "flags"
    )
    with ProgressEvents() as events:
        if dry_run:
            _print_plan(config.layout, plan_prepare(config, events), as_json)
            return 0
        done = run_prepare(config, events)
    _print_prepared(done, as_json)
    return 0


def _split_flags(splits: list[str]) -> dict[str, Any]:
    fractions: dict[str, float] = {}
    globs: dict[str, list[str]] = {}
    for item in splits:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"{item!r} is no split", "--split", "Write NAME=FRACTION or NAME=GLOB.")
        try:
            fractions[name] = float(value)
        except ValueError:
            globs.setdefault(name, []).append(value)
    # Together they are the split: what the config says of either kind does not stay beside them.
    return {"split.fractions": fractions, "split.globs": globs} if splits else {}


def _print_plan(layout: str, plan: PreparePlan, as_json: bool) -> None:
    tree = {
        "layout": layout,
        "shards": len(plan.shards),
        "samples": sum(plan.splits.values()),
        "splits": plan.splits,
        "left_out": plan.left_out,
        "source_bytes": sum(ref.size_bytes for shard in plan.shards for ref in shard.refs),
    }
    print_fields(tree, as_json)


def _print_prepared(done: Prepared, as_json: bool) -> None:
    tree = done.dataset
    if as_json:
        print_json({"output": done.output, "written": done.written, **tree})
        return
    splits = ", ".join(f"{name} {split['samples']}" for name, split in tree["splits"].items())
    print(f"{counted(tree['samples'], 'sample')} ({splits}), {counted(done.written, 'shard')} written now")
    labelled = max(1, sum(tree["class_px"]))
    for info, px in zip(tree["classes"], tree["class_px"], strict=False):
        print(f"  {info['name']:<20} {100 * px / labelled:6.2f} %")
    print(f"data set: {done.output}/dataset.json")
