"""Trains a served version again from its lineage, in a store of its own, and compares each artifact's bytes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ridgeline.access import message
from ridgeline.artifacts.base import ArtifactError
from ridgeline.component import Component, ParameterError, Params
from ridgeline.executor import execute
from ridgeline.lineage import Origin, ancestors, lineage
from ridgeline.pipeline import load_components
from ridgeline.registry import Registry
from ridgeline.settings import PREFIX, Settings
from ridgeline.store import Execution, Store


class RebuildError(RuntimeError):
    """A version can't be built again: its lineage or its data is missing, it is damaged, or a step fails.

    Attributes:
        exit_code: The exit status of the command line.
    """

    exit_code = 2


@dataclass(frozen=True)
class Rebuilt:
    """The outcome of a step that was run again.

    Attributes:
        step: The step's name.
        expected: Store-relative name of the artifact that the lineage names.
        received: That of the artifact that was made now; None if the step made none.
        seconds: How long the step took.
        files: The files of the artifact that differ; empty if only its facts do.
        differences: What differs from the record: parameters, code, libraries, sources, the champion; one phrase each.
        skipped: Why the step made nothing; empty if it made an artifact.
    """

    step: str
    expected: str
    received: str | None
    seconds: float
    files: tuple[str, ...]
    differences: tuple[str, ...]
    skipped: str = ""

    @property
    def same(self) -> bool:
        """Whether the artifact has the same bytes."""
        return self.received == self.expected


def rebuild(settings: Settings, name: str, version: int | None = None) -> Iterator[Rebuilt]:
    """Build a served version again, and compare each artifact with the one that the lineage names.

    Each step runs with the parameters of its record, in a temporary store that is empty, on what was built again
    before. Champions, which a step compared its own model with or started from, are taken from the store. Nothing is
    written to the store or to the folder of the served models. What follows the first artifact that differs is not
    built, since it would differ, too.

    Args:
        settings: Where the store, the served models and the data are.
        name: The model's name.
        version: The version; the champion if None.

    Yields:
        Each step's outcome, in order. The last one is the first that differs, or all have the same bytes.

    Raises:
        RebuildError: If the version can't be built again.
    """
    try:
        store, registry = settings.open_store(), settings.open_registry()
        origins = _origins(store, registry, name, version)
        champions = [ref for origin in origins for ref in _champions(origin.execution).values()]
        with (
            store.lease("rebuild", [*(origin.ref for origin in origins), *champions]),
            tempfile.TemporaryDirectory(prefix="ridgeline-rebuild-") as folder,
        ):
            clean = Store(Path(folder) / "store")
            for ref in champions:
                _copy(store, clean, ref)
            for origin in origins:
                outcome = _run(settings, store, clean, origin)
                yield outcome
                if not outcome.same:
                    return
    except RebuildError:
        raise
    except Exception as error:  # of any step or library: it is no difference
        raise RebuildError(f"Cannot rebuild {_named(name, version)}: {message(error)}") from error


def _named(name: str, version: int | None) -> str:
    return f"{name} version {version}" if version else f"the champion of {name}"


def _origins(store: Store, registry: Registry, name: str, version: int | None) -> list[Origin]:
    """Return what a version was made from, in the order in which it was made, itself last.

    Raises:
        RebuildError: If a part of the lineage is missing, or is the output of a step that is not installed, or of
            several workers.
    """
    _, pushed = registry.open_version(store, name, version)
    components = load_components()
    origins = ancestors(lineage(store, pushed.ref), {step.name: [*step.champions] for step in components.values()})
    for origin in origins:
        if origin.execution is None:
            raise RebuildError(
                f"Cannot rebuild {_named(name, version)}: expected the record of the execution that made {origin.ref}; "
                "received none. Restore executions/ of the store from a backup."
            )
        if origin.execution.component not in components:
            raise RebuildError(
                f"Cannot rebuild {_named(name, version)}: expected the step {origin.execution.component}, which made "
                f"{origin.ref}; it is not installed. Install its package."
            )
        if origin.execution.parts.workers > 1:
            raise RebuildError(
                f"Cannot rebuild {_named(name, version)}: {origin.execution.parts.workers} workers made {origin.ref} "
                f"together, and one gives other bytes. Run {origin.execution.component} on as many, and compare."
            )
    return origins


def _champions(execution: Execution | None) -> dict[str, str]:
    """Return the champions that an execution took, by input name; those that it could not read are left out."""
    if execution is None:
        return {}
    names = load_components()[execution.component].champions
    inputs = execution.inputs.items()
    return {n: ref for n, ref in inputs if n in names and execution.parts.inputs[n] == ref.partition("/")[2]}


def _copy(store: Store, clean: Store, ref: str) -> None:
    """Copy an artifact into the temporary store, verified."""
    components = load_components().values()
    kind = next(kind for step in components for kind in step.champions.values() if kind.__name__ == ref.split("/")[0])
    if not clean.holds(ref):
        shutil.copytree(store.open(ref, kind).path, clean.path(ref))


def _run(settings: Settings, store: Store, clean: Store, origin: Origin) -> Rebuilt:
    recorded = origin.execution
    assert recorded
    component = load_components()[recorded.component]
    params = _params(component, recorded, settings)
    try:
        made = execute(clean, component, recorded.inputs, params, "rebuild")
    except Exception as error:
        raise RebuildError(
            f"Cannot rebuild {origin.ref}: the step {component.name} failed: {message(error)}"
        ) from error
    return Rebuilt(
        step=component.name,
        expected=origin.ref,
        received=made.output,
        seconds=made.seconds,
        files=_different_files(store, clean, origin.ref, made.output),
        differences=tuple(made.parts.differences(recorded.parts)),
        skipped=made.reason if made.state == "skipped" else "",
    )


def _params(component: Component, recorded: Execution, settings: Settings) -> Params:
    """Return the parameters of a record, with the locations of this machine."""
    nested: dict[str, Any] = dict(settings.locations(component))
    for name, value in recorded.parts.params.items():
        *path, leaf = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    try:
        return component.parse(nested)
    except ParameterError as error:
        unset = recorded.parts.sources.keys() & Settings.model_fields.keys() - nested.keys()
        variables = " and ".join(f"{PREFIX}{name.upper()}" for name in sorted(unset))
        raise RebuildError(
            f"Cannot rebuild {recorded.output}: this release of the step {component.name} refuses the recorded "
            f"parameters: {error} "
            + (f"Set {variables} to what the step read." if unset else "Install the release that made it.")
        ) from error


def _different_files(store: Store, clean: Store, expected: str, received: str | None) -> tuple[str, ...]:
    """Return the names of the files that differ between the recorded artifact and the new one."""
    if received in (None, expected):
        return ()
    try:
        before, now = store.manifest(expected).files, clean.manifest(str(received)).files
    except ArtifactError:  # the recorded one was deleted: its name alone tells that it differs
        return ()
    return tuple(sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n)))
