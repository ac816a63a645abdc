"""File names of execution records: they say what a search needs, so that it reads only the records that it wants."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ridgeline.store import Execution

SHORT = 16  # hexadecimal digits of a digest in a name
START = "%Y%m%dT%H%M%S.%fZ"
NO_OUTPUT = "none"  # no digest
OLD_FIELDS = 3
NAME = re.compile(
    r"([0-9]{8}T[0-9]{6}\.[0-9]{6}Z)-([^-]+)(?:-([^-]+)-([a-z]+)-([^-]+)-([0-9]+))?-[0-9a-f]+\.json", re.ASCII
)


class RecordFile(NamedTuple):
    """A record's file, and what its name says. Names sort by the start of the execution, see `of`.

    A name is ``<start>-<key>-<run>-<state>-<output>-<seconds>-<id>.json``, with shortened digests of the key, the run's
    id and the output. Up to version 0.2 it was ``<start>-<key>-<id>.json``; the fields that it lacks are empty.
    """

    name: str
    component: str
    start: str
    key: str
    run: str = ""
    state: str = ""
    output: str = ""
    seconds: str = ""

    @classmethod
    def parse(cls, component: str, name: str) -> RecordFile:
        """Return what a name says.

        Args:
            component: The name of the component, and so of the file's folder.
            name: The file's name.
        """
        fields = NAME.fullmatch(name)
        return cls(name, component, *(fields.groups("") if fields else ("", "")))

    @classmethod
    def of(cls, execution: Execution, after: str = "") -> RecordFile:
        """Return a new file for the record of an execution.

        Args:
            execution: The execution.
            after: The start that the newest record of the component states. If the clock was set back since, or another
                host's clock is ahead, the new name states a later start than that, so that names keep the order.
        """
        start = execution.started_at.astimezone(UTC)
        if after:
            start = max(start, datetime.strptime(after, START).replace(tzinfo=UTC) + timedelta(microseconds=1))
        fields = (
            start.strftime(START),
            execution.key[:SHORT],
            short_run(execution.run_id),
            execution.state,
            short_ref(execution.output) if execution.output else NO_OUTPUT,
            f"{int(execution.seconds)}",
        )
        return cls("-".join([*fields, f"{uuid.uuid4().hex[:8]}.json"]), execution.component, *fields)

    @property
    def ended_at(self) -> datetime:
        """End of the execution, UTC."""
        return datetime.fromisoformat(self.start) + timedelta(seconds=int(self.seconds))


def may_match(name: str, key: str, run: str, output: str = "") -> bool:
    """Return whether a file may hold the record of an execution with a key, of a run and with an output.

    Args:
        name: The file's name.
        key: The shortened key; empty for any.
        run: The shortened id of the run; empty for any.
        output: The shortened name of an artifact that the execution made; empty for any.
    """
    stated = name.split("-")
    missing = [value for value in (run, output) if value and value not in stated]
    return not ((key and key not in stated) or (missing and len(stated) > OLD_FIELDS))


def short_run(run_id: str) -> str:
    """Return a run's id as it stands in names."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:SHORT]


def short_ref(ref: str) -> str:
    """Return an artifact's store-relative name as it stands in names."""
    return ref.rpartition("/")[2][:SHORT]


def described(files: Iterable[RecordFile], read: Callable[[RecordFile], Execution | None]) -> Iterator[RecordFile]:
    """Yield records' files with all fields; only records with old names are read, and left out if they are damaged.

    Args:
        files: The files.
        read: Reads a record; returns None if it is damaged.
    """
    for file in files:
        if file.state:
            yield file
        elif execution := read(file):
            yield RecordFile.of(execution)._replace(name=file.name)


def values_of(execution: Execution) -> dict[str, list[str]]:
    """Return by which values a record is found, see `ridgeline.journal.Journal`.

    Args:
        execution: The execution.
    """
    values = {"run": [short_run(execution.run_id)]}
    if execution.state == "complete":  # one that was reused says nothing more about these, however often it was
        values["key"] = [execution.key[:SHORT]]
        values["output"] = [short_ref(execution.output)] if execution.output else []
        values["input"] = [*dict.fromkeys(map(short_ref, execution.inputs.values()))]
    return values
