"""Runs one step as a transaction: looks up its key, reuses or runs it, publishes, records."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ridgeline import quiet_tensorflow, worker_process
from ridgeline.artifacts.base import Artifact, ArtifactError
from ridgeline.component import (
    Champion,
    Component,
    Params,
    Source,
    StepSkipped,
    TransientStepError,
    Workers,
    members,
)
from ridgeline.files import flush_tree
from ridgeline.keys import KeyParts, key_parts
from ridgeline.masking import mask
from ridgeline.records import SHORT
from ridgeline.sources import describe_changes, expect_unchanged, read_sources
from ridgeline.store import Execution, Store, StoreError

log = logging.getLogger(__name__)

COMPARED_EXECUTIONS = 20  # the latest ones; the reason to run is the difference from the nearest of them
UNCHANGED = "same inputs, parameters and code"
REQUESTED = "the user asked to run it again"
SOURCES = "sources"  # the folder of indexes and listings in the store
NAMED_FILES = 3  # of a damaged champion
CHIEF_SECONDS, LOOK_SECONDS = 600.0, 0.5  # how long a worker waits for the chief's record, and between two looks


@dataclass(frozen=True)
class Decision:
    """Whether a step would run, and why.

    Attributes:
        parts: What its key covers.
        reason: Why it runs or is reused.
        output: The artifact to reuse; None if the step runs.
        sources: The step's sources, as they were listed for the key.
    """

    parts: KeyParts
    reason: str
    output: Artifact[Any] | None
    sources: Mapping[str, Source]

    def __str__(self) -> str:
        return f"{'reused' if self.output else 'runs'}: {self.reason}"


def open_inputs(
    store: Store, component: Component, inputs: Mapping[str, str]
) -> dict[str, Artifact[Any] | Champion[Any]]:
    """Return a component's inputs, verified.

    Args:
        store: The store.
        component: The component.
        inputs: Store-relative artifact names by input name.

    Raises:
        ArtifactError: If an input other than a champion is missing, damaged or of another type.
    """
    kinds = {name: kind for group, kind in component.groups.items() for name in members(inputs, group)}
    kinds |= {name: kind for name, kind in component.optional.items() if name in inputs}
    kinds |= component.inputs
    champions = {name: kind for name, kind in component.champions.items() if name in inputs}
    if inputs.keys() != kinds.keys() | champions.keys():
        raise ArtifactError(
            f"Expected the inputs {sorted(component.inputs)} for {component.name}; received {sorted(inputs)}."
        )
    opened: dict[str, Artifact[Any] | Champion[Any]] = {n: store.open(inputs[n], kind) for n, kind in kinds.items()}
    return opened | {name: _open_champion(store, inputs[name], kind) for name, kind in champions.items()}


def _open_champion(store: Store, ref: str, kind: type[Artifact[Any]]) -> Champion[Any]:
    digest = ref.rpartition("/")[2]
    try:
        return Champion(digest, store.open(ref, kind))
    except (ArtifactError, OSError) as error:
        log.warning("cannot read the champion: %s", mask(error))
        files = getattr(error, "files", ())
        if not files:
            return Champion(digest, None)
        more = f" and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else ""
        return Champion(digest, None, f"missing, changed or extra: {', '.join(files[:NAMED_FILES])}{more}")


def added_to(store: Store, component: Component, params: Params) -> dict[str, str]:
    """Return the last output that a step adds to, by input name; empty if there is none.

    Args:
        store: The store.
        component: The step.
        params: Its parameters.
    """
    wanted = component.shared(params.in_key())
    for made in store.executions(component.name, with_output=True) if component.adds(params) else ():
        if made.output and component.shared(made.parts.params) == wanted:
            if store.holds(made.output):
                return {component.earlier: made.output}  # type: ignore[dict-item]
            log.warning("%s can't add to %s, which was deleted", component.name, made.output)
    return {}


def list_sources(
    store: Store, component: Component, params: Params, inputs: Collection[str], keep: bool = True
) -> dict[str, Source]:
    """List and fingerprint a step's sources with the index in the store, see `read_sources`.

    Args:
        store: The store.
        component: The step.
        params: Its parameters.
        inputs: Names of its inputs.
        keep: Write the index; if not, nothing is written.
    """
    return read_sources(component, params, store.local / SOURCES, keep, inputs)


def decide(
    store: Store,
    component: Component,
    inputs: Mapping[str, Artifact[Any] | Champion[Any]],
    params: Params,
    rerun: bool = False,
    sources: Mapping[str, Source] | None = None,
    workers: Workers | None = None,
) -> Decision:
    """List the step's sources and look up its key.

    A hit counts only if its artifact is verified.

    Args:
        store: The store.
        component: The component.
        inputs: Its input artifacts by name.
        params: Its parameters.
        rerun: Run it even if there is a hit.
        sources: The step's sources, if they were listed before.
        workers: The processes that run it together, if it distributes; None for one.

    Raises:
        SourceError: If a source can't be read.
    """
    if sources is None:
        sources = list_sources(store, component, params, inputs)
    parts = key_parts(component, inputs, params, sources, workers)

    def decided(reason: str, output: Artifact[Any] | None = None) -> Decision:
        return Decision(parts, reason, output, sources)

    def describe(name: str, before: str) -> str:
        return describe_changes(sources[name], before, store.local / SOURCES)

    if rerun:
        return decided(REQUESTED)
    if (hit := _hit(store, component, parts)) is not None:
        try:
            return decided(UNCHANGED, store.open(hit, component.output))
        except ArtifactError as error:
            return decided(f"artifact missing or damaged: {error}")
    earlier = list(_compared(store, component))
    if earlier:
        nearest = min(earlier, key=lambda e: len(parts.differences(e.parts)))
        described = parts.differences(nearest.parts, describe)
        return decided("; ".join(described))
    if (last := next(store.executions(component.name), None)) is None:
        return decided(f"first run of {component.name}")
    return decided("; ".join([f"last attempt {last.state}", *parts.differences(last.parts, describe)]))


def _hit(store: Store, component: Component, parts: KeyParts) -> str | None:
    """Return the output of the last execution with a key; None if there is none."""
    return next((e.output for e in store.executions(component.name, key=parts.key())), None)


def _compared(store: Store, component: Component) -> Iterator[Execution]:
    """Return the latest executions with an output."""
    return itertools.islice(store.executions(component.name, with_output=True), COMPARED_EXECUTIONS)


def _previous(store: Store, component: Component, parts: KeyParts) -> Artifact[Any] | None:
    """Return the last output of a step that differs in nothing but the content of its sources, if it is intact."""
    for execution in _compared(store, component):
        if execution.output and execution.parts.model_copy(update={"sources": parts.sources}) == parts:
            with contextlib.suppress(ArtifactError, OSError):
                return store.open(execution.output, component.output)
    return None


def _await_chief(store: Store, component: Component, parts: KeyParts, last: str) -> Execution:
    """Return the chief's record of a step that this worker took part in.

    Args:
        store: The store.
        component: The step.
        parts: What its key covers.
        last: Name of the newest record from before; empty if there is none.

    Raises:
        TransientStepError: If the chief failed, or there is no record in time.
    """
    end = time.monotonic() + CHIEF_SECONDS
    while time.monotonic() < end:
        for file in itertools.takewhile(lambda file: file.name > last, store.newest_files(component.name)):
            execution = store.read_record(file) if file.key == parts.key()[:SHORT] else None
            if execution and execution.state == "failed":
                raise TransientStepError(
                    f"The chief of the workers failed: {execution.reason}. Start all of them again."
                )
            if execution:
                return execution
        time.sleep(LOOK_SECONDS)
    raise TransientStepError(
        f"Expected the chief of the workers to record {component.name} in {mask(store.root)} within {CHIEF_SECONDS:g} "
        "seconds; it did not. Let all workers use one store, and start all of them again."
    )


def execute(
    store: Store,
    component: Component,
    inputs: Mapping[str, str],
    params: Params,
    run_id: str,
    rerun: bool = False,
    workers: Workers | None = None,
) -> Execution:
    """Run a step, or reuse its output, and record the execution.

    The step writes into a staging folder, which is digested and appears in the store by one rename. After a
    failure, the store is unchanged except for the record of the failure. A step that resumes keeps its scratch
    folder for the next execution with the same key. Of several executions with one key at a time, one runs the step;
    the others wait for it and reuse its output. Garbage collection keeps the inputs meanwhile.

    Several workers run a step that distributes together. The chief does all of the above; the others take part, write
    into a folder that is deleted, and wait for the chief's record.

    Args:
        store: The store.
        component: The component.
        inputs: Store-relative artifact names by input name.
        params: Its parameters.
        run_id: The pipeline run that this belongs to.
        rerun: Run it even if nothing changed.
        workers: The workers of this run; None for one. A worker that is not the chief records no reuse.

    Returns:
        The execution, that of the chief if this worker took part in it; its state is ``complete``, ``cached`` or
        ``skipped``.

    Raises:
        ArtifactError: If an input is missing or damaged.
        StoreError: If the store can't be written.
        TransientStepError: If the step adds to its last output, and another execution did so meanwhile; or if a worker
            was lost.
        Exception: Any exception of the component.
    """
    with contextlib.suppress(StoreError):  # where nothing can be written, a step may still be reused
        store.clear_leftovers()
    started_at, start = datetime.now(UTC), time.monotonic()
    follows = workers is not None and not workers.is_chief
    adding = component.name if component.adds(params) else ""

    def ended(decision: Decision, state: str, reason: str, output: str | None) -> Execution:
        execution = Execution(
            component=component.name,
            run_id=run_id,
            state=state,
            reason=reason,
            key=decision.parts.key(),
            parts=decision.parts,
            inputs=dict(inputs),
            output=output,
            started_at=started_at,
            seconds=round(time.monotonic() - start, 3),
        )
        log.info("%s %s in %.1f s%s", component.name, state, execution.seconds, f": {output}" if output else "")
        return execution

    def record(execution: Execution) -> Execution:
        store.record(execution)
        return execution

    def expect_last(own: str) -> None:
        """Refuse an output that adds to what is no longer the last one, under the store's lock."""
        for name, ref in added_to(store, component, params).items():
            if ref not in (inputs.get(name), own):
                raise TransientStepError(
                    f"Expected no other run of {component.name} to add to the same output; one did so meanwhile: "
                    f"{ref}. Run it again."
                )

    def reuse(decision: Decision, ref: str) -> Execution | None:
        execution = ended(decision, "cached", decision.reason, ref)
        if follows:  # the chief records it
            return execution
        try:
            with store.lock(across_hosts=adding):
                expect_last(ref)
                if not store.reuse(ref):
                    return None
                return record(execution)
        except StoreError as error:  # a full or read-only disk
            log.warning("%s is reused, but that can't be recorded: %s", component.name, error)
            return execution

    def call(decision: Decision, output: Path, **given: Any) -> Artifact[Any]:
        quiet_tensorflow.install()
        if workers and component.distributes:
            own = replace(workers, key=decision.parts.key())
            return worker_process.run_in_process(
                component, own, params=params, output=output, scratch=given["scratch"], **artifacts
            )
        return component(params=params, output=output, **{**artifacts, **given})

    def take_part(decision: Decision, last: str) -> Execution:
        with store.stage() as folder, contextlib.suppress(StepSkipped):  # then the chief skips it, too
            call(decision, folder, scratch=None)
        execution = _await_chief(store, component, decision.parts, last)
        text = execution.output or execution.reason
        log.info("%s %s, recorded by the chief: %s", component.name, execution.state, text)
        return execution

    def run(decision: Decision, scratch: Path) -> Execution:
        try:
            with store.stage() as folder:
                previous = _previous(store, component, decision.parts) if component.continues else None
                artifact = call(decision, folder, scratch=scratch, sources=decision.sources, previous=previous)
                expect_unchanged(component, params, decision.sources, store.local / "sources")
                flush_tree(folder)  # here, since it takes a while, and others wait for the lock
                with store.lock(across_hosts=adding):
                    published = store.publish(artifact)
                    expect_last(published)  # after the upload, in which this host may have lost the right to add
                    return record(ended(decision, "complete", decision.reason, published))
        except StepSkipped as skipped:
            return record(ended(decision, "skipped", str(skipped), None))
        except BaseException as error:
            with contextlib.suppress(StoreError):  # on a full disk, the first error is the one to show
                record(ended(decision, "failed", f"{type(error).__name__}: {error}", None))
            raise

    with store.lease(run_id, inputs.values()) as unprotected:
        artifacts = open_inputs(store, component, inputs)
        look = functools.partial(decide, store, component, artifacts, params, workers=workers)
        while True:
            decision = look(rerun)
            with contextlib.ExitStack() as stack:
                if decision.output is None and follows and component.distributes:
                    last = next((file.name for file in store.newest_files(component.name)), "")
                    if rerun or (decision := look(sources=decision.sources)).output is None:
                        log.info("%s %s", component.name, decision)
                        return take_part(decision, last)
                if decision.output is None:
                    if unprotected:
                        log.info("%s %s", component.name, decision)
                        raise unprotected
                    scratch = stack.enter_context(store.scratch(decision.parts.key()))
                    if not rerun and _hit(store, component, decision.parts):  # another process has run it meanwhile
                        decision = look(sources=decision.sources)
                log.info("%s %s", component.name, decision)
                if decision.output is None:
                    return run(decision, scratch)
                if execution := reuse(decision, decision.output.ref):
                    return execution  # else garbage collection deleted the artifact: look again
