"""The commands about a run that is there: verify, report, export."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

from segpipe.cli.output import print_json
from segpipe.cli.progress import ProgressEvents
from segpipe.wording import counted

if TYPE_CHECKING:
    from segpipe.pipelines.export import SceneExport


def verify_command(run: str, *, full: bool, as_json: bool) -> int:
    """Check a run and print its ledger; 0 whole, 3 units missing, 4 an object damaged."""
    from rich.console import Console

    from segpipe.masks.verify import verify_run
    from segpipe.reports.ledger import render_ledger
    from segpipe.storage import open_storage

    with ProgressEvents() as events:
        # Every finding is named as it is found; the tables at the end keep the first few.
        verification = verify_run(
            open_storage(run),
            full=full,
            on_progress=functools.partial(events.count, "units checked"),
            on_finding=lambda finding: events.message(f"{finding.kind}: {finding}"),
        )
    if as_json:
        print_json(verification.to_tree(), verification.exit_code)
    else:
        render_ledger(verification, Console())
    return verification.exit_code


def report_command(run: str, *, executor: str, as_json: bool) -> int:
    """Make index and reports again; 0 also on an unfinished run, which the tables then say."""
    from rich.console import Console

    from segpipe.config.load import load_config
    from segpipe.masks.run import require_run
    from segpipe.pipelines.executor import start_executor
    from segpipe.pipelines.report import make_reports
    from segpipe.reports.terminal import print_scores
    from segpipe.storage import open_storage

    storage = open_storage(run)
    info = require_run(storage)
    workers = start_executor(load_config(None, {"cluster.executor": executor}, (), "flags").cluster)
    try:
        with ProgressEvents() as events:
            summary, missing, total = make_reports(storage, info, workers, events)
    finally:
        workers.close()
    if as_json:
        print_json({"run": run, "missing": missing, "summary": summary})
        return 0
    if summary.get("scores"):
        print_scores(summary, Console())
    if missing:
        print(f"the run is unfinished: {missing} of {counted(total, 'unit')} missing", file=sys.stderr)
    print(f"report: {run}/reports/report.html")
    return 0


def export_command(
    run: str, output: str, *, scenes: str | None, partial: bool, workers: int, as_json: bool
) -> int:
    """Write the GeoTIFFs; 0 done (what was left out is named), 4 damaged objects or files in the way."""
    from segpipe.pipelines.export import export_run

    with ProgressEvents() as events:

        def tell(scene: SceneExport) -> None:
            if scene.reason:
                events.message(f"{scene.outcome}: {scene.scene_id}: {scene.reason}")

        result = export_run(
            run,
            output,
            scenes_glob=scenes,
            partial=partial,
            workers=workers,
            on_progress=functools.partial(events.count, "scenes"),
            on_scene=tell,
        )
    if as_json:
        print_json(result.to_tree(), result.exit_code)
        return result.exit_code
    there = f", {result.already_there} already there" if result.already_there else ""
    print(f"{counted(result.exported, 'GeoTIFF')} written to {output}{there}")
    for named, what in (
        (result.failed, "left out: failed blocks"),
        (result.incomplete, "left out: not all of their blocks are done"),
        (result.damaged, "left out: a damaged object"),
        (result.conflict, "not written: other files are there (delete them, or give another --output)"),
    ):
        if named.count:
            print(f"{counted(named.count, 'scene')} {what}", file=sys.stderr)
    return result.exit_code
