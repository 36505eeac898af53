"""The commands that run a pipeline: predict and evaluate."""

from __future__ import annotations

from typing import Any

from segpipe.cli.output import print_fields, print_json
from segpipe.cli.progress import ProgressEvents
from segpipe.config.load import load_config
from segpipe.config.model import SegpipeConfig
from segpipe.errors import ConfigError, nothing_written
from segpipe.imports import quick_start
from segpipe.pipelines.job import make_job
from segpipe.pipelines.predict import DryRun, Outcome, plan_job, run_job
from segpipe.storage import read_uri
from segpipe.wording import counted


def read_config(
    uri: str | None, flags: dict[str, Any], sets: list[str], part: str = "predict"
) -> SegpipeConfig:
    """Fetch the YAML from any storage and lay flags and --set over it; ``part`` of a recipe."""
    return load_config(read_text(uri), flags, sets, uri or "flags", part)


def read_text(uri: str | None) -> str | None:
    """The text of a config at any URI; None for none. Raises `ConfigError` where it is no UTF-8."""
    if uri is None:
        return None
    try:
        with nothing_written():
            return read_uri(uri).decode()
    except UnicodeDecodeError as error:
        raise ConfigError("the config is not UTF-8 text", uri, "Save it as UTF-8.") from error


def run_command(
    kind: str,
    config_uri: str | None,
    flags: dict[str, Any],
    sets: list[str],
    *,
    masks: str | None = None,
    dry_run: bool = False,
    as_json: bool = False,
) -> int:
    """Run predict or evaluate and return the exit code."""
    config = read_config(config_uri, flags, sets, kind)
    need_labels = kind == "evaluate"
    if need_labels and masks is None and config.model is None:
        raise ConfigError("nothing to score", "model", "Give --model URI or --masks RUN.")
    quick_start(pandas=config.cluster.executor == "ray")
    job = make_job(config, masks_uri=masks)
    with ProgressEvents() as events:
        if dry_run:
            _print_dry_run(plan_job(job, events, need_labels=need_labels), as_json)
            return 0
        outcome = run_job(job, events, need_labels=need_labels)
    print_outcome(outcome, as_json=as_json, has_masks=masks is None)
    return outcome.exit_code


def print_outcome(outcome: Outcome, *, as_json: bool, has_masks: bool = True) -> None:
    """Print how a run ended: results on stdout, what to do about faults on stderr.

    ``has_masks``: not so where the masks of another run were scored.
    """
    import sys

    from rich.console import Console

    from segpipe.reports.terminal import failure_lines, print_scores

    if as_json:
        tree = {
            "run": outcome.uri,
            "units": outcome.units,
            "computed": outcome.computed,
            "missing": outcome.missing,
            "summary": outcome.summary,
        }
        print_json(tree, outcome.exit_code)
    else:
        if outcome.summary.get("scores"):
            print_scores(outcome.summary, Console())
        print(_result_lines(outcome, has_masks))
    for reason in outcome.deferred:
        print(f"not committed: {reason}", file=sys.stderr)
    if outcome.missing:
        print(
            f"{outcome.missing} of {counted(outcome.units, 'unit')} missing; the same command goes on",
            file=sys.stderr,
        )
    elif outcome.exit_code == 5:
        verb = "has" if outcome.failed_scenes == 1 else "have"
        allowed = f"more than failures.max_fraction {outcome.max_fraction:g} allows"
        scenes = f"{outcome.failed_scenes} of {counted(outcome.scenes, 'scene')}"
        print(f"{scenes} {verb} failed, {allowed}:", file=sys.stderr)
        for line in failure_lines(outcome.summary):
            print(line, file=sys.stderr)
        reports = f"{outcome.uri}/reports"
        print(f"all failures: {reports}/failures.parquet, {reports}/report.html", file=sys.stderr)


def _result_lines(outcome: Outcome, has_masks: bool) -> str:
    scenes = outcome.summary["scenes"]
    states = ", ".join(
        f"{scenes[name]} {name}" for name in ("ok", "empty", "partial", "failed") if scenes[name]
    )
    counts = f"{counted(scenes['all'], 'scene')} ({states or 'none'}), {counted(outcome.units, 'unit')}"
    lines = [f"{counts}, {outcome.computed} computed now"]
    lines += [f"masks:  {outcome.uri}/masks"] if has_masks else []
    return "\n".join([*lines, f"report: {outcome.uri}/reports/report.html"])


def _print_dry_run(plan: DryRun, as_json: bool) -> None:
    totals, facts, pool = plan.totals, plan.facts, plan.pool
    tree = {
        "scenes": totals.scenes,
        "scenes_planned_already": plan.known_scenes,
        "planned_units_to_compute": plan.units_left,
        "failed_headers": totals.failed_kinds,
        "units": totals.units,
        "blocks": totals.blocks,
        "tiles": totals.tiles,
        "mpx": round(totals.scene_px / 1e6, 3),
        "km2": round(totals.area_m2 / 1e6, 6),
        "source_bytes": totals.source_bytes,
        "validity": totals.validity,
        "coarser_than_model": totals.coarser.count,
        "band_names_differ": sum(named.count for named in totals.bands_named.values()),
        "workers": pool.workers,
        "cpus_per_worker": pool.cpus_per_worker,
        "gpus_per_worker": pool.gpus_per_worker,
        "threads_per_worker": facts.threads_per_worker,
        "device": facts.device,
        "precision": facts.precision,
        "tile_px": facts.tile_px,
        "batch_size": facts.batch_size,
        "unit_px": facts.unit_px,
    }
    print_fields(tree, as_json)
