"""The page of one DAG run: what came of it, step by step, against the champion, and where it comes from.

It is made of what Airflow knows of the run and of the store; Airflow itself is not needed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from ridgeline.artifacts.base import Artifact, ArtifactError
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.lineage import Origin, lineage
from ridgeline.page import render_page
from ridgeline.registry import HistoryEntry
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store, StoreError

ENDED = ("success", "skipped", "failed", "up_for_retry")
WORDS = {"complete": "ran", "cached": "reused", "skipped": "skipped", "failed": "failed"}
WAITING = {"running": "running", "upstream_failed": "not run", "removed": "removed", "up_for_reschedule": "waiting"}
NO_RECORD = {
    "failed": "The task's log tells why.",
    "skipped": "The DAG left it out; the task's log tells why.",
    "not run": "A step before it failed.",
}
KINDS: dict[str, type[Artifact[Any]]] = {kind.__name__: kind for kind in (ModelEvaluation, SweepResult, PushedModel)}


@dataclass(frozen=True)
class Task:
    """A task of a run, as Airflow knows it; one that is mapped counts as one, from its first start to its last end."""

    name: str
    state: str
    started_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True)
class Run:
    """A DAG run, as Airflow knows it.

    Attributes:
        dag_id: The DAG's id.
        run_id: The run's id, unique within its DAG.
        state: Airflow's word.
        started_at: When its first task could start; None if it waits.
        ended_at: When it ended; None if it has not.
        note: What a person noted.
        changed: The parameters that are not at the form's defaults: the default, and the run's value.
        tasks: Its tasks, in order.
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
        """Whether it has still to end."""
        return self.state in ("queued", "running")


@dataclass(frozen=True)
class Step:
    """A line of the table: a task, what became of it and why."""

    task: Task
    record: Execution | None

    @property
    def outcome(self) -> str:
        """One word or two."""
        if self.task.state in ("failed", "up_for_retry"):
            return "failed"
        if self.record:
            return WORDS[self.record.state]
        return self.task.state if self.task.state in ENDED else WAITING.get(self.task.state, "waiting")

    @property
    def reason(self) -> str:
        """Why; empty if nothing is known."""
        if self.record and (self.record.state == "failed" or self.outcome != "failed"):
            return self.record.reason
        if self.task.state == "up_for_retry":
            return "It will be tried again. Its log tells why it failed."
        return NO_RECORD.get(self.outcome, "")

    @property
    def yielded(self) -> str:
        """Short name of the artifact that it made or reused; empty if there is none."""
        kind, _, digest = ((self.record and self.record.output) or "").partition("/")
        return f"{kind}/{digest[:12]}" if digest else ""

    @property
    def seconds(self) -> float | None:
        """How long it took, if it ended."""
        if self.record:
            return self.record.seconds
        if self.task.state in ENDED and self.task.started_at and self.task.ended_at:
            return (self.task.ended_at - self.task.started_at).total_seconds()
        return None


def find_steps(store: Store, run: Run) -> list[Step]:
    """Return a run's tasks with their execution records.

    A record bears its run's name, which a run of another DAG may bear, too. So it counts only if it was made while
    the run's own task of that step ran.

    Args:
        store: The store.
        run: The run.
    """
    return [Step(task, _record(store, run.run_id, task)) for task in run.tasks]


def _record(store: Store, run_id: str, task: Task) -> Execution | None:
    if task.state not in ENDED or task.started_at is None:
        return None
    for execution in store.executions(task.name):  # newest first
        if execution.started_at < task.started_at:
            break
        if execution.run_id == run_id and (task.ended_at is None or execution.started_at <= task.ended_at):
            return execution
    return None


def _worked(store: Store, run: Run) -> bool:
    """Tell whether any step of a run had to work, also one of a mapped task."""
    return any(execution.state == "complete" for execution in store.executions() if execution.run_id == run.run_id)


