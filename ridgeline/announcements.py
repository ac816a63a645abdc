"""Announces decisions: each is logged, recorded once in the store, and sent to people. None of that fails a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Any

from ridgeline.approval import figures_of
from ridgeline.artifacts.base import Artifact
from ridgeline.artifacts.dataset import served_name
from ridgeline.artifacts.example_anomalies import ExampleAnomalies
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.decisions import Decision, Decisions, Kind
from ridgeline.history import DONE, Action, HistoryEntry, champions
from ridgeline.masking import mask
from ridgeline.registry import Pushed
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store

log = logging.getLogger(__name__)

SENT_FOR = timedelta(days=1)  # an undelivered message is tried again for this long, with each further decision
COUNTED = 20  # refusals in a row; more are not read
CHANGES: dict[Action, Kind] = {
    "rollback": "rolled_back",
    "canary": "canary",
    "promote": "promoted",
    "abort": "aborted",
}


def announce(settings: Settings, *decisions: Decision | None) -> None:
    """Log and record decisions and champions that have become stale; send messages about them.

    Messages that were not delivered before are sent again. A problem is logged, never raised.

    Args:
        settings: Where the store and the served models are, who receives messages and about what.
        *decisions: The decisions; None for none.
    """
    try:
        known = Decisions(settings.open_store())
        for decision in filter(None, decisions):
            _record(known, decision)
        for decision in _stale_decisions(settings, known):
            _record(known, decision)
        if settings.recipients:
            since = datetime.now(UTC) - SENT_FOR
            if failed := known.deliver(settings.recipients, settings.notify_about, since):
                log.warning("%d messages wait: they are sent again with the next decision, for a day", failed)
    except Exception as error:  # a decision stands, whether or not people hear of it
        log.error("Cannot announce a decision: %s", mask(error))


def _record(known: Decisions, decision: Decision) -> None:
    if known.add(decision):
        log.info("%s%s", decision.title, "".join(f"\n  {reason}" for reason in decision.reasons))


def _stale_decisions(settings: Settings, known: Decisions) -> list[Decision]:
    registry, now = settings.open_registry(), datetime.now(UTC)
    found = []
    for name in registry.model_names():
        if history := registry.history(name):
            refused = known.newest(champions(history)[-1].at, ["refused"])
            found.append(stale_decision(name, history, refused, settings, now))
    return [decision for decision in found if decision]


def push_decision(
    store: Store,
    inputs: Mapping[str, str],
    execution: Execution,
    pushed: Pushed | None,
    by: str,
    link: str,
    answer: Decision | None = None,
) -> Decision | None:
    """Return what was decided about the model of a step that exports it; None if nothing changed.

    Args:
        store: The store.
        inputs: The step's inputs.
        execution: Its execution.
        pushed: The outcome of the push; None if there was none.
        by: The user who asked for the run.
        link: URL of the run's report; empty for the path of the evaluation's.
        answer: Who approved the push, and why; None if it needed no approval.
    """
    evaluation = find_evaluation(store, inputs)
    if evaluation is None:  # another pipeline's step
        return None
    ref, facts = evaluation.ref, evaluation.facts
    name = served_name(facts.dataset)
    shared: dict[str, Any] = {
        "model": name,
        "figures": figures_of(evaluation),
        "report": link or str(evaluation.report or ""),
        "run_id": execution.run_id,
        "by": by,
    }
    if pushed is None:
        reasons = facts.verdict.reasons if not facts.verdict.blessed else (execution.reason,)
        causes = facts.verdict.unmet if not facts.verdict.blessed else (execution.reason.partition(":")[0],)
        subject, title = f"{ref}: {execution.reason}", f"{name}: model {facts.model_digest[:12]} was refused"
        return Decision(kind="refused", subject=subject, title=title, reasons=reasons, causes=causes, **shared)
    if pushed.new:
        title = f"{name}: version {pushed.version} was pushed"
        title += f" as a canary for {pushed.share:.3g} of the requests" if pushed.share else ""
        subject = f"version {pushed.version}"
        approved = (f"approved by {answer.answered_by}: {'; '.join(answer.reasons)}",) if answer else ()
        reasons = (*approved, *facts.verdict.reasons)
        return Decision(
            kind="canary" if pushed.share else "pushed", subject=subject, title=title, reasons=reasons, **shared
        )
    if pushed.unchanged:
        return None
    title = f"{name}: model {facts.model_digest[:12]} was not pushed"
    reason = pushed.reason.removeprefix("not pushed: ")
    return Decision(kind="not_pushed", subject=f"{ref}: {reason}", title=title, reasons=(reason,), **shared)


def find_evaluation(store: Store, inputs: Mapping[str, str]) -> ModelEvaluation | None:
    """Return the evaluation among a step's inputs; None if there is none.

    Args:
        store: The store.
        inputs: Store-relative artifact names by input name.
    """
    ref = next((ref for ref in inputs.values() if ref.startswith(f"{ModelEvaluation.__name__}/")), None)
    return store.open(ref, ModelEvaluation) if ref else None


def data_decision(artifact: Artifact[Any], run_id: str, by: str, link: str) -> Decision | None:
    """Return that data stopped a run, for an artifact that states a problem of the data; None for others.

    Args:
        artifact: The artifact.
        run_id: The run.
        by: The user who asked for it.
        link: URL of the run's report; empty for the path of the artifact's.
    """
    if not isinstance(artifact, ExampleAnomalies):
        return None
    name, errors = served_name(artifact.facts.dataset), artifact.facts.num_errors
    return Decision(
        kind="data_blocked",
        model=name,
        subject=artifact.ref,
        title=f"{name}: the data stopped the run with {errors} error{'s' * (errors != 1)}",
        reasons=tuple(finding.message for finding in artifact.facts.findings if finding.severity == "error"),
        report=link or str(artifact.report or ""),
        run_id=run_id,
        by=by,
    )


def change_decision(name: str, entry: HistoryEntry, link: str = "") -> Decision:
    """Return that a model was rolled back, or what was decided about its canary.

    Args:
        name: The model's name.
        entry: The entry of its history.
        link: URL of the run's page; empty if there is none.
    """
    share = f", {entry.share:.3g} of the requests" if entry.share else ""
    return Decision(
        kind=CHANGES[entry.action],
        model=name,
        subject=f"version {entry.version}, {entry.at.isoformat()}",
        title=f"{name}: {DONE[entry.action]} version {entry.version}{share}",
        reasons=(entry.reason,),
        figures={"accuracy": entry.accuracy},
        report=link,
        run_id=entry.run_id,
        by=entry.by,
    )


def stale_decision(
    name: str, history: Sequence[HistoryEntry], decisions: Iterable[Decision], settings: Settings, now: datetime
) -> Decision | None:
    """Return that a champion is old, or that its successors were refused again and again; None if neither holds.

    Args:
        name: The model's name.
        history: Its history.
        decisions: The decisions, newest first.
        settings: The limits.
        now: The present time.
    """
    if not history:
        return None
    champion = champions(history)[-1]
    days = (now - champion.at).days
    refused = (d for d in decisions if (d.kind, d.model) == ("refused", name) and d.at > champion.at)
    last = next(refused, None)
    causes = last.causes if last else ()
    most = max(COUNTED, settings.refused_in_a_row)
    same = takewhile(lambda d: d.causes == causes, refused) if causes else ()
    in_a_row = sum(1 for _ in islice(same, most - 1)) + bool(causes)
    is_old, is_refused = days >= settings.stale_days, in_a_row >= settings.refused_in_a_row
    if not (is_old or is_refused):
        return None
    reasons = [f"champion {days} day{'s' * (days != 1)} old"]
    if in_a_row:
        more = " or more" if in_a_row == most else ""
        candidates = f"last {in_a_row}{more} candidates were" if in_a_row > 1 else "last candidate was"
        reasons.append(f"the {candidates} refused: {', '.join(causes)}")
    what = ", ".join(causes) if is_refused else "age"
    return Decision(
        kind="stale",
        model=name,
        subject=f"version {champion.version} since {champion.at.isoformat()}: {what}",
        title=f"{name}: version {champion.version} may be stale",
        reasons=("; ".join(reasons),),
        figures={"accuracy": champion.accuracy},
    )
