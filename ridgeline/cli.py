"""The command line ``ridgeline``: its commands are the functions here, and those of `ridgeline.models_cli`."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ridgeline import comparison_text, models_cli, pipeline, step_cli
from ridgeline.access import message
from ridgeline.approval import Terminal
from ridgeline.artifacts.base import MANIFEST, ArtifactError, verify
from ridgeline.artifacts.predictions import Predictions
from ridgeline.compare import CompareError, compare, find_side
from ridgeline.component import ParameterError, Params, StepError
from ridgeline.gc import collect_garbage
from ridgeline.lineage import Origin
from ridgeline.lineage import lineage as lineage_of
from ridgeline.masking import mask
from ridgeline.predictions_output import expect_output, write_output
from ridgeline.rebuild import RebuildError, Rebuilt
from ridgeline.rebuild import rebuild as rebuild_version
from ridgeline.registry import RegistryError
from ridgeline.run_summary import summary
from ridgeline.serving import ServeError
from ridgeline.settings import Settings, SettingsError
from ridgeline.store import Execution, Store, StoreError
from ridgeline.workers import workers_of_environment

KNOWN_ERRORS = (ArtifactError, StoreError, RegistryError, SettingsError, CompareError, RebuildError, ServeError)


class _PlainErrors(TyperGroup):
    """Shows an error that a user can act on as one message; any other keeps its traceback, without secrets of URLs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (StepError, FloatingPointError, *KNOWN_ERRORS) as error:
            cause = error.__cause__
            typer.echo(
                f"error: {message(cause if isinstance(cause, PermissionError) and cause.filename else error)}", err=True
            )
            raise typer.Exit(getattr(error, "exit_code", 1)) from None
        except PermissionError as error:
            typer.echo(f"error: {message(error)}", err=True)
            raise typer.Exit(1) from None
        except Exception as error:
            if not any(mask(other) != str(other) for other in _chain(error)):
                raise
            usage = getattr(error, "format_message", None)  # of an error in the command line itself
            text = f"error: {usage()}" if usage else "".join(traceback.format_exception(error))
            typer.echo(mask(text), err=True)
            raise typer.Exit(getattr(error, "exit_code", 1)) from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it: all that a traceback shows."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


app = typer.Typer(
    cls=_PlainErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ridgeline: regularized classifiers, from dataset to served model. Settings: RIDGELINE_STORE, "
    "RIDGELINE_SERVING, RIDGELINE_MANUAL_DIR and others, see docs/operating.md.",
)
app.add_typer(models_cli.app, name="models")


