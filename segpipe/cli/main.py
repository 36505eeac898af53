"""The ``segpipe`` command: parser, exit codes, errors as one line. Heavy imports happen in the commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Annotated, Any, cast

import typer

from segpipe import __version__
from segpipe.cli import signals
from segpipe.errors import SegpipeError, StorageError
from segpipe.imports import declare_own_process, no_collection

app = typer.Typer(
    name="segpipe",
    help="Batch segmentation of aerial archives: georeferenced masks and IoU/Dice reports as Parquet.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT...", help="Scenes: paths, globs, folders, prefixes, list files (.txt), catalogues."
    ),
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="URI of the run folder.")]
Labels = Annotated[
    str | None,
    typer.Option("--labels", help="Template of the labels: {stem}, {parent} and {scene_id} are filled in."),
]
Model = Annotated[str | None, typer.Option("--model", help="URI of a model.safetensors.")]
Config = Annotated[str | None, typer.Option("--config", help="YAML config; flags override it.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set one config value; overrides all else.")
]
ExecutorFlag = Annotated[str | None, typer.Option("--executor", help="ray, or local: in this process.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="URI of a run folder.")]


@app.command()
def predict(
    scenes: Inputs = None,
    model: Model = None,
    output: Output = None,
    labels: Labels = None,
    config: Config = None,
    sets: Sets = None,
    executor: ExecutorFlag = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Segment an archive of scenes into a dataset of georeferenced masks. The same command resumes."""
    with no_collection():
        from segpipe.cli.jobs import run_command

    flags = _flags(scenes, model=model, output=output, labels=labels, executor=executor)
    raise typer.Exit(run_command("predict", config, flags, sets or [], dry_run=dry_run, as_json=as_json))


@app.command()
def evaluate(
    scenes: Inputs = None,
    labels: Labels = None,
    model: Model = None,
    masks: Annotated[
        str | None, typer.Option("--masks", help="Score the masks of this finished run.")
    ] = None,
    output: Output = None,
    config: Config = None,
    sets: Sets = None,
    executor: ExecutorFlag = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Score a model, or a finished run's masks, against labels: IoU, Dice and more, as tables."""
    with no_collection():
        from segpipe.cli.jobs import run_command

    flags = _flags(scenes, model=model, output=output, labels=labels, executor=executor)
    raise typer.Exit(
        run_command("evaluate", config, flags, sets or [], masks=masks, dry_run=dry_run, as_json=as_json)
    )


@app.command()
def verify(
    run: Run,
    full: Annotated[bool, typer.Option("--full", help="Decode every mask and count it again.")] = False,
    as_json: Json = False,
) -> None:
    """Prove from storage alone that a run is whole, and print its coverage ledger."""
    from segpipe.cli.runs import verify_command

    raise typer.Exit(verify_command(run, full=full, as_json=as_json))


@app.command()
def report(run: Run, executor: ExecutorFlag = "local", as_json: Json = False) -> None:
    """Make index and reports again from the mask objects, on an unfinished run too."""
    from segpipe.cli.runs import report_command

    raise typer.Exit(report_command(run, executor=executor or "local", as_json=as_json))


@app.command()
def export(
    run: Run,
    output: Annotated[str, typer.Option("--output", "-o", help="URI of the folder for the GeoTIFFs.")],
    scenes: Annotated[
        str | None, typer.Option("--scenes", help="Only scenes whose id matches this glob.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Export what is done of an unfinished run.")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Scenes written side by side.")] = 2,
    as_json: Json = False,
) -> None:
    """Write a Cloud-Optimized GeoTIFF per scene, on the scene's own grid."""
    from segpipe.cli.runs import export_command

    raise typer.Exit(
        export_command(run, output, scenes=scenes, partial=partial, workers=workers, as_json=as_json)
    )


@app.command()
def prepare(
    layout: Annotated[
        str | None,
        typer.Argument(
            metavar="LAYOUT", help="How the data lie: archive, camvid, cityscapes, coco, folder, voc."
        ),
    ] = None,
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="SRC...", help="Root folders, or scenes.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="URI of the data set.")] = None,
    labels: Labels = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split", metavar="NAME=PART", help="A fraction, or a glob of sample ids; the rest is train."
        ),
    ] = None,
    exclude_area: Annotated[
        str | None,
        typer.Option("--exclude-area", help="archive: URI of a file of areas; chips on one are left out."),
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help="parquet, or tar (WebDataset).")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="Licence text of the data.")] = None,
    config: Config = None,
    sets: Sets = None,
    executor: ExecutorFlag = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make training shards and dataset.json from images and labels. The same command resumes."""
    from segpipe.cli.prepare import prepare_command

    flags = {
        "layout": layout,
        "sources": sources or None,
        "output": output,
        "labels": labels,
        "archive.exclude_area": exclude_area,
        "format": form,
        "licence": licence,
        "cluster.executor": executor,
    }
    raise typer.Exit(
        prepare_command(config, flags, sets or [], splits=split or [], dry_run=dry_run, as_json=as_json)
    )


@app.command()
def train(
    config: Config = None,
    data: Annotated[str | None, typer.Option("--data", help="URI of a prepared data set.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="URI of the training's folder.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="URI of pretrained weights to start from.")
    ] = None,
    sets: Sets = None,
    executor: ExecutorFlag = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a model from a prepared data set, on one machine or a cluster. The same command resumes."""
    from segpipe.cli.train import train_command

    flags = {"data.uri": data, "output": output, "init.weights": weights, "cluster.executor": executor}
    raise typer.Exit(train_command(config, flags, sets or [], dry_run=dry_run, as_json=as_json))


