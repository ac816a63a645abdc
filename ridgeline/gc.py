"""Garbage collection: deletes the artifacts and records that neither a served version nor a recent run needs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ridgeline.artifacts.example_statistics import ExampleStatistics
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.predictions import Predictions
from ridgeline.artifacts.schema import Schema
from ridgeline.component import Component
from ridgeline.lineage import producers
from ridgeline.object_store import NUM_TRANSFERS
from ridgeline.records import RecordFile, described, short_ref, short_run
from ridgeline.registry import Registry
from ridgeline.sources import clear_unused
from ridgeline.store import Execution, Store, StoreError

SCRATCH_AGE = timedelta(days=7)  # longer than any retry waits
SOURCE_AGE = timedelta(days=90)  # reading a source without its index takes longer, nothing else
RECENT = timedelta(hours=24)  # longer than a run may take: between two steps, nothing else shows that it is in progress

# What new examples are compared with; each kind is made from the examples and those before it.
COMPARED = (ExampleStatistics.__name__, Schema.__name__)
# Kept for years, without what they were made from.
WHOLE = tuple(f"{kind.__name__}/" for kind in (Schema, Predictions))


@dataclass(frozen=True)
class Garbage:
    """What garbage collection deletes.

    Attributes:
        artifacts: Size in bytes of each unneeded artifact, by store-relative name.
        num_executions: Number of unneeded execution records.
        scratch: Size in bytes of each abandoned scratch folder, by execution key.
        staging: Size in bytes of each folder, or artifact without a manifest, that a killed process left, by name.
        sources: Size in bytes of each index of a source that no step has read for `SOURCE_AGE`, by its folder's name.
        num_in_progress: Number of runs that are kept, beyond the last runs, because they may be in progress.
    """

    artifacts: dict[str, int]
    num_executions: int
    scratch: dict[str, int]
    staging: dict[str, int]
    sources: dict[str, int]
    num_in_progress: int

    @property
    def freed_bytes(self) -> int:
        """Size of everything that is deleted, records left out."""
        return sum(sum(sizes.values()) for sizes in (self.artifacts, self.scratch, self.staging, self.sources))


def collect_garbage(
    store: Store,
    registry: Registry,
    keep_runs: int,
    dry_run: bool,
    recent: timedelta = RECENT,
    steps: Iterable[Component] = (),
) -> Garbage:
    """Delete the artifacts and records that no served version, none of the last runs and no run in progress need.

    A version that was deleted from the registry needs nothing. A needed artifact is kept with all artifacts that it
    was made from, but not with those of a model that it was started from. A served version is kept with the statistics
    and the schema of its examples, which new examples are compared with. Of a step that adds to its own outputs, such
    as predictions of new files, each last output that it can add to is kept, with all that this one adds to. Scratch
    folders of unfinished executions are deleted if unchanged for `SCRATCH_AGE`.

    What is unneeded is found before the store's lock is taken. Under the lock, only what changed meanwhile is read.

    Args:
        store: The store.
        registry: The served models.
        keep_runs: Number of latest runs to keep, at least 1.
        dry_run: Only report what would be deleted.
        recent: A run counts as in progress while one of its steps runs, and for this time after its last step ended.
        steps: The installed steps. They say which outputs later ones add to, see `Component`.

    Returns:
        What was, or would be, deleted.

    Raises:
        ValueError: If `keep_runs` is below 1.
    """
    if keep_runs < 1:
        raise ValueError(f"Expected to keep at least 1 run; received {keep_runs}. Give a positive number.")
    staging = store.clear_staging(dry_run)  # first: on a full disk, it makes space for the rest
    if not dry_run:
        store.clear_leftovers()
        store.complete_index()
        registry.recover()
    scratch = store.clear_scratch(SCRATCH_AGE, dry_run)
    sources = clear_unused(store.local / "sources", SOURCE_AGE, dry_run)

    read = functools.cache(store.read_record)
    adding = [step for step in steps if step.adds_to]
    artifacts, records, num_in_progress = _unneeded(store, registry, adding, keep_runs, recent, read)
    sizes = store.sizes(artifacts)
    if not dry_run and (artifacts or records):
        with store.deletion(keep_young=True) as hide, store.lock():
            artifacts, records, num_in_progress = _unneeded(store, registry, adding, keep_runs, recent, read)
            sizes |= store.sizes(ref for ref in artifacts if ref not in sizes)
            sizes = {ref: sizes[ref] for ref in hide(artifacts)}
        kept = set(store.refs()) & set(artifacts)  # another host has reused, recorded or published them meanwhile
        makers = {short_ref(ref) for ref in kept}
        records = [file for file in records if not (file.state == "complete" and file.output in makers)]
        store.delete_records(records)
        sizes = {ref: size for ref, size in sizes.items() if ref not in kept}
    return Garbage(sizes, len(records), scratch, staging, sources, num_in_progress)


def _unneeded(
    store: Store,
    registry: Registry,
    adding: Iterable[Component],
    keep_runs: int,
    recent: timedelta,
    read: Callable[[RecordFile], Execution | None],
) -> tuple[list[str], list[RecordFile], int]:
    """Return the unneeded artifacts and records, and the number of runs in progress beyond those to keep."""
    stored = store.refs()  # first: what is published after this stays
    leases = store.leases()
    files = list(described(store.record_files(), read))
    if store.remote:  # each record is a request, and nearly all are needed
        with ThreadPoolExecutor(NUM_TRANSFERS) as pool:
            list(pool.map(read, files))
    last_runs = set(list(dict.fromkeys(file.run for file in files))[:keep_runs])
    now = datetime.now(UTC)

    def ended_at(file: RecordFile) -> datetime:
        """Return the end of an execution; a name may state a later one, after a clock that was ahead."""
        execution = read(file) if file.ended_at > now else None
        return execution.started_at + timedelta(seconds=execution.seconds) if execution else file.ended_at

    in_progress = {short_run(lease.run_id) for lease in leases}
    in_progress |= {file.run for file in files if file.run not in last_runs and ended_at(file) > now - recent}
    runs = last_runs | in_progress
    kept = {file.output for file in files if file.run in runs and not read(file)}  # damaged: the name tells the output

    producer = producers(files, read)
    needed: set[str] = set()
    served: set[str] = set()  # the models and what they were made from

    def need(refs: Iterable[str]) -> None:
        for ref in refs:
            if ref not in needed:
                needed.add(ref)
                if ref.startswith(WHOLE):
                    continue
                inputs = list(made.inputs.values()) if (made := producer(ref)) else []
                # A model needs the one that it was started from, but not what that one was made from.
                needed.update(earlier := [i for i in inputs if i.partition("/")[0] == ref.partition("/")[0]])
                need(i for i in inputs if i not in earlier)

    def ancestors(ref: str) -> set[str]:
        made = producer(ref)
        return {ref}.union(*(ancestors(source) for source in made.inputs.values())) if made else {ref}

    for lease in leases:
        need(lease.artifacts)
    for execution in filter(None, (read(file) for file in files if file.run in runs)):
        need([*execution.inputs.values(), *filter(None, [execution.output])])
    for name in registry.model_names():
        present = registry.versions(name)
        history = registry.history(name)
        for entry in history:
            # the model itself, too: the next one is compared with it. A killed push may not have its folder yet.
            if entry.version in present or entry is history[-1]:
                model = f"{Model.__name__}/{entry.model_digest}"
                need([entry.artifact, model])
                served |= ancestors(model)

    for kind in COMPARED if served else ():
        outputs = {short_ref(ref) for ref in stored if ref.startswith(f"{kind}/")}
        for made in filter(None, (read(file) for file in files if file.output in outputs)):
            others = (ref for ref in made.inputs.values() if ref.partition("/")[0] != kind)
            if made.output and served.issuperset(others):
                need([made.output])
                served.add(made.output)

    # What a step adds to is kept back to its beginning: an output that could not be written gets the rows later.
    for step in adding:
        outputs = {short_ref(ref) for ref in stored if ref.startswith(f"{step.output.__name__}/")}
        last: dict[str, str] = {}
        for made in filter(None, (read(file) for file in files if file.output in outputs)):
            if made.output and made.component == step.name:
                last.setdefault(json.dumps(step.shared(made.parts.params)), made.output)
        for ref in last.values():
            while ref:
                need([ref])
                maker = producer(ref)
                ref = maker.inputs.get(step.earlier or "", "") if maker else ""

    need(store.young())
    makes_needed = {short_ref(ref) for ref in needed}
    records = [
        file
        for file in files
        if file.run not in runs and not (file.state == "complete" and file.output in makes_needed)
    ]
    for file in {*records, *(file for file in files if file.run in runs)}:
        if not read(file) and store.is_newer(file):
            raise StoreError(
                f"Cannot collect garbage: a newer version of Ridgeline wrote the record {file.component}/{file.name}. "
                "Update Ridgeline; nothing was deleted."
            )
    unneeded = [ref for ref in stored if ref not in needed and short_ref(ref) not in kept]
    return unneeded, records, len(in_progress - last_runs)
