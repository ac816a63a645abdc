"""The commands ``ridgeline models``: list, show, verify and measure versions; roll back; canaries; follow."""

from __future__ import annotations

import getpass
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ridgeline.announcements import announce, change_decision
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.history import canary as canary_of
from ridgeline.history import champions
from ridgeline.latency import BATCHES, measure
from ridgeline.registry import RegistryError
from ridgeline.serving_check import ServingError
from ridgeline.settings import Settings
from ridgeline.store import StoreError

app = typer.Typer(no_args_is_help=True, help="The served models: list, show, verify, measure, roll back, canaries.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model's name, as `list` shows it.")]
Reason = Annotated[str, typer.Option(help="Why; it is recorded in the history.")]
Version = Annotated[
    int | None, typer.Argument(metavar="VERSION", min=1, help="The version's number.", show_default=False)
]


def user() -> str:
    """Return the name of this process's user; the user id if it has no name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def new_run_id() -> str:
    """Return a run id for a command."""
    return f"cli__{datetime.now(UTC).isoformat(timespec='milliseconds')}"


@app.command("list")
def list_models() -> None:
    """List the models: champion, accuracy, since when, number of versions, size of the champion's weights."""
    registry = Settings().open_registry()
    names = registry.model_names()
    if not names:
        typer.echo(f"no model has been served from {registry.place} yet")
        return
    width = max(map(len, [*names, "model"]))
    typer.echo(f"{'model':<{width}}  champion  accuracy  since             versions  MiB")
    for name in names:
        try:
            champion = champions(registry.known_history(name))[-1]
            facts = registry.facts(champion)
        except StoreError as error:
            typer.echo(f"{name:<{width}}  {error}")
            continue
        typer.echo(
            f"{name:<{width}}  {champion.version:>8}  {champion.accuracy:>8.4f}  {champion.at:%Y-%m-%d %H:%M}  "
            f"{len(registry.versions(name)):>8}  {facts.sizes.get('MiB', '') if facts else ''}".rstrip()
        )


@app.command()
def show(name: Name) -> None:
    """Print a model's history, oldest first; * marks the champion, c the canary. Times are UTC.

    Also print sizes and model cards.
    """
    registry = Settings().open_registry()
    history, present = registry.known_history(name), registry.versions(name)
    width = max(3, *(len(entry.by) for entry in history))
    typer.echo(f"  version  action    accuracy  when              {'who':<{width}}  model         reason")
    for entry in history:
        mark = "*" if entry is champions(history)[-1] else "c" if entry is canary_of(history) else " "
        gone = "" if entry.version in present else " (version deleted)"
        share = f"{entry.share:.3g} of the requests{': ' if entry.reasons else ''}" if entry.share else ""
        reason = f"{share}{entry.reasons}{gone}"
        typer.echo(
            f"{mark} {entry.version:>7}  {entry.action:<8}  {entry.accuracy:>8.4f}  {entry.at:%Y-%m-%d %H:%M}  "
            f"{entry.by:<{width}}  {entry.model_digest[:12]}  {reason}".rstrip()
        )
    typer.echo()
    for version in present:
        push = next((entry for entry in history if entry.version == version), None)
        if push and (facts := registry.facts(push)) and facts.sizes:
            typer.echo(f"version {version}: {facts.size_in_words}")
        if card := registry.card(name, version):
            typer.echo(f"version {version}: model card {card}")
    typer.echo(f"served from {registry.place_of(name, champions(history)[-1].version)}")
    if pending := canary_of(history):
        typer.echo(f"canary from {registry.place_of(name, pending.version)}: {pending.share:.3g} of the requests")
        typer.echo(f"`ridgeline models promote {name} {pending.version} --reason ...` or `abort` decides about it")
    if previous := registry.previous(name):
        typer.echo(f"`ridgeline models rollback {name} --reason ...` goes back to version {previous.version}")


@app.command()
def verify(name: Name, version: Version = None) -> None:
    """Check every byte of the champion or of VERSION, and its responses in a fresh process."""
    settings = Settings()
    entry = settings.open_registry().verify(settings.open_store(), name, version)
    typer.echo(f"{name} version {entry.version} holds {entry.artifact}, byte for byte, and serves its predictions")


