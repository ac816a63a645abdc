"""The page of one DAG run: its result, its steps, the comparison with the champion, and the lineage.

It needs the store and Airflow's data about the run, but imports no Airflow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args
from urllib.parse import quote

from markupsafe import Markup

from ridgeline.airflow.plugin.compare_page import link as link_to_comparison
from ridgeline.airflow.plugin.template import render_template
from ridgeline.approval import refusal
from ridgeline.artifacts.base import Artifact, ArtifactError
from ridgeline.artifacts.dataset import served_name
from ridgeline.artifacts.example_anomalies import ExampleAnomalies, ExampleAnomaliesFacts
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.decisions import ANSWERS, Change, Decision, Decisions
from ridgeline.history import DONE, HistoryEntry
from ridgeline.lineage import Origin, lineage
from ridgeline.masking import mask
from ridgeline.pipeline import default_target, output_types
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store, StoreError

ENDED = ("success", "skipped", "failed", "up_for_retry")
WORDS = {"complete": "ran", "cached": "reused", "skipped": "skipped", "failed": "failed"}
WAITING = {
    "running": "running",
    "upstream_failed": "not run",
    "removed": "removed",
    "awaiting_input": "waiting for approval",
    "up_for_reschedule": "waiting",
}
CHANGES = get_args(Change)
NO_REASON = {"failed": "The error is in the task's log.", "not run": "An upstream step failed."}


@dataclass(frozen=True)
class Task:
    """Airflow's data about a task of a run. A mapped task counts as one, from the first start to the last end.

    Attributes:
        name: The task's id.
        state: Airflow's name of the state.
        started_at: The start; None if it has not started.
        ended_at: The end; None if it has not ended.
        reason: Why it was skipped or failed without running a step; empty if unknown.
    """

    name: str
    state: str
    started_at: datetime | None
    ended_at: datetime | None
    reason: str = ""


@dataclass(frozen=True)
class Run:
    """Airflow's data about a DAG run.

    Attributes:
        dag_id: The DAG's id.
        run_id: The run's id, unique within its DAG.
        state: Airflow's name of the state.
        started_at: The start; None if it is queued.
        ended_at: The end; None if it has not ended.
        note: The user's note.
        changed: Parameters that differ from the form's defaults: the default, and the value of the run.
        tasks: The tasks, in the order of the DAG.
    """

    dag_id: str
    run_id: str
    state: str
    started_at: datetime | None
    ended_at: datetime | None
    note: str
    changed: dict[str, tuple[Any, Any]]
    tasks: tuple[Task, ...]

    @property
    def in_progress(self) -> bool:
        """Whether the run has not ended."""
        return self.state in ("queued", "running")


@dataclass(frozen=True)
class Step:
    """A row of the table: a task, its outcome and the reason."""

    task: Task
    record: Execution | None

    @property
    def outcome(self) -> str:
        """The outcome, in one or two words."""
        if self.task.state in ("failed", "up_for_retry"):
            return "failed"
        if self.record:
            return WORDS[self.record.state]
        return self.task.state if self.task.state in ENDED else WAITING.get(self.task.state, "waiting")

    @property
    def reason(self) -> str:
        """The reason of the outcome; empty if unknown."""
        if self.record and (self.record.state == "failed" or self.outcome != "failed"):
            return self.record.reason
        if self.task.state == "up_for_retry":
            return "The task failed. Airflow will retry it. The error is in the task's log."
        return self.task.reason or NO_REASON.get(self.outcome, "")

    @property
    def yielded(self) -> str:
        """Short name of the artifact that was made or reused; empty if there is none."""
        kind, _, digest = ((self.record and self.record.output) or "").partition("/")
        return f"{kind}/{digest[:12]}" if digest else ""

    @property
    def seconds(self) -> float | None:
        """The duration, if the task has ended."""
        if self.record:
            return self.record.seconds
        if self.task.state in ENDED and self.task.started_at and self.task.ended_at:
            return (self.task.ended_at - self.task.started_at).total_seconds()
        return None


def find_steps(store: Store, run: Run) -> list[Step]:
    """Return a run's tasks with their execution records.

    A record names its run, but a run of another DAG may have the same name. So a record counts only if it was made
    while the task of that step ran.

    Args:
        store: The store.
        run: The run.
    """
    return [Step(task, _record(store, run.run_id, task)) for task in run.tasks]


def _record(store: Store, run_id: str, task: Task) -> Execution | None:
    if task.state not in ENDED or task.started_at is None:
        return None
    for execution in store.executions(task.name, run_id=run_id):  # newest first
        if execution.started_at < task.started_at:
            break
        if task.ended_at is None or execution.started_at <= task.ended_at:
            return execution
    return None


def _worked(store: Store, run: Run) -> bool:
    """Return whether any step of a run was executed instead of reused, mapped tasks included."""
    return any(execution.state == "complete" for execution in store.executions(run_id=run.run_id))


def reported(store: Store, run: Run, task: str) -> Artifact[Any] | None:
    """Return the verified artifact with a report that a task made or reused; None if there is none.

    Args:
        store: The store.
        run: The run.
        task: The task's name.

    Raises:
        ArtifactError: If it is missing or damaged.
    """
    for step in find_steps(store, run):
        if step.task.name == task and step.record and step.record.output:
            artifact = _open(store, step.record.output)
            return artifact if artifact and artifact.report else None
    return None


def _open(store: Store, ref: str) -> Artifact[Any] | None:
    """Return a verified artifact that has a report or is served; None for other artifacts."""
    kind = output_types().get(ref.partition("/")[0])
    return store.open(ref, kind) if kind and (kind.report_name or kind is PushedModel) else None


def _waits(run: Run, decisions: Collection[Decision]) -> bool:
    """Return whether a run waits for a person's answer."""
    answered = {decision.subject for decision in decisions if decision.kind in ANSWERS}
    asked = {decision.subject for decision in decisions if decision.kind == "approval_asked"}
    return run.in_progress and bool(asked - answered)