def reported(store: Store, run: Run, task: str) -> ModelEvaluation | SweepResult | None:
    """Return the artifact with a report that a task of a run yielded or reused, verified; None if there is none.

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
            return artifact if isinstance(artifact, ModelEvaluation | SweepResult) else None
    return None


def _open(store: Store, ref: str) -> Artifact[Any] | None:
    kind = KINDS.get(ref.partition("/")[0])
    return store.open(ref, kind) if kind else None


def _served(settings: Settings, pushed: PushedModel, run_id: str) -> str:
    """Tell, in a sentence or two, what is served of a run's result."""
    registry, name = settings.open_registry(), pushed.facts.model_name
    own = [entry for entry in registry.history(name) if entry.model_digest == pushed.facts.model_digest]
    pushes = [entry for entry in own if entry.action == "push"]
    champion = registry.champion(name)
    if not pushes or champion is None:
        return f"Exported, but {registry.why_not_pushed(pushed) or f'not served as {name}'}."
    last = pushes[-1]
    text = f"Pushed as version {last.version} of {name}."
    if last.run_id != run_id:
        text = f"Nothing was pushed: version {last.version} of {name} holds this model."
    if champion.version == last.version:
        return f"{text} It is the champion."
    return f"{text} The champion is version {champion.version} now."


def _rollbacks(settings: Settings, run: Run) -> Iterator[tuple[str, HistoryEntry]]:
    """Yield the rollbacks that a run made: the model's name and the entry of its history."""
    registry, started_at = settings.open_registry(), run.started_at
    for name in registry.model_names():
        for entry in registry.history(name):
            if (entry.action, entry.run_id) == ("rollback", run.run_id) and started_at and started_at <= entry.at:
                yield name, entry


def _raw_files(store: Store, ref: str) -> dict[str, dict[str, Any]]:
    """Return the downloaded files that an artifact records: their sizes and digests by name."""
    try:
        return store.manifest(ref).facts.get("raw_files", {})
    except ArtifactError:
        return {}


def _lines(store: Store, origin: Origin) -> Iterator[dict[str, Any]]:
    """Yield the lines of a lineage: artifacts, and below those with no inputs their raw files."""
    for depth, source, again in origin.walk():
        kind, _, digest = source.ref.partition("/")
        yield {"depth": depth, "name": kind, "digest": digest, "made": source.execution, "again": again}
        if not source.inputs and not again:
            for name, entry in _raw_files(store, source.ref).items():
                yield {"depth": depth + 1, "name": name, "digest": entry["sha256"], "bytes": entry["bytes"]}


def render(settings: Settings, run: Run) -> str:
    """Return the page as HTML; what is missing or damaged is said in its place.

    Args:
        settings: Where the store and the served models are.
        run: The run.

    Raises:
        StoreError: If the store can't be read.
    """
    store = settings.open_store()
    steps = find_steps(store, run)
    records = [step.record for step in steps if step.record]
    outputs = {step.task.name: step.record.output for step in steps if step.record and step.record.output}
    found: dict[type[Artifact[Any]], Any] = {}
    problems, reports, served = [], [], None
    for task, ref in outputs.items():
        try:
            artifact = _open(store, ref)
            if isinstance(artifact, PushedModel):
                served = _served(settings, artifact, run.run_id)
        except (ArtifactError, StoreError) as error:
            problems.append(f"{task}: {error}")
            continue
        if artifact:
            found[type(artifact)] = artifact
        if isinstance(artifact, ModelEvaluation | SweepResult):
            link = f"{quote(run.run_id, safe='')}/reports/{quote(task)}"
            reports.append((task, link, Markup(artifact.report.read_text(encoding="utf-8"))))
    rollbacks = []
    try:
        rollbacks = list(_rollbacks(settings, run))
    except StoreError as error:
        problems.append(str(error))
    return render_page(
        TEMPLATE,
        rollbacks=rollbacks,
        run=run,
        steps=steps,
        records=records,
        num_reused=sum(record.state == "cached" for record in records),
        unchanged=run.state == "success" and records and not _worked(store, run),
        failed=next((step for step in steps if step.outcome == "failed"), None),
        running=[step.task.name for step in steps if step.outcome == "running"],
        evaluation=found[ModelEvaluation].facts if ModelEvaluation in found else None,
        sweep=found[SweepResult].facts if SweepResult in found else None,
        served=served,
        problems=problems,
        reports=reports,
        lineage=list(_lines(store, lineage(store, list(outputs.values())[-1]))) if outputs else [],
        synthetic=any(artifact.facts.synthetic for artifact in found.values()),
    )


