"""The command line: ``ridgeline run | explain | show | lineage | models | gc``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ridgeline import models_cli, pipeline
from ridgeline.artifacts.base import MANIFEST, ArtifactError, verify
from ridgeline.component import Params, StepError
from ridgeline.lineage import Origin, collect_garbage
from ridgeline.lineage import lineage as lineage_of
from ridgeline.registry import RegistryError
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store, StoreError


class _PlainErrors(TyperGroup):
    """Shows what a user can act on as one message; leaves a trace to what is a fault of ours."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (StepError, FloatingPointError, ArtifactError, StoreError, RegistryError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_PlainErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ridgeline: regularized classifiers, from dataset to served model. Settings: RIDGELINE_STORE, "
    "RIDGELINE_SERVING, RIDGELINE_MANUAL_DIR and others, see the README.",
)
app.add_typer(models_cli.app, name="models")

Target = Annotated[str, typer.Argument(help="The last step: ingest, transform, sweep, train, evaluate or export.")]
Set = Annotated[
    list[str],
    typer.Option("--set", metavar="STEP.PARAMETER=VALUE", help="A parameter, e.g. train.penalty.l2=0.001."),
]
With = Annotated[
    list[str],
    typer.Option("--with", metavar="STEP", help="A step that is usually left out: with sweep, it chooses the penalty."),
]
Profile = Annotated[
    str | None, typer.Option(metavar="PROFILE", help="The same as --set train.profile=PROFILE: seed or tuned.")
]
Name = Annotated[str, typer.Argument(help="<Type>/<digest>, a unique beginning of either, or the artifact's path.")]


def _parse(
    target: str, extra: list[str], profile: str | None, assignments: list[str], settings: Settings
) -> tuple[list[Any], dict[str, Params]]:
    steps = pipeline.plan(target, extra)
    values = {"train.profile": profile} if profile else {}
    return steps, pipeline.parse_params(steps, values | pipeline.parse_assignments(assignments), settings)


@app.command()
def run(target: Target = "export", extra: With = [], profile: Profile = None, assignments: Set = []) -> None:  # noqa: B006
    """Run the pipeline up to a step; steps whose inputs, parameters and code are unchanged are reused."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("absl").setLevel(logging.WARNING)
    settings = Settings()
    run_id = models_cli.new_run_id()
    steps, params = _parse(target, extra, profile, assignments, settings)
    results = pipeline.run(settings, steps, params, run_id, by=models_cli.user())
    executions = {result.execution.component: result.execution for result in results}
    typer.echo("")
    for line in pipeline.summary(settings, executions):
        typer.echo(line)


@app.command()
def explain(target: Target = "export", extra: With = [], profile: Profile = None, assignments: Set = []) -> None:  # noqa: B006
    """Tell what `run` would run or reuse, and why; nothing is run or written."""
    settings = Settings()
    for name, reason in pipeline.explain(settings, *_parse(target, extra, profile, assignments, settings)):
        typer.echo(f"{name:<10} {reason}")


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
        made = _made(source.execution) if source.execution else "no record of its making"
        yield f"{pad}{source.ref}  {made}"
        if not source.inputs:
            for name, entry in store.manifest(source.ref).facts.get("raw_files", {}).items():
                yield f"{pad}  {name}  sha256 {entry['sha256']}  {entry['bytes']} bytes"


def _made(execution: Execution) -> str:
    params = " ".join(f"{name}={value}" for name, value in execution.parts.params.items())
    return f"{execution.component} {params} ({execution.run_id})"


@app.command()
def gc(
    keep_runs: Annotated[int, typer.Option(min=1, help="How many of the latest runs to keep whole.")] = 10,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be deleted.")] = False,
) -> None:
    """Delete artifacts that no served version and none of the last runs need."""
    settings = Settings()
    garbage = collect_garbage(settings.open_store(), settings.open_registry(), keep_runs, dry_run)
    for ref, size in garbage.artifacts.items():
        typer.echo(f"{'would delete' if dry_run else 'deleted'} {ref}  {size / 1e6:.1f} MB")
    freed = sum(garbage.artifacts.values()) + sum(garbage.scratch.values())
    typer.echo(
        f"{'would free' if dry_run else 'freed'} {freed / 1e6:.1f} MB: {len(garbage.artifacts)} artifacts, "
        f"{garbage.num_executions} execution records, {len(garbage.scratch)} abandoned scratch folders"
    )


if __name__ == "__main__":
    app()