def _served(settings: Settings, pushed: PushedModel, run_id: str, decisions: list[Decision]) -> str:
    """Return whether the model of a run is served, in one or two sentences."""
    if rejected := refusal(pushed, decisions):
        return f"Exported, but not pushed: {rejected}."
    registry, name = settings.open_registry(), pushed.facts.model_name
    own = registry.entries_of(name, pushed.facts.model_digest)
    pushes = list({entry.version: entry for entry in reversed(own)}.values())  # the first entry of each version
    champion = registry.champion(name)
    if not pushes or champion is None:
        answers = Decisions(settings.open_store()).about(pushed.facts.model_digest)
        reason = registry.decide_push(pushed).reason or refusal(pushed, answers)
        return f"Exported, but not pushed: {reason}." if reason else "Exported, but not pushed."
    last = pushes[0]
    text = f"Pushed as version {last.version} of {name}."
    if last.run_id != run_id:
        text = f"Nothing was pushed: version {last.version} of {name} holds this model."
    if (serving := registry.serving(name)) and serving.canary == last.version:
        return f"{text} It is a canary: it answers {serving.share:.3g} of the requests."
    if champion.version == last.version:
        return f"{text} It is the champion."
    return f"{text} The champion is version {champion.version} now."


def _comparison(settings: Settings, evaluation: ModelEvaluation) -> tuple[str, str] | None:
    """Return what a model is compared with, in words, and the link to the comparison; None if there is nothing.

    It is the champion; for the champion itself, the one that it replaced.
    """
    registry, name = settings.open_registry(), served_name(evaluation.facts.dataset)
    other = registry.baseline(name, evaluation.facts.model_digest)
    if other is None or other.version not in registry.versions(name):
        return None
    words = f"version {other.version}{', the champion' if other == registry.champion(name) else ''}"
    return words, f"../../../{link_to_comparison(f'{name}/{other.version}', evaluation.ref)}"


def _rollbacks(settings: Settings, run: Run) -> Iterator[tuple[str, HistoryEntry]]:
    """Yield the rollbacks and decisions about canaries of a run: the model's name, the entry of its history."""
    registry, started_at = settings.open_registry(), run.started_at
    for name in registry.model_names():
        for entry in registry.history(name):
            if entry.action != "push" and entry.run_id == run.run_id and started_at and started_at <= entry.at:
                yield name, entry


def _findings(data: ExampleAnomaliesFacts) -> str:
    """Return the number of errors and warnings in words."""
    counts = ((data.num_errors, "error"), (data.num_warnings, "warning"))
    return ", ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in counts if n) or "no findings"


