"""A model's history on disk: read whole, checked line by line, and repaired from its copy and from what was served."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ridgeline import files
from ridgeline.store import StoreError

HISTORY, COPY, CHAMPION = "history.jsonl", "history-copy.jsonl", "champion.json"
SCHEMA_VERSION = 2  # of an entry; the newest that this release knows

Action = Literal["push", "rollback", "canary", "promote", "abort"]
DONE: dict[Action, str] = {  # followed by "version 3"
    "push": "pushed",
    "rollback": "rolled back to",
    "canary": "started the canary",
    "promote": "promoted the canary",
    "abort": "aborted the canary",
}
CANARY_ACTIONS = ("canary", "promote", "abort")  # unknown to releases that know schema version 1 alone


class HistoryEntry(BaseModel):
    """One line of a model's history.

    Attributes:
        schema_version: Version of this entry's layout: 2 for the actions of canaries and for approved pushes, else 1.
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
        approved_by: The user who approved the push; empty if it needed no approval.
        approval: Why; empty if it needed none.
        computes: Digest of what the model computes, see `ridgeline.model_function`; empty if it is not known.
        files: Digest of the version's files; empty in entries of earlier releases.
        dataset: Name of the dataset that the model was trained on; empty in entries of earlier releases.
        share: Of the requests that a canary answers, above 0, below 1; 0 for other actions, and for a lost
            canary that ended.
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
        """Return the entry as a line of the history, with its checksum.

        A field that earlier releases don't know is left out if it is empty, so that they can read the line.
        """
        empty = {name for name in ("share", "approved_by", "approval") if not getattr(self, name)}
        return files.sign(self.model_dump_json(exclude=empty))

    def again(
        self,
        action: Action,
        *,
        reason: str,
        by: str,
        run_id: str,
        share: float = 0.0,
        approved_by: str = "",
        approval: str = "",
    ) -> HistoryEntry:
        """Return an entry about the same version: what happens to it now.

        Args:
            action: What happens.
            reason: Why.
            by: Who asked for it.
            run_id: The run that does it.
            share: Of the requests that it answers as a canary.
            approved_by: Who approved it.
            approval: Why.
        """
        now = {"action": action, "reason": reason, "by": by, "run_id": run_id, "share": share, "at": datetime.now(UTC)}
        now |= {"approved_by": approved_by, "approval": approval}
        now["schema_version"] = 2 if action in CANARY_ACTIONS or approved_by or approval else 1
        return self.model_copy(update=now)


@dataclass(frozen=True)
class Serving:
    """What of a model is served.

    Attributes:
        champion: The champion's version, labelled ``stable``.
        canary: The version that answers a share of the requests, labelled ``canary``; None if there is none.
        share: The share of the requests without a version or a label that the canary answers; 0 without a canary.
    """

    champion: int
    canary: int | None = None
    share: float = 0.0


def champions(history: Iterable[HistoryEntry]) -> list[HistoryEntry]:
    """Return the entries that made a champion, oldest first; the last one made the present champion.

    Args:
        history: Entries, oldest first.
    """
    return [entry for entry in history if entry.makes_champion]


def champion(history: Sequence[HistoryEntry]) -> HistoryEntry | None:
    """Return the entry that made the present champion; None if there is none.

    Args:
        history: Entries, oldest first.
    """
    return next((entry for entry in reversed(history) if entry.makes_champion), None)


def canary(history: Sequence[HistoryEntry]) -> HistoryEntry | None:
    """Return the entry that made the present canary; None if there is none. Any further entry ends a canary.

    Args:
        history: Entries, oldest first.
    """
    return history[-1] if history and history[-1].action == "canary" else None


def serving(history: Sequence[HistoryEntry]) -> Serving | None:
    """Return what is served after the last entry; None if no entry made a champion.

    Args:
        history: Entries, oldest first.
    """
    made, pending = champion(history), canary(history)
    if not made:
        return None
    return Serving(made.version, pending.version, pending.share) if pending else Serving(made.version)


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


def split_lines(content: bytes, place: object) -> Lines:
    """Return the lines of a history.

    Args:
        content: Its content.
        place: What the message of an error calls it.

    Raises:
        StoreError: If a later release of Ridgeline wrote it.
    """
    try:
        return Lines([*_split(content)])
    except NewerLine as error:
        raise StoreError(
            f"Cannot read {place}: a newer version of Ridgeline wrote line {error}. Update Ridgeline; nothing was "
            "changed."
        ) from None