class _PipelineCommand(TyperCommand):
    """A command that runs steps: its help lists them, and it takes the options that their parameters declare."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if self.name == "explain" or "--help" in args:
            logging.basicConfig(level=logging.INFO, format="%(message)s")  # with extensions that can't be used
        return super().parse_args(ctx, list(_expand(args)))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        target = pipeline.default_target()
        short = [f"{option} VALUE is short for --set {name}=VALUE" for option, name in _declared_options().items()]
        texts = {
            "target": f"The last step: {', '.join(pipeline.load_components())}. {target} if left out.",
            "extra": f"A step that is left out by default: {', '.join(pipeline.optional_steps(target))}.",
            "assignments": f"A parameter. {'; '.join(short)}{'.' if short else ''}",
        }
        for param in self.params:
            if param.name in texts:
                param.help = texts[param.name]  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def _declared_options() -> dict[str, str]:
    """Return the options that fields of steps declare, see `ridgeline.component.with_option`, with their parameters."""
    options: dict[str, str] = {}
    for step in pipeline.load_components().values():
        for name, field in step.params.model_fields.items():
            if isinstance(extra := field.json_schema_extra, dict) and "option" in extra:
                option, full_name = str(extra["option"]), f"{step.name}.{name}"
                if option in options:
                    raise ParameterError(
                        f"Expected another option for {full_name}; received {option}, which {options[option]} has. "
                        "Change one of them."
                    )
                options[option] = full_name
    return options


def _expand(args: list[str]) -> Iterator[str]:
    """Replace declared options by what they are short for: ``--profile tuned`` by ``--set train.profile=tuned``."""
    options, rest = _declared_options(), iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option in options:
            yield from ("--set", f"{options[option]}={value if equals else next(rest, '')}")
        else:
            yield arg


Target = Annotated[str, typer.Argument(show_default=False)]
Set = Annotated[list[str], typer.Option("--set", metavar="STEP.PARAMETER=VALUE", help="A parameter.")]
With = Annotated[list[str], typer.Option("--with", metavar="STEP")]
Rerun = Annotated[list[str], typer.Option(metavar="STEP", help="A step to run even if nothing changed.")]
SIDE = (
    "A served version as NAME/VERSION, its champion as NAME, <Type>/<digest> of a model, or a run; or a unique prefix."
)
Name = Annotated[str, typer.Argument(help="<Type>/<digest>, a unique prefix of either, or the artifact's path.")]


def _parse(
    target: str, extra: list[str], assignments: list[str], settings: Settings
) -> tuple[list[Any], dict[str, Params]]:
    steps = pipeline.plan(target or pipeline.default_target(), extra)
    return steps, pipeline.parse_params(steps, pipeline.parse_assignments(assignments), settings)


@app.command(cls=_PipelineCommand)
def run(target: Target = "", extra: With = [], assignments: Set = [], rerun: Rerun = []) -> None:  # noqa: B006
    """Run the pipeline up to a step; steps whose inputs, parameters and code are unchanged are reused."""
    _log_to_standard_output()
    settings = Settings()
    run_id = models_cli.new_run_id()
    steps, params = _parse(target, extra, assignments, settings)
    by = models_cli.user()
    results = pipeline.run(settings, steps, params, run_id, by=by, rerun=rerun, ask=Terminal(by))
    executions = {result.execution.component: result.execution for result in results}
    typer.echo("")
    for line in summary(settings, executions):
        typer.echo(line)


def _log_to_standard_output() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("absl").setLevel(logging.WARNING)


@app.command(cls=_PipelineCommand)
def explain(target: Target = "", extra: With = [], assignments: Set = [], rerun: Rerun = []) -> None:  # noqa: B006
    """Predict what `run` would run or reuse, and why; nothing is run or written."""
    settings = Settings()
    for name, reason in pipeline.explain(settings, *_parse(target, extra, assignments, settings), rerun):
        typer.echo(f"{name:<10} {reason}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def step(ctx: typer.Context, name: Annotated[str, typer.Argument()] = "") -> None:
    """Run one step by itself, on artifact directories; NAME --help describes its parameters."""
    if {"--help", "-h"} & {name, *ctx.args}:
        logging.basicConfig(level=logging.INFO, format="%(message)s")  # with extensions that can't be used
    steps = pipeline.load_components()
    if name not in steps:
        if name in ("", "--help"):
            typer.echo(f"Usage: ridgeline step NAME [OPTIONS]\n\nNAME is one of {', '.join(steps)}.")
            typer.echo("`ridgeline step NAME --help` describes the options.")
            return
        raise ParameterError(f"Expected a step of {', '.join(steps)}; received {name!r}.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    workers = workers_of_environment() if steps[name].distributes else None
    if artifact := step_cli.run_step(steps[name], ctx.args, workers):
        typer.echo(f"{artifact.ref} in {artifact.path}")
    else:
        typer.echo("the chief of the workers writes the output")


@app.command()
def infer(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name, as `models list` shows it.")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The images, a path or a URL; with subfolders.")],
    output: Annotated[Path, typer.Option(help="The Parquet file to write; with --new-files-only, a folder.")],
    version: Annotated[
        int | None, typer.Option(min=1, help="The model's version; the champion if left out.", show_default=False)
    ] = None,
    new_files_only: Annotated[
        bool,
        typer.Option(
            "--new-files-only", help="Predict only for files without a row in earlier predictions of new files."
        ),
    ] = False,
) -> None:
    """Predict the class of each image in a folder with a served model, into a Parquet file. Nothing is trained."""
    _log_to_standard_output()
    settings, step = Settings(), pipeline.step_that_yields(Predictions)
    given = {"model": model, "folder": folder, "version": version, "new_files_only": new_files_only}
    (component,) = steps = pipeline.plan(step)
    params = pipeline.parse_params(steps, {f"{step}.{name}": value for name, value in given.items()}, settings)
    expect_output(output, component, params[step])
    (result,) = pipeline.run(settings, steps, params, models_cli.new_run_id())
    store = settings.open_store()
    files = write_output(store, component, params[step], result.execution, output)
    typer.echo("")
    if result.execution.output is None:
        typer.echo(result.execution.reason)
    for file in files:
        typer.echo(f"written: {file}")
    if result.execution.output:
        facts = store.open(result.execution.output, Predictions).facts
        typer.echo(
            f"{facts.num_files:,} files, of which {facts.num_unreadable:,} are unreadable (column error); predicted by "
            f"{facts.model_name} version {facts.version}"
        )


@app.command()
def show(artifact: Name) -> None:
    """Print an artifact's manifest, after verifying every byte of it."""
    store = Settings().open_store()
    ref = store.find(artifact)
    path = store.fetch(ref)
    verify(path)
    typer.echo(f"{ref}\nin {path}, verified")
    typer.echo((path / MANIFEST).read_text(encoding="utf-8"), nl=False)


