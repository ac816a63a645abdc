"""Decisions about models and data: recorded in the store, each once, and what of them people have been told."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import takewhile
from typing import Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field

from ridgeline import files
from ridgeline.artifacts.base import digest_of
from ridgeline.journal import Journal
from ridgeline.masking import mask
from ridgeline.records import short_run
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

        <root>/decisions/<month>/<time>-<kind>-<id>.json   a `Decision`, with its checksum
        <root>/index/decisions/...                   finds them without a listing of all, see `Journal`
        <local>/scratch/decisions.lock               its owner sends messages, that of decide.lock records a decision
        <root>/keys/decisions.json, decide.json      in an object store: the host that does, see `KeyLease`

    Up to version 0.2 the name was ``<time>-<id>.json``.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        root = store.root if store.remote else store.local
        self._journal = Journal(root, "decisions", store.remote, self._values_of)

    def add(self, decision: Decision) -> bool:
        """Record a decision, unless it is recorded already.

        Args:
            decision: The decision.

        Returns:
            Whether it is new.

        Raises:
            StoreError: If it can't be written.
        """
        if self.holds(decision):  # as each repeated task finds
            return False
        with translate_os_errors("write to", self._store.root), self._store.lock(across_hosts="decide"):
            if self.holds(decision):
                return False
            name = f"{_time(decision.at)}-{decision.kind}-{decision.id}.json"
            self._journal.add("", name, _text(decision), _values(decision))
        return True

    def holds(self, decision: Decision) -> bool:
        """Return whether a decision is recorded.

        Args:
            decision: The decision.

        Raises:
            StoreError: If the decisions can't be read.
        """
        with translate_os_errors("read", self._store.root):
            return next(self._named(decision), None) is not None

    def newest(self, since: datetime | None = None, kinds: Collection[str] = ()) -> Iterator[Decision]:
        """Yield decisions, newest first; each is read when it is needed. Damaged ones are logged and left out.

        Args:
            since: Earlier ones are left out; None for all.
            kinds: Only these kinds; empty for all.

        Raises:
            StoreError: If they can't be read.
        """
        earliest = _time(since) if since else ""
        for name in self._names(earliest):
            stated = name.split("-")[1:-1]  # up to version 0.2, names do not state the kind
            wanted = not (kinds and stated) or stated[0] in kinds
            if wanted and (found := self._read(name)) and (not kinds or found.kind in kinds):
                yield found

    def all(self, since: datetime | None = None) -> list[Decision]:
        """Return all decisions, newest first, see `newest`.

        Args:
            since: Earlier ones are not read; None to read all.
        """
        return list(self.newest(since))

    def about(self, model_digest: str) -> Iterator[Decision]:
        """Yield the questions whether a trained model is to be pushed, and their answers, newest first.

        Args:
            model_digest: The model's digest.
        """
        return (d for d in self._found("model", model_digest[:SHORT]) if d.model_digest == model_digest)

    def of_run(self, run_id: str) -> Iterator[Decision]:
        """Yield the decisions of a run, newest first.

        Args:
            run_id: The run.
        """
        return (d for d in self._found("run", short_run(run_id)) if d.run_id == run_id)

    def deliver(self, recipients: Iterable[Recipient], kinds: Iterable[str], since: datetime) -> int:
        """Send what recipients have not received yet, newest first, each decision once to each.

        A question that was answered meanwhile is not sent any more.

        After `MAX_FAILURES` failures of a recipient, its other messages wait for the next call: one that hangs would
        delay the run by minutes. Newest first, so that messages that it refuses do not block later ones. If another
        process sends at present, on any host, it is left to that.

        Args:
            recipients: To whom.
            kinds: The kinds of decisions to send.
            since: Older decisions are not sent any more.

        Returns:
            The number of messages that were not delivered.
        """
        failures, kinds, recipients = Counter[str](), set(kinds), list(recipients)
        if next(self._undelivered(recipients, kinds, since), None) is None:
            return 0
        with self._store.alone("decisions") as is_alone:
            if not is_alone:
                log.info("another process sends messages at present")
                return 0
            for decision, missing in self._undelivered(recipients, kinds, since):
                done = []
                for recipient in missing:
                    if failures[recipient.digest] < MAX_FAILURES and recipient.send(decision.title, decision.body):
                        done.append(recipient.digest)
                    else:
                        failures[recipient.digest] += 1
                if done:
                    with self._store.lock():
                        self._replace(decision.model_copy(update={"delivered": (*decision.delivered, *done)}))
        return failures.total()

    def _undelivered(
        self, recipients: Iterable[Recipient], kinds: Collection[str], since: datetime
    ) -> Iterator[tuple[Decision, list[Recipient]]]:
        """Yield the decisions that are to be sent, newest first, and to whom."""
        answered = set[str]()
        for decision in self.all(since):
            if decision.kind in ANSWERS:
                answered.add(decision.subject)
            missing = [r for r in recipients if r.digest not in decision.delivered]
            is_closed = decision.kind == "approval_asked" and decision.subject in answered
            if decision.kind in kinds and missing and not is_closed:
                yield decision, missing

    def _names(self, earliest: str) -> Iterator[str]:
        with translate_os_errors("read", self._store.root):
            yield from takewhile(lambda name: name >= earliest, self._journal.newest())

    def _found(self, field: str, value: str) -> Iterator[Decision]:
        with translate_os_errors("read", self._store.root):
            for _, name in self._journal.find(field, value):
                if found := self._read(name):
                    yield found

    def _read(self, name: str) -> Decision | None:
        """Return a decision; None if it is damaged, which is logged, or was deleted meanwhile."""
        try:
            with translate_os_errors("read", self._store.root):
                return Decision.model_validate_json(files.unsign(self._journal.read("", name)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("Left out the decision %s, which can't be read: %s", name, mask(error))
            return None

    def _values_of(self, _: str, name: str) -> Mapping[str, list[str]]:
        decision = self._read(name)
        return _values(decision) if decision else {}

    def _replace(self, decision: Decision) -> None:
        for name in self._named(decision):
            self._journal.replace("", name, _text(decision))

    def _named(self, decision: Decision) -> Iterator[str]:
        """Yield the name of a decision's file, if it is recorded."""
        for _, name in self._journal.find("id", decision.id):
            if name.endswith(f"-{decision.id}.json") and self._journal.exists("", name):
                yield name


def _text(decision: Decision) -> str:
    return files.sign(decision.model_dump_json(indent=2))


def _values(decision: Decision) -> dict[str, list[str]]:
    """Return by which values a decision is found, see `Journal`."""
    return {
        "id": [decision.id],
        "run": [short_run(decision.run_id)] if decision.run_id else [],
        "model": [decision.model_digest[:SHORT]] if decision.model_digest else [],
    }


def _time(at: datetime) -> str:
    """Return a time as it begins a file's name: names sort by it."""
    return f"{at.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}"