class NewerLine(ValueError):
    """A later release wrote a line; the text is its number."""


@functools.lru_cache(maxsize=8)  # a history is read several times in a step, and grows with each push
def _split(content: bytes) -> tuple[str | None, ...]:
    """Return the lines of a history; None for each that is damaged."""
    lines: list[str | None] = []
    for line in content.split(b"\n"):  # not splitlines: a reason may hold others
        try:
            if line:
                parse(text := line.decode())
                lines.append(text)
        except ValueError:  # not UTF-8, another checksum, or no entry
            if files.is_newer(line.decode(errors="replace"), SCHEMA_VERSION):
                raise NewerLine(len(lines) + 1) from None
            lines.append(None)
    return tuple(lines)


def joined(lines: Iterable[str]) -> str:
    """Return the content of a history.

    Args:
        lines: Its lines.
    """
    return "".join(f"{line}\n" for line in lines)


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
    pointer: Serving | None,
    find: Callable[[int], HistoryEntry | None],
) -> list[HistoryEntry]:
    """Add to a history what the version folders and the pointer to the champion tell about lost entries.

    The pointer counts if an entry is lost after the last known one that made a champion: further entries then make the
    history end with what the pointer names.

    Args:
        entries: What is left of the history; None where an entry was, at the end if the place is not known.
        versions: The versions that have a folder, oldest first.
        pointer: What `champion.json` says is served; None if it can't be read.
        find: Returns the entry of a version's push as records tell it; None if they don't.
    """
    rebuilt = list(entries)
    known = {entry.version for entry in rebuilt if entry and entry.action in ("push", "canary")}
    last_champion = max((i for i, entry in enumerate(rebuilt) if entry and entry.makes_champion), default=-1)
    is_lost = last_champion < 0 or None in rebuilt[last_champion:]
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
            rebuilt.insert(place := end, None)
        following = next((e for e in rebuilt[place + 1 :] if e), None)
        rebuilt[place] = _as_canary(entry, pointer) if _was_canary(version, following, pointer) else entry
    found = [entry for entry in rebuilt if entry]
    if is_lost and pointer:
        found = _follow(found, pointer)
    if found and not champion(found):
        found.append(found[0].again("rollback", reason="the history lost its champions", by="", run_id=""))
    elif last_is_lost and not pointer and (pending := canary(found)):
        found.append(pending.again("abort", reason="the history is damaged", by="", run_id=""))
    return found


def _was_canary(version: int, following: HistoryEntry | None, pointer: Serving | None) -> bool:
    """Return whether a version was pushed as a canary, as far as the next known entry or the pointer tells it."""
    if following:
        return following.version == version and following.action in CANARY_ACTIONS
    return pointer is not None and pointer.canary == version


def _as_canary(entry: HistoryEntry, pointer: Serving | None) -> HistoryEntry:
    share = pointer.share if pointer and pointer.canary == entry.version else 0.0
    made = entry.again("canary", reason=entry.reason, by=entry.by, run_id=entry.run_id, share=share)
    return made.model_copy(update={"at": entry.at})


def _follow(history: Sequence[HistoryEntry], pointer: Serving) -> list[HistoryEntry]:
    """Return a history with further entries: it ends with what the pointer names, as far as it has these versions."""
    known = {entry.version: entry for entry in history}
    why: dict[str, Any] = {"reason": f"{CHAMPION} named it", "by": "", "run_id": ""}
    followed = list(history)
    made = champion(followed)
    if pointer.champion in known and not (made and made.version == pointer.champion):
        last = known[pointer.champion]
        followed.append(last.again("promote" if last.action == "canary" else "rollback", **why))
    pending = canary(followed)
    if pointer.canary is not None and pointer.canary in known:
        if not pending or (pending.version, pending.share) != (pointer.canary, pointer.share):
            followed.append(known[pointer.canary].again("canary", share=pointer.share, **why))
    elif pending:
        followed.append(pending.again("abort", **(why | {"reason": f"{CHAMPION} did not name it"})))
    return followed


def pointed(folder: Path) -> Serving | None:
    """Return what `champion.json` says is served; None if it can't be read.

    Args:
        folder: The model's folder among the served models.
    """
    try:
        pointer = json.loads((folder / CHAMPION).read_text(encoding="utf-8"))
        if not (pending := pointer.get("canary")):
            return Serving(int(pointer["version"]))
        share = float(pending["share"])
        return Serving(int(pointer["version"]), int(pending["version"]), share) if 0 < share < 1 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