@app.command()
def lineage(artifact: Name) -> None:
    """Print where an artifact comes from, back to the raw files' digests."""
    store = Settings().open_store()
    for line in _tree(lineage_of(store, store.find(artifact)), store):
        typer.echo(line)


def _tree(origin: Origin, store: Store) -> Iterator[str]:
    for depth, source, again in origin.walk():
        pad = "  " * depth
        if again:
            yield f"{pad}{source.ref}  (above)"
            continue
        made = _made(source.execution) if source.execution else "no record of its execution"
        yield f"{pad}{source.ref}  {made}"
        if not source.inputs and store.holds(source.ref):
            for name, entry in store.manifest(source.ref).facts.get("raw_files", {}).items():
                yield f"{pad}  {name}  sha256 {entry['sha256']}  {entry['bytes']} bytes"
            for name, digest in source.execution.parts.sources.items() if source.execution else ():
                yield f"{pad}  {name}  sha256 {digest} of the names and content of its files"


def _made(execution: Execution) -> str:
    params = " ".join(f"{name}={value}" for name, value in execution.parts.params.items())
    return f"{execution.component} {params} ({execution.run_id})"


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=SIDE)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same for the other.")],
    images: Annotated[int, typer.Option(min=0, help="How many images of each kind of disagreement to list.")] = 10,
) -> None:
    """Compare two runs, models or served versions of one dataset: parameters, code, data, figures, predictions."""
    settings = Settings()
    store, registry = settings.open_store(), settings.open_registry()
    for line in comparison_text.lines(compare(find_side(store, registry, a), find_side(store, registry, b)), images):
        typer.echo(line)


