"""Garbage collection: deletes the artifacts and records that neither a served version nor a recent run needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from ridgeline.artifacts.base import ArtifactError
from ridgeline.artifacts.model import Model
from ridgeline.lineage import producers
from ridgeline.registry import Registry
from ridgeline.store import Execution, Store

SCRATCH_AGE = timedelta(days=7)  # longer than any retry waits


@dataclass(frozen=True)
class Garbage:
    """What garbage collection deletes.

    Attributes:
        artifacts: Size in bytes of each unneeded artifact, by store-relative name.
        num_executions: Number of unneeded execution records.
        scratch: Size in bytes of each abandoned scratch folder, by execution key.
    """

    artifacts: dict[str, int]
    num_executions: int
    scratch: dict[str, int]

    @property
    def freed_bytes(self) -> int:
        """Size of all artifacts and scratch folders together."""
        return sum(self.artifacts.values()) + sum(self.scratch.values())


def collect_garbage(store: Store, registry: Registry, keep_runs: int, dry_run: bool) -> Garbage:
    """Delete the artifacts and records that no served version and none of the last runs need.

    A version that was deleted from the registry needs nothing. A needed artifact is kept with all artifacts that it
    was made from. Scratch folders of unfinished executions are deleted if unchanged for `SCRATCH_AGE`.

    Args:
        store: The store.
        registry: The served models.
        keep_runs: Number of latest runs to keep, at least 1.
        dry_run: Only report what would be deleted.

    Returns:
        What was, or would be, deleted.

    Raises:
        ValueError: If `keep_runs` is below 1.
    """
    if keep_runs < 1:
        raise ValueError(f"Expected to keep at least 1 run; received {keep_runs}. Give a positive number.")
    if not dry_run:
        store.clear_leftovers()
        registry.recover()
    with store.lock():
        made_by = producers(store)
        runs: list[str] = []
        needed: set[str] = set()

        def need(refs: Iterable[str]) -> None:
            for ref in refs:
                if ref not in needed:
                    needed.add(ref)
                    need(made_by[ref].inputs.values() if ref in made_by else ())

        for execution in store.executions():
            if execution.run_id not in runs:
                runs.append(execution.run_id)
            if execution.run_id in runs[:keep_runs]:
                need([*execution.inputs.values(), *filter(None, [execution.output])])
        for name in registry.model_names():
            present = registry.versions(name)
            history = registry.history(name)
            for entry in history:
                # the model itself, too: the next one is compared with it. A killed push may not have its folder yet.
                if entry.version in present or entry is history[-1]:
                    need([entry.artifact, f"{Model.__name__}/{entry.model_digest}"])

        sizes = {}
        for ref in store.refs():
            if ref not in needed:
                try:
                    sizes[ref] = store.size_bytes(ref)
                except ArtifactError:
                    sizes[ref] = 0

        def unneeded(execution: Execution) -> bool:
            makes_needed = execution.output in needed and execution.state == "complete"
            return execution.run_id not in runs[:keep_runs] and not makes_needed

        num_executions = store.delete_executions(unneeded, dry_run)
        scratch = store.clear_scratch(SCRATCH_AGE, dry_run)
        if not dry_run:
            for ref in sizes:
                store.delete(ref)
    return Garbage(sizes, num_executions, scratch)
