"""Decisions about models and data: recorded in the store, each once, and what of them people have been told."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol, get_args

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ridgeline import files, object_store
from ridgeline.artifacts.base import digest_of
from ridgeline.masking import mask
from ridgeline.store import Store, translate_os_errors

log = logging.getLogger(__name__)

Answer = Literal["approved", "rejected", "approval_expired"]
Change = Literal["pushed", "rolled_back", "canary", "promoted", "aborted"]
Kind = Literal[Change, "refused", "not_pushed", "data_blocked", "stale", "approval_asked", Answer]
ANSWERS: tuple[Answer, ...] = get_args(Answer)
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_FAILURES = 2  # messages that a recipient does not take, before the others wait for the next call
SHORT = 16  # hexadecimal digits in a name


class Recipient(Protocol):
    """Who receives messages, see `ridgeline.messages.Recipient`."""

    @property
    def digest(self) -> str:
        """A name: 16 hexadecimal digits."""

    def send(self, title: str, body: str) -> bool:
        """Send a message; return whether it was taken."""


class Decision(BaseModel):
    """A decision and its reasons.

    Attributes:
        schema_version: Version of this layout.
        kind: What was decided. ``refused``: the gate did not bless a model, or it is too large. ``not_pushed``: a model
            that passed the gate is not served, because of the history. ``canary``: a version answers a share of the
            requests, until it is ``promoted`` or ``aborted``. ``data_blocked``: the data stopped the run.
            ``stale``: what is served is old, or its successors were refused. ``approval_asked``: a person must approve
            a push. ``approved``, ``rejected``: a person has decided. ``approval_expired``: nobody did so in time.
        model: The model's name.
        subject: What was decided about, such as an artifact's name. Decisions of one kind about one subject are one.
        title: The decision, as a phrase.
        reasons: Why, one phrase each.
        causes: The same without numbers, so that several decisions can be compared; empty if unknown.
        figures: Measured values by name.
        report: Path or URL of the report; empty if there is none.
        run_id: The run that decided.
        by: The user who asked for it; empty for a scheduled run.
        model_digest: Digest of the trained model that an approval is about; empty for other decisions.
        answered_by: The user who approved or rejected a push; empty for other decisions.
        at: When, UTC.
        delivered: Digests of the recipients that have received it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: Kind
    model: str
    subject: str
    title: str
    reasons: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    figures: dict[str, float] = {}
    report: str = ""
    run_id: str = ""
    by: str = ""
    model_digest: str = ""
    answered_by: str = ""
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    delivered: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The digest of what makes it this decision: 16 hexadecimal digits."""
        return digest_of([self.kind, self.model, self.subject])[:SHORT]

    @property
    def body(self) -> str:
        """The text of a message about it."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.figures.items())
        origin = f"Run {self.run_id}{f', started by {self.by}' if self.by else ''}" if self.run_id else ""
        report = f"Report: {self.report}" if self.report else ""
        return "\n".join(filter(None, [*self.reasons, figures, origin, report]))


class Decisions:
    """The decisions of a store.

    On disk::

        <root>/decisions/<time>-<id>.json   a `Decision`, with its checksum
        <local>/decisions.lock              its owner sends messages

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.root / "decisions"

    def add(self, decision: Decision) -> bool:
        """Record a decision, unless it is recorded already.

        Args:
            decision: The decision.

        Returns:
            Whether it is new.

        Raises:
            StoreError: If it can't be written.
        """
        with translate_os_errors("write to", self._store.root), self._store.lock():
            if any(name.endswith(f"-{decision.id}.json") for name in self._names()):
                return False
            self._write(decision)
        return True

    def all(self, since: datetime | None = None) -> list[Decision]:
        """Return the decisions, newest first. Damaged ones are logged and left out.

        Args:
            since: Earlier ones are not read; None to read all.

        Raises:
            StoreError: If they can't be read.
        """
        found = []
        with translate_os_errors("read", self._store.root):
            earliest = _time(since) if since else ""
            for name in sorted((name for name in self._names() if name >= earliest), reverse=True):
                try:
                    found.append(Decision.model_validate_json(files.unsign((self._folder / name).read_text("utf-8"))))
                except (ValueError, ValidationError) as error:
                    log.warning("Left out the decision %s, which can't be read: %s", name, mask(error))
        return found

    def deliver(self, recipients: Iterable[Recipient], kinds: Iterable[str], since: datetime) -> int:
        """Send what recipients have not received yet, newest first, each decision once to each.

        A question that was answered meanwhile is not sent any more.

        After `MAX_FAILURES` failures of a recipient, its other messages wait for the next call: one that hangs would
        delay the run by minutes. Newest first, so that messages that it refuses do not block later ones. If another
        process sends at present, it is left to that.

        Args:
            recipients: To whom.
            kinds: The kinds of decisions to send.
            since: Older decisions are not sent any more.

        Returns:
            The number of messages that were not delivered.
        """
        failures, wanted, recipients = Counter[str](), set(kinds), list(recipients)
        try:
            with FileLock(self._store.local / "decisions.lock", timeout=0):
                answered = set[str]()
                for decision in self.all(since):
                    if decision.kind in ANSWERS:
                        answered.add(decision.subject)
                    missing = [r for r in recipients if r.digest not in decision.delivered]
                    closed = decision.kind == "approval_asked" and decision.subject in answered
                    if decision.kind not in wanted or not missing or closed:
                        continue
                    done = []
                    for recipient in missing:
                        if failures[recipient.digest] < MAX_FAILURES and recipient.send(decision.title, decision.body):
                            done.append(recipient.digest)
                        else:
                            failures[recipient.digest] += 1
                    if done:
                        with self._store.lock():
                            self._write(decision.model_copy(update={"delivered": (*decision.delivered, *done)}))
        except Timeout:
            log.info("another process sends messages at present")
        return failures.total()

    def _names(self) -> list[str]:
        if self._store.remote:
            return list(object_store.sizes(self._folder))
        return [path.name for path in self._folder.glob("*.json")] if self._folder.exists() else []

    def _write(self, decision: Decision) -> None:
        path = self._folder / f"{_time(decision.at)}-{decision.id}.json"
        text = files.sign(decision.model_dump_json(indent=2))
        if self._store.remote:
            object_store.write(path, text.encode())
        else:
            files.make_folder(Path(self._folder.path))
            files.write(Path(path.path), text)


def _time(at: datetime) -> str:
    """Return a time as it begins a file's name: names sort by it."""
    return f"{at.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}"
