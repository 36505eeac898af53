"""``segpipe demo``: predict, score, export and draw the packaged archive."""

from __future__ import annotations

from segpipe.cli.jobs import print_outcome, read_config
from segpipe.cli.progress import ProgressEvents
from segpipe.cli.runs import export_command
from segpipe.config.model import InputConfig
from segpipe.demo.archive import DemoArchive, demo_archive
from segpipe.geometry.grid import Window
from segpipe.masks.ledger import Replacements
from segpipe.masks.plan import load_part
from segpipe.masks.read import MaskReader, SceneUnits
from segpipe.masks.run import list_parts, require_run
from segpipe.pipelines.job import make_job
from segpipe.pipelines.predict import run_job
from segpipe.rasters.labels import open_label
from segpipe.rasters.reader import open_scene
from segpipe.reports.pictures import draw_scene
from segpipe.storage import open_storage


def demo_command(output: str, *, executor: str) -> int:
    """Run the demo into ``output`` and return the exit code."""
    from rich.console import Console

    from segpipe.reports.terminal import print_scores

    archive = demo_archive()
    run = f"{output}/run"
    _lay_out(archive, f"{output}/archive")
    flags = {
        "input.scenes": [f"{output}/archive/scenes"],
        "input.labels": "{parent}/../labels/{stem}.tif",
        "model": str(archive.model),
        "output": run,
        "cluster.executor": executor,
    }
    config = read_config(None, flags, [])
    with ProgressEvents() as events:
        outcome = run_job(make_job(config), events, need_labels=True)
    if outcome.exit_code:
        print_outcome(outcome, as_json=False)
        return outcome.exit_code
    code = export_command(run, f"{output}/geotiff", scenes=None, partial=False, workers=2, as_json=False)
    pictures = _draw(run, f"{output}/pictures", config.input)
    print_scores(outcome.summary, Console())
    _print_places(output, pictures, archive.attribution.name)
    return code


def _lay_out(archive: DemoArchive, folder: str) -> None:
    """Copy what is not there yet: the package's own files are other ones after each installation."""
    target = open_storage(folder)
    files = [*archive.scenes.iterdir(), *archive.labels.iterdir(), archive.attribution]
    for path in sorted(files):
        key = path.name if path == archive.attribution else f"{path.parent.name}/{path.name}"
        if target.stat(key) is None:
            target.put_if_absent(key, path.read_bytes())


def _draw(run: str, folder: str, config: InputConfig) -> int:
    """Write a picture per scene and return how many."""
    storage, target = open_storage(run), open_storage(folder)
    info = require_run(storage)
    reader = MaskReader(storage)
    count = 0
    parts = list_parts(storage)
    replacements = Replacements(storage, parts)
    for part in parts:
        replaced = replacements.of(part)
        for scene in load_part(storage, part, info.facts).scenes():
            if scene.header is None or scene.source.scene_id in replaced:
                continue
            source, header = scene.source, scene.header
            size = header.height, header.width
            whole = Window(0, 0, *size)
            with (
                open_scene(source, header, config) as pixels,
                open_label(source, *size, info.card.classes, config, header.located) as labels,
            ):
                image, label = pixels.read(whole)[0][:3], labels.read(whole)
            units = SceneUnits(source.scene_id, part, scene.first_unit, scene.units)
            mask, _ = reader.read(units, whole)
            target.put(
                f"{source.scene_id}.png", draw_scene(image, label, mask, info.card.classes, source.scene_id)
            )
            count += 1
    return count


def _print_places(output: str, pictures: int, attribution: str) -> None:
    print(f"archive   {output}/archive  (scenes and labels; their sources: {attribution})")
    print(f"masks     {output}/run/masks  (Parquet: open with DuckDB, GeoPandas, pandas)")
    print(f"report    {output}/run/reports/report.html")
    print(f"GeoTIFFs  {output}/geotiff  (Cloud-Optimized, open in QGIS)")
    print(f"pictures  {output}/pictures  ({pictures})")
