"""A model's history on disk: read whole, checked line by line, and repaired from its copy and from what was served."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ridgeline import files
from ridgeline.store import StoreError

HISTORY, COPY, CHAMPION = "history.jsonl", "history-copy.jsonl", "champion.json"
SCHEMA_VERSION = 2  # of an entry; the newest that this release knows

Action = Literal["push", "rollback", "canary", "promote", "abort"]
CANARY_ACTIONS = ("canary", "promote", "abort")  # unknown to releases that know schema version 1 alone


class HistoryEntry(BaseModel):
    """One line of a model's history.

    Attributes:
        schema_version: Version of this entry's layout: 2 for the actions of canaries, else 1.
        version: The version that it is about.
        action: What happened to it. ``push``, ``rollback`` and ``promote`` make it the champion. ``canary`` lets it
            answer a share of the requests, until the next entry. ``abort`` ends that.
        artifact: Store-relative name of the `PushedModel`.
        model_digest: The trained model's digest.
        accuracy: Its accuracy on the test split, in [0, 1].
        run_id: The pipeline run that pushed it, or the run that did the rest.
        at: When, UTC.
        reason: Why; for a push, also as a canary, the reason that a person gave for serving it by force, or empty.
        by: The user who asked for it; empty for a scheduled run, or if the user is not known.
        approved_by: The user who approved the push; empty if nobody had to.
        approval: Why; empty if nobody had to.
        computes: Digest of what the model computes, see `ridgeline.model_function`; empty if it is not known.
        files: Digest of the version's files; empty in entries of earlier releases.
        dataset: Name of the dataset that the model was trained on; empty in entries of earlier releases.
        share: Of the requests that a canary answers, above 0, below 1; 0 for other actions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1, 2] = 1
    version: int
    action: Action
    artifact: str
    model_digest: str
    accuracy: float
    run_id: str
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    reason: str = ""
    by: str = ""
    approved_by: str = ""
    approval: str = ""
    computes: str = ""
    files: str = ""
    dataset: str = ""
    share: float = Field(0.0, ge=0, lt=1)

    @property
    def makes_champion(self) -> bool:
        """Whether the version became the champion."""
        return self.action in ("push", "rollback", "promote")

    @property
    def reasons(self) -> str:
        """Its reason and its approval, in one line; empty if there is neither."""
        approved = f"approved by {self.approved_by}: {self.approval}" if self.approved_by else ""
        return "; ".join(" ".join(text.split()) for text in (self.reason, approved) if text)

    def line(self) -> str:
        """Return the entry as a line of the history, with its checksum."""
        return files.sign(self.model_dump_json(exclude=None if self.share else {"share"}))

    def again(self, action: Action, *, reason: str, by: str, run_id: str, share: float = 0.0) -> HistoryEntry:
        """Return an entry about the same version: what happens to it now.

        Args:
            action: What happens.
            reason: Why.
            by: Who asked for it.
            run_id: The run that does it.
            share: Of the requests that it answers as a canary.
        """
        now = {"action": action, "reason": reason, "by": by, "run_id": run_id, "share": share, "at": datetime.now(UTC)}
        now |= {"schema_version": 2 if action in CANARY_ACTIONS else 1, "approved_by": "", "approval": ""}
        return self.model_copy(update=now)


def champions(history: Iterable[HistoryEntry]) -> list[HistoryEntry]:
    """Return the entries that made a champion, oldest first; the last one made the present champion.

    Args:
        history: Entries, oldest first.
    """
    return [entry for entry in history if entry.makes_champion]


def canary(history: Sequence[HistoryEntry]) -> HistoryEntry | None:
    """Return the entry that made the present canary; None if there is none. Any further entry ends a canary.

    Args:
        history: Entries, oldest first.
    """
    return history[-1] if history and history[-1].action == "canary" else None


@dataclass(frozen=True)
class Lines:
    """What a file of history lines holds.

    Attributes:
        lines: The lines in their order; None for each that is damaged.
    """

    lines: list[str | None]

    @property
    def valid(self) -> list[str]:
        """The lines that can be read."""
        return [line for line in self.lines if line is not None]

    @property
    def damaged(self) -> list[int]:
        """The numbers of those that can't, from 1."""
        return [number for number, line in enumerate(self.lines, start=1) if line is None]


def read_lines(path: Path) -> Lines:
    """Read a file of history lines.

    Args:
        path: The file; one that is missing has no lines.

    Raises:
        StoreError: If a later release of Ridgeline wrote it.
    """
    return split_lines(path.read_bytes() if path.exists() else b"", path)


def split_lines(content: bytes, place: object) -> Lines:
    """Return the lines of a history.

    Args:
        content: Its content.
        place: What the message of an error calls it.

    Raises:
        StoreError: If a later release of Ridgeline wrote it.
    """
    lines: list[str | None] = []
    for line in content.split(b"\n"):  # not splitlines: a reason may hold others
        try:
            if line:
                parse(text := line.decode())
                lines.append(text)
        except ValueError:  # not UTF-8, another checksum, or no entry
            if files.is_newer(line.decode(errors="replace"), SCHEMA_VERSION):
                raise StoreError(
                    f"Cannot read {place}: a newer version of Ridgeline wrote line {len(lines) + 1}. Update Ridgeline; "
                    "nothing was changed."
                ) from None
            lines.append(None)
    return Lines(lines)


@functools.lru_cache(maxsize=10_000)
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
    if lines[: len(copy)] == copy:
        return list(lines)
    merged, place = list(copy), 0
    for line in lines:
        if line in merged:
            place = merged.index(line) + 1
        else:
            merged.insert(place, line)
            place += 1
    return merged


def rebuild(
    entries: Sequence[HistoryEntry | None],
    versions: Iterable[int],
    champion: int | None,
    find: Callable[[int], HistoryEntry | None],
) -> list[HistoryEntry]:
    """Add to a history what the version folders and the pointer to the champion tell about lost entries.

    Args:
        entries: What is left of the history; None where an entry was.
        versions: The versions that have a folder, oldest first.
        champion: The version that the pointer names; it counts only if the last entry is lost.
        find: Returns the entry of a version's push as records tell it; None if they don't.
    """
    rebuilt = list(entries)
    known = {entry.version for entry in rebuilt if entry and entry.action in ("push", "canary")}
    last_is_lost = not rebuilt or rebuilt[-1] is None
    for version in versions:
        if version in known or not (entry := find(version)):
            continue
        end = next((i for i, e in enumerate(rebuilt) if e and e.version >= version), len(rebuilt))
        if not last_is_lost:
            end = min(end, len(rebuilt) - 1)
        start = max((i for i, e in enumerate(rebuilt[:end]) if e and e.action in ("push", "canary")), default=-1) + 1
        place = next((i for i in range(start, end) if rebuilt[i] is None), None)
        if place is None:
            rebuilt.insert(end, entry)
        else:
            rebuilt[place] = entry
    found = [entry for entry in rebuilt if entry]
    served = next((entry for entry in found if entry.version == champion), None)
    made = champions(found)
    if last_is_lost and served and (not made or made[-1].version != champion):
        found.append(served.again("rollback", reason=f"{CHAMPION} named it", by="", run_id=""))
    elif found and not made:
        found.append(found[0].again("rollback", reason="the history lost its champions", by="", run_id=""))
    elif last_is_lost and (pending := canary(found)):
        found.append(pending.again("abort", reason="the history is damaged", by="", run_id=""))
    return found


def pointed_version(folder: Path) -> int | None:
    """Return the version that `champion.json` names; None if it can't be read."""
    try:
        return int(json.loads((folder / CHAMPION).read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
