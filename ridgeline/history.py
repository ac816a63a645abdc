"""A model's history on disk: read whole, checked line by line, and repaired from its copy and from what was served."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ridgeline import files

log = logging.getLogger(__name__)

HISTORY, COPY, CHAMPION = "history.jsonl", "history-copy.jsonl", "champion.json"


class HistoryEntry(BaseModel):
    """One line of a model's history.

    Attributes:
        schema_version: Version of this entry's layout.
        version: The version that became the champion.
        action: What happened.
        artifact: Store-relative name of the `PushedModel`.
        model_digest: The trained model's digest.
        accuracy: Its accuracy on the test split, in [0, 1].
        run_id: The pipeline run that pushed it, or the run that rolled back.
        at: When, UTC.
        reason: Why it was rolled back, or the reason that a person gave for serving it by force; else empty.
        by: The user who asked for it; empty for a scheduled run, or if the user is not known.
        computes: Digest of what the model computes, see `ridgeline.model_function`; empty if it is not known.
        files: Digest of the version's files; empty in entries of earlier releases.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    version: int
    action: Literal["push", "rollback"]
    artifact: str
    model_digest: str
    accuracy: float
    run_id: str
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    reason: str = ""
    by: str = ""
    computes: str = ""
    files: str = ""

    def line(self) -> str:
        """Return the entry as a line of the history, with its checksum."""
        return files.sign(self.model_dump_json())


@dataclass(frozen=True)
class Lines:
    """What a file of history lines holds.

    Attributes:
        valid: The lines that can be read, in their order.
        damaged: Numbers of the lines that can't, from 1.
    """

    valid: list[str]
    damaged: list[int]


def read_lines(path: Path) -> Lines:
    """Read a file of history lines.

    Args:
        path: The file; one that is missing has no lines.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []  # not splitlines: a reason may hold others
    valid, damaged = [], []
    for number, line in enumerate((line for line in lines if line), start=1):
        try:
            parse(text := line.decode())
            valid.append(text)
        except ValueError:  # not UTF-8, another checksum, or no entry
            damaged.append(number)
    return Lines(valid, damaged)


def parse(line: str) -> HistoryEntry:
    """Return the entry of a line.

    Raises:
        ValueError: If it is damaged.
    """
    return HistoryEntry.model_validate_json(files.unsign(line))


def merge(lines: list[str], copy: list[str]) -> list[str]:
    """Return a history from two parts of it: all lines of both, in their order.

    Example:
        >>> merge(["a", "c", "d"], ["a", "b", "c"])
        ['a', 'b', 'c', 'd']
    """
    merged, place = list(copy), 0
    for line in lines:
        if line in merged:
            place = merged.index(line) + 1
        else:
            merged.insert(place, line)
            place += 1
    return merged


def rebuild(
    entries: list[HistoryEntry],
    versions: Iterable[int],
    champion: int | None,
    find: Callable[[int], HistoryEntry | None],
) -> list[HistoryEntry]:
    """Add to a history what the version folders and the pointer to the champion tell about lost entries.

    Args:
        entries: What is left of the history.
        versions: The versions that have a folder, oldest first.
        champion: The version that the pointer names, if the end of the history is lost; else None.
        find: Returns the entry of a version's push as records tell it; None if they don't.
    """
    rebuilt = list(entries)
    for version in versions:
        if all(entry.version != version or entry.action != "push" for entry in rebuilt) and (entry := find(version)):
            place = next((i for i, other in enumerate(rebuilt) if other.version >= version), len(rebuilt))
            rebuilt.insert(place, entry)
    served = next((entry for entry in rebuilt if entry.version == champion), None)
    if served and rebuilt[-1].version != champion:
        now = {"action": "rollback", "at": datetime.now(UTC), "run_id": "", "by": "", "reason": f"{CHAMPION} named it"}
        rebuilt.append(served.model_copy(update=now))
    return rebuilt


def pointed_version(folder: Path) -> int | None:
    """Return the version that `champion.json` names; None if it can't be read."""
    try:
        return int(json.loads((folder / CHAMPION).read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