def _raw_files(store: Store, ref: str) -> dict[str, dict[str, Any]]:
    """Return the downloaded files that an artifact records: their sizes and digests by name."""
    try:
        files: dict[str, dict[str, Any]] = store.manifest(ref).facts.get("raw_files", {})
        return files
    except ArtifactError:
        return {}


def _lines(store: Store, origin: Origin) -> Iterator[dict[str, Any]]:
    """Yield the rows of a lineage: artifacts, and the raw files and sources below artifacts without inputs."""
    for depth, source, again in origin.walk():
        kind, _, digest = source.ref.partition("/")
        yield {"depth": depth, "name": kind, "digest": digest, "made": source.execution, "again": again}
        if not source.inputs and not again:
            for name, entry in _raw_files(store, source.ref).items():
                yield {"depth": depth + 1, "name": name, "digest": entry["sha256"], "bytes": entry["bytes"]}
            for name, digest in source.execution.parts.sources.items() if source.execution else ():
                yield {"depth": depth + 1, "name": name, "digest": digest, "bytes": None}


def render(settings: Settings, run: Run) -> str:
    """Return the page as HTML. It names artifacts that are missing or damaged.

    Args:
        settings: The locations of the store and of the served models.
        run: The run.

    Raises:
        StoreError: If the store is unreadable.
    """
    store = settings.open_store()
    started_at = run.started_at  # a run of another DAG may have the same name
    decided = Decisions(store).of_run(run.run_id) if started_at else ()
    decisions = [decision for decision in decided if started_at and decision.at >= started_at]
    has_changed = any(decision.kind in CHANGES for decision in decisions)
    steps = find_steps(store, run)
    records = [step.record for step in steps if step.record]
    outputs = {step.task.name: step.record.output for step in steps if step.record and step.record.output}
    found: dict[type[Artifact[Any]], Any] = {}
    problems, reports, served, compared = [], [], None, None
    for task, ref in outputs.items():
        try:
            artifact = _open(store, ref)
            if isinstance(artifact, PushedModel):
                served = _served(settings, artifact, run.run_id, decisions)
            if isinstance(artifact, ModelEvaluation):
                compared = _comparison(settings, artifact)
        except (ArtifactError, StoreError) as error:
            problems.append(f"{task}: {mask(error)}")
            continue
        if artifact:
            found[type(artifact)] = artifact
        if artifact and artifact.report:
            link = f"{quote(run.run_id, safe='')}/reports/{quote(task)}"
            report = Markup(artifact.report.read_text(encoding="utf-8"))  # nosec B704 - a step escaped its texts
            reports.append((task, link, report))
    rollbacks = []
    try:
        rollbacks = list(_rollbacks(settings, run))
    except StoreError as error:
        problems.append(mask(error))
    if _waits(run, decisions):  # the task has not ended, so its record does not count yet
        served = "Exported, but not pushed: it waits for approval."
    return render_template(
        "run",
        decisions=decisions,
        has_recipients=bool(settings.recipients),
        sent_kinds=settings.notify_about,
        rollbacks=rollbacks,
        done=DONE,
        run=run,
        steps=steps,
        records=records,
        num_reused=sum(record.state == "cached" for record in records),
        unchanged=run.state == "success" and records and not has_changed and not _worked(store, run),
        failed=next((step for step in steps if step.outcome == "failed"), None),
        running=[step.task.name for step in steps if step.outcome == "running"],
        evaluation=found[ModelEvaluation].facts if ModelEvaluation in found else None,
        data=(data := found[ExampleAnomalies].facts if ExampleAnomalies in found else None),
        data_summary=_findings(data) if data else "",
        selection=found[SweepResult].facts if SweepResult in found else None,
        served=served,
        compared=compared,
        skipped=next((r.reason for r in records if r.component == default_target() and r.state == "skipped"), ""),
        size=found[PushedModel].facts.size_in_words if PushedModel in found else "",
        problems=problems,
        reports=reports,
        lineage=list(_lines(store, lineage(store, list(outputs.values())[-1]))) if outputs else [],
        synthetic=any(getattr(artifact.facts, "synthetic", False) for artifact in found.values()),
    )
