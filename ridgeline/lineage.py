"""Where an artifact comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ridgeline.store import Execution, Store


@dataclass(frozen=True)
class Origin:
    """An artifact, the execution that made it, and the origins of its inputs.

    Attributes:
        ref: The artifact's store-relative name.
        execution: The execution that first made it; None if there is no record of it.
        inputs: The origin of each input artifact, by input name.
    """

    ref: str
    execution: Execution | None
    inputs: dict[str, Origin]

    def walk(self) -> Iterator[tuple[int, Origin, bool]]:
        """Yield this artifact and its ancestors: the depth, the origin, and whether it was yielded before.

        The ancestors of an artifact follow it only where it is first yielded.
        """
        seen: set[str] = set()

        def visit(origin: Origin, depth: int) -> Iterator[tuple[int, Origin, bool]]:
            again = origin.ref in seen
            seen.add(origin.ref)
            yield depth, origin, again
            for source in () if again else origin.inputs.values():
                yield from visit(source, depth + 1)

        return visit(self, 0)


def lineage(store: Store, ref: str) -> Origin:
    """Return where an artifact comes from, back to the dataset.

    Args:
        store: The store.
        ref: The artifact's store-relative name.
    """
    made_by = producers(store)

    def origin(ref: str) -> Origin:
        execution = made_by.get(ref)
        inputs = execution.inputs if execution else {}
        return Origin(ref, execution, {name: origin(source) for name, source in inputs.items()})

    return origin(ref)


def producers(store: Store) -> dict[str, Execution]:
    """Return the first execution that made each artifact."""
    newest_first = store.executions()
    return {
        execution.output: execution for execution in newest_first if execution.output and execution.state == "complete"
    }