TEMPLATE = """\
{% extends "page" %}
{% block title %}{{ run.run_id }}{% endblock %}
{% block style %}
.verdict h2:not(:last-child){margin-bottom:6px}
.verdict p:last-child{margin-bottom:0}
.verdict ul+p{margin-top:8px}
.verdict.waiting{border-color:#6b7280}
.outcome{display:inline-block;padding:0 10px;border-radius:99px;background:#e5e7eb;white-space:nowrap}
.outcome.ran{background:#cfe5f5}
.outcome.failed{background:#f9d9c2}
.steps td,.steps th,.lineage td,.lineage th{text-align:left;vertical-align:top}
.steps td.number,.steps th.number{text-align:right}
.steps .why{min-width:220px}
.why{overflow-wrap:anywhere;white-space:pre-line}
.lineage th,.lineage td,.steps code{white-space:nowrap}
.plain thead th{text-align:left}
.alone{text-align:right;margin:0}
{% endblock %}
{% macro time(moment) %}{{ moment.strftime("%Y-%m-%d %H:%M:%S") }} UTC{% endmacro %}
{% macro show(value) %}{{ value if value is string else value|tojson }}{% endmacro %}
{% block body %}
<header>
<h1>{{ run.dag_id }}</h1>
<p class="note"><code>{{ run.run_id }}</code>{% if run.started_at %}, started {{ time(run.started_at) }}{% endif %}
{% if run.started_at and run.ended_at %}, took \
{{ "%.1f"|format((run.ended_at - run.started_at).total_seconds()) }} s{% endif %}</p>
{% if run.note %}
<p class="why">{{ run.note }}</p>
{% endif %}
</header>
<main>
{% if run.in_progress %}
<div class="verdict waiting"><h2>In progress</h2>
<p>{% if running %}Running: {{ running|join(", ") }}.{% endif %} This page renews itself.</p></div>
{% endif %}
{% if failed %}
<div class="verdict"><h2>&#10007; Failed: {{ failed.task.name }}</h2><p class="why">{{ failed.reason }}</p></div>
{% elif not records and not rollbacks and not run.in_progress %}
<div class="verdict waiting"><h2>Nothing to show</h2>
<p>No step of Ridgeline has ended in this run, or its records were deleted by <code>ridgeline gc</code>.</p></div>
{% endif %}
{% for name, entry in rollbacks %}
<div class="verdict blessed"><h2>Rolled back to version {{ entry.version }} of {{ name }}</h2>
<p class="why">{{ entry.reason }}{% if entry.by %} ({{ entry.by }}){% endif %}</p></div>
{% endfor %}
{% if unchanged %}
<div class="verdict blessed"><h2>Nothing changed</h2><p>No step had to work: same inputs, parameters and code. \
What is shown below was made by earlier runs.</p></div>
{% endif %}
{% for problem in problems %}
<div class="verdict"><h2>Something can't be shown</h2><p class="why">{{ problem }}</p></div>
{% endfor %}
{% if evaluation %}
<div class="verdict{% if evaluation.verdict.blessed %} blessed{% endif %}">
<h2>{% if evaluation.verdict.forced %}&#10003; Blessed by force\
{% elif evaluation.verdict.blessed %}&#10003; Blessed{% else %}&#10007; Not blessed{% endif %}</h2>
<ul>
{% for reason in evaluation.verdict.reasons %}
<li>{{ reason }}</li>
{% endfor %}
</ul>
{% if served %}
<p>{{ served }}</p>
{% elif not evaluation.verdict.blessed %}
<p>Not served: the champion, if there is one, stays.</p>
{% endif %}
</div>
{% endif %}
{% if sweep %}
<div class="verdict blessed"><h2>Penalty chosen: {{ sweep.trials[sweep.winner] }}</h2><p>{{ sweep.reason }}</p></div>
{% endif %}

<dl class="tiles">
{% if evaluation %}
<div><dt>Test accuracy</dt><dd>{{ evaluation.accuracy|percent(2) }}<small>\
{% if evaluation.comparison %}champion {{ evaluation.comparison.accuracy|percent(2) }}\
{% else %}no champion to compare with{% endif %}</small></dd></div>
{% endif %}
{% if sweep %}
<div><dt>Validation accuracy</dt><dd>{{ sweep.trials[sweep.winner].metrics.val_accuracy|percent(2) }}\
<small>of the chosen penalty</small></dd></div>
{% endif %}
{% if records %}
<div><dt>Steps reused</dt><dd>{{ num_reused }} of {{ records|length }}<small>\
{{ "%.1f"|format(records|sum("seconds")) }} s in all steps</small></dd></div>
{% endif %}
</dl>

<section>
<h2>Steps</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Steps">
<table class="steps">
<thead><tr><th scope="col">Step</th><th scope="col">Outcome</th><th scope="col">Why</th>\
<th scope="col" class="number">Seconds</th><th scope="col" class="wide">Yielded</th></tr></thead>
<tbody>
{% for step in steps %}
<tr><th scope="row">{{ step.task.name }}</th>
<td><span class="outcome {{ step.outcome }}">{{ step.outcome }}</span></td>
<td class="why">{{ step.reason }}</td>
<td class="number">{% if step.seconds is not none %}{{ "%.1f"|format(step.seconds) }}{% endif %}</td>
<td class="wide"><code>{{ step.yielded }}</code></td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>

<section>
<h2>Parameters</h2>
{% if run.changed %}
<p class="note">Those that differ from the form's defaults.</p>
<table class="plain">
<thead><tr><th scope="col">Parameter</th><th scope="col">Default</th><th scope="col">This run</th></tr></thead>
<tbody>
{% for name, (default, value) in run.changed.items() %}
<tr><th scope="row"><code>{{ name }}</code></th><td>{{ show(default) }}</td><td>{{ show(value) }}</td></tr>
{% endfor %}
</tbody>
</table>
{% else %}
<p>All at the form's defaults.</p>
{% endif %}
</section>

{% if lineage %}
<section>
<h2>Lineage</h2>
<p class="note">Where the result comes from, back to the raw files. Each line is made from those that are further in \
below it.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Lineage">
<table class="lineage"><tbody>
{% for line in lineage %}
<tr><th scope="row" style="padding-left:{{ 8 + 22 * line.depth }}px">{{ line.name }}</th>
{% if line.bytes is defined %}
<td>{{ "{:,}".format(line.bytes) }} bytes, SHA-256</td><td><code>{{ line.digest }}</code></td></tr>
{% else %}
<td>{% if line.again %}see above{% elif line.made %}{{ line.made.component }}, {{ time(line.made.started_at) }}<br>\
<code>{{ line.made.run_id }}</code>{% else %}no record of its making{% endif %}</td>\
<td><code>{{ line.digest[:12] }}</code></td></tr>
{% endif %}
{% endfor %}
</tbody></table>
</div>
</section>
{% endif %}
{% for task, link, html in reports %}
<p class="alone"><a href="{{ link }}">The report of {{ task }} alone</a></p>
{% endfor %}
</main>
{% for task, link, html in reports %}
<div><template shadowrootmode="open">{{ html }}</template></div>
{% endfor %}
{% endblock %}
"""