@app.command()
def sync(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that servers read.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until interrupted.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks with --follow.")] = 10.0,
) -> None:
    """Make FOLDER equal to the registry in an object store, for TensorFlow Serving and `ridgeline serve`."""
    settings = Settings()
    settings.expect_servable(folder.absolute())
    registry = settings.open_object_registry(folder.absolute(), settings.serving_base_path)
    before, problem = None, ""
    while True:
        try:
            served, now = registry.sync(), ""
            if served != before:
                for name, state in sorted(served.items()):
                    canary = f", canary version {state.canary}" if state.canary else ""
                    typer.echo(f"{name}: version {state.champion}{canary}")
                typer.echo(f"{folder} is equal to {registry.place}")
            before = served
        except (StoreError, RegistryError) as error:
            if not follow:
                raise
            now = str(error)
            if now != problem:
                typer.echo(f"error: {now}", err=True)
            before = None  # say so when it follows again
        if not follow:
            return
        problem = now
        time.sleep(every)


@app.command()
def latency(
    name: Name,
    versions: Annotated[
        list[int] | None, typer.Argument(metavar="VERSION...", min=1, help="The versions.", show_default=False)
    ] = None,
) -> None:
    """Measure how long versions take for 1 and for 1,000 images, in turns; without VERSION, all versions."""
    settings = Settings()
    registry, store = settings.open_registry(), settings.open_store()
    numbers: list[int | None] = [*(versions or registry.versions(name))] or [None]
    chosen = [registry.entry(name, version) for version in numbers]
    folders = {str(entry.version): registry.folder(name, entry.version) for entry in chosen}
    images = store.open(chosen[-1].artifact, PushedModel).check / "images.npy"
    try:
        measured = measure(folders, images)
    except ServingError as error:
        raise RegistryError(str(error)) from error
    columns = [f"{batch:,} image{'s' * (batch > 1)}" for batch in BATCHES]
    typer.echo(f"version{''.join(f'{column:>16}' for column in columns)}")
    for version, seconds in measured.items():
        typer.echo(f"{version:>7}{''.join(f'{1e3 * seconds[batch]:>13.3f} ms' for batch in BATCHES)}")


@app.command()
def rollback(
    name: Name,
    reason: Reason,
    version: Version = None,
) -> None:
    """Verify an earlier version and make it the champion.

    Without VERSION, it is the version that was served before the champion and is another model.
    """
    settings = Settings()
    registry, store = settings.open_registry(), settings.open_store()
    entry = registry.rollback(store, name, version, reason=reason, by=user(), run_id=new_run_id())
    announce(settings, change_decision(name, entry))
    typer.echo(f"{name} is served by version {entry.version}, accuracy {entry.accuracy:.4f}: {entry.reason}")


@app.command()
def canary(
    name: Name,
    share: Annotated[float, typer.Option(help="Of the requests, above 0, below 1.")],
    reason: Reason,
    version: Version = None,
) -> None:
    """Verify VERSION and let it answer a share of the requests beside the champion.

    Without VERSION, change the share of the present canary.
    """
    settings = Settings()
    registry, store = settings.open_registry(), settings.open_store()
    entry = registry.start_canary(store, name, version, share, reason=reason, by=user(), run_id=new_run_id())
    announce(settings, change_decision(name, entry))
    typer.echo(f"version {entry.version} of {name} answers {share:.3g} of the requests: {entry.reason}")


@app.command()
def promote(name: Name, reason: Reason, version: Version = None) -> None:
    """Verify the canary and make it the champion. VERSION, if given, must be the present canary."""
    settings = Settings()
    registry, store = settings.open_registry(), settings.open_store()
    entry = registry.promote(store, name, version, reason=reason, by=user(), run_id=new_run_id())
    announce(settings, change_decision(name, entry))
    typer.echo(f"{name} is served by version {entry.version}, accuracy {entry.accuracy:.4f}: {entry.reason}")


@app.command()
def abort(name: Name, reason: Reason, version: Version = None) -> None:
    """End the canary: the champion answers all requests. VERSION, if given, must be the present canary."""
    settings = Settings()
    entry = settings.open_registry().abort(name, version, reason=reason, by=user(), run_id=new_run_id())
    announce(settings, change_decision(name, entry))
    typer.echo(f"version {entry.version} of {name} is no canary any more: {entry.reason}")
