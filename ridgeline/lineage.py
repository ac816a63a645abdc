"""Where an artifact comes from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ridgeline.records import RecordFile, described, short_ref
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


def ancestors(origin: Origin, left_out: Mapping[str, Collection[str]]) -> list[Origin]:
    """Return an artifact and all that it was made from: each once, after what it was made from itself.

    Args:
        origin: The artifact's origin.
        left_out: Names of inputs that are not followed, by component, such as champions: an artifact that is compared
            with them is not made from them.
    """
    found: dict[str, Origin] = {}

    def visit(origin: Origin) -> None:
        if origin.ref not in found:
            component = origin.execution.component if origin.execution else ""
            for name, source in origin.inputs.items():
                if name not in left_out.get(component, ()):
                    visit(source)
            found[origin.ref] = origin

    visit(origin)
    return list(found.values())


def lineage(store: Store, ref: str) -> Origin:
    """Return where an artifact comes from, back to the dataset.

    Args:
        store: The store.
        ref: The artifact's store-relative name.
    """
    producer = producer_in(store)

    def origin(ref: str) -> Origin:
        execution = producer(ref)
        inputs = execution.inputs if execution else {}
        return Origin(ref, execution, {name: origin_of(ref, source) for name, source in inputs.items()})

    def origin_of(ref: str, source: str) -> Origin:
        """Return an input's origin; that of a model from which another one was started has an end there."""
        started_from = source.partition("/")[0] == ref.partition("/")[0]
        return Origin(source, producer(source), {}) if started_from else origin(source)

    return origin(ref)


def producer_in(store: Store) -> Callable[[str], Execution | None]:
    """Return a function that returns the first execution that made an artifact, or None.

    Args:
        store: The store; only records of the artifacts in question are listed and read.
    """

    @functools.cache
    def producer(ref: str) -> Execution | None:
        return next(iter(list(store.executions(made=ref))[::-1]), None)

    return producer


def producers(
    files: Iterable[RecordFile], read: Callable[[RecordFile], Execution | None]
) -> Callable[[str], Execution | None]:
    """Return a function that returns the first execution that made an artifact, or None.

    Args:
        files: The files of the records, newest first.
        read: Reads a record; returns None if it is damaged.
    """
    makers: dict[str, list[RecordFile]] = {}
    for file in described(files, read):
        if file.state == "complete":
            makers.setdefault(file.output, []).append(file)

    @functools.cache
    def producer(ref: str) -> Execution | None:
        found = (read(file) for file in reversed(makers.get(short_ref(ref), [])))
        return next((execution for execution in found if execution and execution.output == ref), None)

    return producer