@app.command()
def rebuild(name: models_cli.Name, version: models_cli.Version = None) -> None:
    """Train the champion or VERSION again from its lineage, in a temporary store, and compare each artifact's bytes.

    Exit status: 0 if all have the same bytes, 1 if one differs, 2 if the version can't be built again.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        settings = Settings()
    except SettingsError as error:
        raise RebuildError(str(error)) from None
    outcomes = []
    for outcome in rebuild_version(settings, name, version):
        outcomes.append(outcome)
        bytes_are = "same" if outcome.same else "different"
        typer.echo(f"{outcome.step:<12} {bytes_are:<9} {outcome.seconds:>6.1f} s  {_made_again(outcome)}")
    typer.echo("")
    for line in _conclusion(outcomes):
        typer.echo(line)
    if not outcomes[-1].same:
        raise typer.Exit(1)


def _made_again(outcome: Rebuilt) -> str:
    """Return the artifact that a step was to make again, and what it made in its place."""
    kind, _, digest = outcome.expected.partition("/")
    if outcome.same:
        return f"{kind}/{digest[:12]}"
    if outcome.received is None:
        return f"{kind}/{digest[:12]} → none: {outcome.skipped}"
    other = outcome.received.partition("/")[2]
    return f"{kind}/{digest[:12]} → {other[:12]}: {', '.join(outcome.files) or 'other facts'}"


def _conclusion(outcomes: list[Rebuilt]) -> Iterator[str]:
    """Yield what the outcomes mean, in sentences."""
    last = outcomes[-1]
    if last.same:
        yield f"All {len(outcomes)} artifacts have the recorded bytes."
        if changed := sorted({phrase for outcome in outcomes for phrase in outcome.differences}):
            yield "The bytes are the same, although these differ from the record:"
            yield from (f"  {phrase}" for phrase in changed)
    elif last.differences:
        yield f"{last.step} yields other bytes. These differ from its record:"
        yield from (f"  {phrase}" for phrase in last.differences)
    else:
        yield (
            f"{last.step} yields other bytes, although its parameters, code files, libraries and sources are those of "
            "its record. The record names no processor, no system library and no library of a library: compare these."
        )


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="The address; all but loopback addresses need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port; 0 for a free one.")] = 8501,
    max_request_mib: Annotated[float, typer.Option(min=0.001, help="The largest body of a request.")] = 16.0,
    max_batch: Annotated[int, typer.Option(min=1, help="The most images of a request, and of a batch.")] = 256,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Until a request has arrived; also to decode it.")] = 30.0,
    max_image_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="The largest image file; if left out, as large as for training.", show_default=False),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the token that clients send: Authorization: Bearer TOKEN.")
    ] = None,
) -> None:
    """Serve all models over the REST API of TensorFlow Serving; pushes, rollbacks and canaries take effect at once.

    Requests also take image files: curl --data-binary @photo.jpg http://127.0.0.1:8501/v1/models/NAME:predict
    """
    from ridgeline.serving.app import Limits  # with FastAPI, which no other command needs
    from ridgeline.serving.server import serve as run_server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    limits = Limits(max_request_mib, max_batch, max_seconds, max_image_pixels)
    run_server(Settings().open_registry(), host, port, limits, token_file)


@app.command()
def gc(
    keep_runs: Annotated[int, typer.Option(min=1, help="How many of the latest runs to keep whole.")] = 10,
    keep_hours: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Keep also the runs whose last step ended in these hours: they may be in progress. 24 hours and "
            "RIDGELINE_APPROVAL_HOURS if left out.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
) -> None:
    """Delete artifacts that no served version, none of the last runs and no run in progress need."""
    settings = Settings()
    recent = settings.longest_run if keep_hours is None else timedelta(hours=keep_hours)
    steps = pipeline.load_components().values()
    garbage = collect_garbage(settings.open_store(), settings.open_registry(), keep_runs, dry_run, recent, steps)
    for ref, size in garbage.artifacts.items():
        typer.echo(f"{'would delete' if dry_run else 'deleted'} {ref}  {size / 1e6:.1f} MB")
    typer.echo(
        f"{'would free' if dry_run else 'freed'} {garbage.freed_bytes / 1e6:.1f} MB: {len(garbage.artifacts)} "
        f"artifacts, {garbage.num_executions} execution records, {len(garbage.scratch)} abandoned scratch folders, "
        f"{len(garbage.staging)} folders of killed steps"
    )
    if garbage.num_in_progress:
        typer.echo(
            f"kept {garbage.num_in_progress} more runs that may be in progress; with --keep-hours 0, only those whose "
            "step is running"
        )


if __name__ == "__main__":
    app()