@app.command()
def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the results.")] = "segpipe-demo",
    executor: ExecutorFlag = None,
) -> None:
    """Segment, score, export and draw a small real archive that comes with the package."""
    from segpipe.cli.demo import demo_command

    raise typer.Exit(demo_command(output, executor=executor or "ray"))


@config_app.command("schema")
def config_schema(
    of: Annotated[str, typer.Option("--of", help="predict (and evaluate), prepare or train.")] = "predict",
) -> None:
    """Print the JSON schema of a command's YAML config."""
    import json

    from segpipe.config.schema import config_schema as schema

    print(json.dumps(schema(of), indent=2))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"segpipe {__version__}")
        raise typer.Exit


def _flags(
    scenes: list[str] | None,
    *,
    model: str | None,
    output: str | None,
    labels: str | None,
    executor: str | None,
) -> dict[str, Any]:
    return {
        "input.scenes": scenes or None,
        "input.labels": labels,
        "model": model,
        "output": output,
        "cluster.executor": executor,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with its exit code; None = the arguments of the process."""
    if arguments is None:
        declare_own_process()
    with signals.heard():
        try:
            with _results():
                code = app(args=arguments, standalone_mode=False)
        except SegpipeError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        except (KeyboardInterrupt, signals.Terminated, typer.Abort):
            code = 130
        except _Unread:
            code = 141
        except Exception as error:  # of a library too that a signal met at a bad moment
            code = signals.exit_code() or _unexpected(error)
        if code:
            code = signals.exit_code() or code
    if code in (130, 143):
        print("stopped; the same command goes on where this one stopped", file=sys.stderr)
    sys.exit(code or 0)


class _Unread(Exception):
    """Nobody reads stdout; no OSError, for Rich would end the process on its own for a broken pipe."""


class _Stdout:
    """stdout that tells its own faults from all others: a full disk under it is no bug."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with self._told():
            return self._file.write(text)

    def flush(self) -> None:
        with self._told():
            self._file.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = True
            if isinstance(error, BrokenPipeError):
                raise _Unread from error
            what = f"the results cannot be printed ({error.strerror or error})"
            fix = "Free space there or print elsewhere, and run the same command again: what is done stays."
            raise StorageError(what, "stdout", fix) from error


@contextmanager
def _results() -> Iterator[None]:
    """Print all of stdout in this context, or raise: Python would flush the rest only as the process ends."""
    if sys.stdout is None:  # the parent closed it
        yield
        return
    file, watched = sys.stdout, _Stdout(sys.stdout)
    sys.stdout = cast(Any, watched)
    try:
        yield
        watched.flush()
    finally:
        sys.stdout = None if watched.failed else file  # None: or Python would fail once more at the end


def _unexpected(error: Exception) -> int:
    """Usage errors of the parser print themselves and exit with 2; everything else is a bug."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
        return int(getattr(error, "exit_code", 2))
    import traceback

    traceback.print_exception(error)
    print(f"error: a bug in segpipe: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
