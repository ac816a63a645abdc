from __future__ import annotations

import html
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ridgeline import pipeline
from ridgeline.airflow.plugin.run_page import Run, Task, find_steps, render, reported
from ridgeline.artifacts.base import Artifact, ArtifactError, Facts
from ridgeline.artifacts.example_anomalies import ExampleAnomalies, Finding
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.decisions import Decision, Decisions
from ridgeline.files import sign
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store

STEPS = ("ingest", "transform", "statistics", "schema", "validate", "train", "evaluate", "label_errors", "export")
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1_000}
Synthetic = tuple[Settings, list[Execution]]


def run_of(synthetic: Synthetic, run_id: str = "synthetic", state: str = "success", **states: str) -> Run:
    """The fixture's run as Airflow would know it, had it run it."""
    tasks = []
    for execution in synthetic[1]:
        start = execution.started_at - timedelta(milliseconds=1)
        end = execution.started_at + timedelta(seconds=execution.seconds)
        tasks.append(Task(execution.component, states.get(execution.component, "success"), start, end))
    first, last = tasks[0].started_at, tasks[-1].ended_at
    return Run("fashion_mnist_training", run_id, state, first, last, "", {}, tuple(tasks))


def body(page: str) -> str:
    """The text of the page before the embedded reports."""
    return page[page.index("<body>") : page.index("<template")] if "<template" in page else page[page.index("<body>") :]


def rows(page: str) -> dict[str, list[str]]:
    """The cells of the table of steps, by step."""
    found = re.findall(r'<tr><th scope="row">(\w+)</th>\s*(<td><span class="outcome.*?)</tr>', page, re.DOTALL)
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", rest, re.DOTALL) for name, rest in found}
    return {name: [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in found] for name, found in cells.items()}


@pytest.fixture
def copy(synthetic: Synthetic, tmp_path: Path) -> Settings:
    """A copy of the synthetic store, to be written to."""
    shutil.copytree(synthetic[0].store, tmp_path / "store")
    return Settings(store=str(tmp_path / "store"), manual_dir=None)


# --- what is shown


def test_it_shows_each_step_and_why_it_ran(synthetic: Synthetic) -> None:
    shown = rows(render(synthetic[0], run_of(synthetic)))
    assert list(shown) == list(STEPS)
    assert [cells[0] for cells in shown.values()] == ["ran"] * len(STEPS)
    assert shown["train"][1] == "first run of train"
    assert float(shown["train"][2]) == pytest.approx(synthetic[1][STEPS.index("train")].seconds, abs=0.05)
    assert shown["evaluate"][3].startswith("ModelEvaluation/")


def test_it_shows_the_verdict_the_figures_and_what_is_served(synthetic: Synthetic, refs: dict[str, str]) -> None:
    facts = synthetic[0].open_store().open(refs["evaluate"], ModelEvaluation).facts
    page = body(render(synthetic[0], run_of(synthetic)))
    assert "Blessed</h2>" in page
    for reason in facts.verdict.reasons:
        assert html.escape(reason) in page
    assert f"<dd>{100 * facts.accuracy:.2f} %" in page
    assert "Pushed as version 1 of synthetic_garments. It is the champion." in page
    assert re.search(r"Exported model: [\d,]+ weights, [\d.]+ MiB, [\d,]+ multiply-adds an image\.", page)
    assert "SYNTHETIC" in page


def test_it_shows_what_was_decided_and_who_knows(copy: Settings, synthetic: Synthetic) -> None:
    def shown(settings: Settings) -> str:
        page = body(render(settings, run_of(synthetic)))
        return page[page.index("<h2>Decisions</h2>") : page.index("<h2>Parameters</h2>")]

    assert "synthetic_garments: version 1 was pushed" in shown(copy)
    assert "0.75 (min_accuracy)" in shown(copy)
    assert "no recipients" in shown(copy)
    told = copy.model_copy(update={"notify": SecretStr("json://127.0.0.1:1")})
    assert "not delivered" in shown(told)
    (decision,) = Decisions(copy.open_store()).all()
    path = next((Path(copy.store) / "decisions").glob("*/*"))
    path.write_text(sign(decision.model_copy(update={"delivered": ("a" * 16, "b" * 16)}).model_dump_json()))
    assert "delivered to 2 recipients" in shown(told)


def test_it_shows_the_lineage_back_to_the_dataset(synthetic: Synthetic, refs: dict[str, str]) -> None:
    page = body(render(synthetic[0], run_of(synthetic)))
    lineage = page[page.index("<h2>Lineage</h2>") :]
    for ref in (ref for step, ref in refs.items() if step not in ("statistics", "schema", "validate", "label_errors")):
        assert ref.split("/")[1][:12] in lineage


def test_it_embeds_the_evaluation_s_own_report(synthetic: Synthetic, refs: dict[str, str]) -> None:
    report = synthetic[0].open_store().open(refs["evaluate"], ModelEvaluation).report.read_text(encoding="utf-8")
    page = render(synthetic[0], run_of(synthetic))
    assert f'<template shadowrootmode="open">{report}</template>' in page
    assert '<a href="synthetic/reports/evaluate">' in page


def test_it_shows_the_changed_parameters(synthetic: Synthetic) -> None:
    run = run_of(synthetic)
    changed = {"train.penalty.kind": ("l2", "l1"), "train.mlp.hidden_units": ([100], [64, 32])}
    page = body(render(synthetic[0], replace(run, changed=changed)))
    assert "train.penalty.kind</code></th><td>l2</td><td>l1</td>" in page
    assert "<td>[64, 32]</td>" in page


def test_it_links_to_the_comparison_with_the_champion(two_versions: Settings, synthetic: Synthetic) -> None:
    store = two_versions.open_store()
    for run_id, words in (("synthetic", "version 2, the champion"), ("second", "version 1")):
        records = [r for step in STEPS for r in list(store.executions(step, run_id=run_id))[:1]]
        output = next(record.output for record in records if record.component == "evaluate") or ""
        page = body(render(two_versions, run_of((two_versions, records), run_id)))
        version = words.split(",")[0].split()[1]
        link = f"../../../compare?a=synthetic_garments%2F{version}&amp;b={output.replace('/', '%2F')}"
        assert f'<a href="{link}">Compare with {words}</a>' in page
    assert "Compare with" not in render(synthetic[0], run_of(synthetic))  # there is no other version


def with_data(copy: Settings, synthetic: Synthetic, accepted: str | None, *findings: Finding) -> Run:
    """The fixture's run, in which the checks of the data found something else."""
    store = copy.open_store()
    record = next(record for record in synthetic[1] if record.component == "validate")
    counts = [sum(finding.severity == severity for finding in findings) for severity in ("error", "warning")]
    facts = store.open(record.output or "", ExampleAnomalies).facts.model_copy(
        update={"findings": findings, "num_errors": counts[0], "num_warnings": counts[1], "accepted": accepted}
    )
    with store.stage() as folder:
        (folder / "report.html").write_text("<p>findings</p>")
        ref = store.publish(ExampleAnomalies.seal(folder, facts))
    store.record(record.model_copy(update={"output": ref, "started_at": record.started_at + timedelta(milliseconds=1)}))
    return run_of(synthetic)


def test_what_the_checks_of_the_data_found_is_at_the_top(copy: Settings, synthetic: Synthetic) -> None:
    page = render(copy, with_data(copy, synthetic, None))
    assert '<dd>No findings<small><a href="#report-validate">' in page
    assert '<div id="report-validate"><template shadowrootmode="open"><p>findings</p>' in page
    values = {"value": 3.0, "threshold": 2.0, "advice": "Look."}
    few = Finding(check="few", severity="warning", message="3 images of <hats>", **values)
    leak = Finding(check="leak", severity="error", message="9 test images in train", **values)
    run = with_data(
        copy, synthetic, None, few, few.model_copy(update={"severity": "info", "message": "for the record"})
    )
    page = body(render(copy, run))
    assert "<h2>Data: 1 warning</h2>\n<ul>\n<li>3 images of &lt;hats&gt;</li>\n</ul>" in page
    page = body(render(copy, with_data(copy, synthetic, "known", leak, few, few)))
    assert "<h2>Data: 1 error, 2 warnings</h2>" in page
    assert "Errors accepted: known" in page


def test_the_lineage_ends_at_the_fingerprint_of_the_source(copy: Settings, synthetic: Synthetic) -> None:
    record = synthetic[1][0]
    parts = record.parts.model_copy(update={"sources": {"image_dir": "5" * 64}})
    shutil.rmtree(Path(copy.store) / "executions" / "ingest")
    copy.open_store().record(record.model_copy(update={"parts": parts}))
    page = body(render(copy, run_of(synthetic)))
    row = next(row for row in page.split("<tr>") if ">image_dir</th>" in row)
    assert "names and content of the files, SHA-256" in row
    assert "5" * 64 in row


def test_texts_of_users_are_escaped(synthetic: Synthetic) -> None:
    evil = "<script>alert(1)</script>"
    run = Run(
        **{**vars(run_of(synthetic)), "run_id": evil, "dag_id": evil, "note": evil, "changed": {evil: (evil, evil)}}
    )
    page = render(synthetic[0], run)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_sweep_s_choice_and_report_are_shown(copy: Settings) -> None:
    steps = pipeline.plan("select")
    values = SYNTHETIC | {"sweep.l1": [0.001], "sweep.l2": [0.01], "sweep.train.epochs": 1}
    params = pipeline.parse_params(steps, values, copy)
    results = [result.execution for result in pipeline.run(copy, steps, params, "path")]
    run = replace(run_of((copy, results), "path"), dag_id="regularization_path")
    page = render(copy, run)
    facts = copy.open_store().open(results[-1].output or "", SweepResult).facts
    assert f"<h2>Penalty chosen: {facts.trials[facts.winner]}</h2>" in page
    assert html.escape(facts.reason) in body(page)
    assert "What each penalty does to the weights" in page
    assert isinstance(reported(copy.open_store(), run, "select"), SweepResult)


class CountsFacts(Facts):
    """Facts that say nothing about drawn images."""

    count: int


class Counts(Artifact[CountsFacts]):
    """An artifact of a step that a user added."""

    facts_type = CountsFacts
    report_name = "report.html"


def test_the_report_of_a_step_that_a_user_added_is_shown(
    copy: Settings, synthetic: Synthetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = pipeline.output_types()
    monkeypatch.setattr("ridgeline.airflow.plugin.run_page.output_types", lambda: {**types, "Counts": Counts})
    store, now = copy.open_store(), datetime.now(UTC)
    with store.stage() as folder:
        (folder / "report.html").write_text("<p>A count of 3</p>")
        ref = store.publish(Counts.seal(folder, CountsFacts(count=3)))
    values = {"component": "count", "run_id": "counted", "output": ref, "started_at": now}
    store.record(synthetic[1][0].model_copy(update=values))
    run = Run("counting", "counted", "success", now, now, "", {}, (Task("count", "success", now, now),))
    assert "<p>A count of 3</p>" in render(copy, run)


# --- what became of the run


def reused_run(copy: Settings, synthetic: Synthetic) -> Run:
    """A later run, which reused every step."""
    store, now = copy.open_store(), datetime.now(UTC)
    tasks = []
    for execution in synthetic[1]:
        values = {"run_id": "again", "state": "cached", "reason": "same inputs", "started_at": now, "seconds": 0.1}
        store.record(execution.model_copy(update=values))
        tasks.append(Task(execution.component, "success", now, now))
    return Run("fashion_mnist_training", "again", "success", now, now, "", {}, tuple(tasks))


def test_a_reused_run_says_that_nothing_changed(copy: Settings, synthetic: Synthetic) -> None:
    page = body(render(copy, reused_run(copy, synthetic)))
    assert "<h2>Nothing changed</h2>" in page
    assert f"{len(STEPS)} of {len(STEPS)}" in page
    assert "Nothing was pushed: version 1 of synthetic_garments holds this model. It is the champion." in page
    assert "Nothing changed" not in render(copy, run_of(synthetic))


@pytest.mark.parametrize(
    ("kinds", "unchanged"),
    [
        (["approval_asked", "approved", "pushed"], False),
        (["canary"], False),
        (["approval_asked", "rejected"], True),
        (["not_pushed"], True),
    ],
)
def test_a_reused_run_that_changed_what_is_served_does_not_say_that_nothing_changed(
    copy: Settings, synthetic: Synthetic, kinds: list[Any], unchanged: bool
) -> None:
    run = reused_run(copy, synthetic)
    for kind in kinds:
        Decisions(copy.open_store()).add(Decision(kind=kind, model="m", subject="s", title=kind, run_id="again"))
    assert ("<h2>Nothing changed</h2>" in body(render(copy, run))) == unchanged


@pytest.mark.parametrize(
    ("kinds", "state", "text"),
    [
        (["approval_asked"], "awaiting_input", "Exported, but not pushed: it waits for approval."),
        (["approval_asked"], "failed", "Exported, but not pushed."),  # the push failed
        (["approval_asked", "rejected"], "success", "Exported, but not pushed: rejected by ann on "),
        (["approval_asked", "approval_expired"], "success", "Exported, but not pushed: not approved in time on "),
        ([], "failed", "Exported, but not pushed."),
    ],
)
def test_it_says_what_an_exported_model_waits_for_or_why_it_is_not_pushed_beside_a_champion(
    copy: Settings, synthetic: Synthetic, refs: dict[str, str], kinds: list[Any], state: str, text: str
) -> None:
    store, registry = copy.open_store(), copy.open_registry()
    model = store.open(refs["export"], PushedModel)
    with store.stage() as folder:  # trained since, and judged against the champion
        shutil.copytree(model.path, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        facts = model.facts.model_copy(update={"model_digest": "c" * 64, "champion": model.facts.model_digest})
        (folder / "saved_model" / "other.txt").write_text("other")
        later = store.open(store.publish(PushedModel.seal(folder, facts)), PushedModel)
    assert registry.decide_push(later).push
    export = synthetic[1][-1]
    at = export.started_at + timedelta(microseconds=1)
    store.record(export.model_copy(update={"output": later.ref, "started_at": at}))
    subject = f"{later.ref} in synthetic"
    for kind in kinds:
        by = {"answered_by": "ann"} if kind == "rejected" else {}
        given = {"kind": kind, "model": model.facts.model_name, "subject": subject, "title": kind, **by}
        given["model_digest"] = "c" * 64
        Decisions(store).add(Decision(run_id="synthetic", **given))
    waits = state == "awaiting_input"
    page = body(render(copy, run_of(synthetic, state="running" if waits else state, export=state)))
    assert f"<p>{text}" in page
    if "rejected" in kinds:  # the page keeps the answer of its run, whatever happens later
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ridgeline.registry.check", lambda *_: None)
            registry.push(later, "later", "ann")
        assert f"<p>{text}" in body(render(copy, run_of(synthetic, state=state, export=state)))
    assert rows(page)["export"][0] == {"awaiting_input": "waiting for approval", "success": "ran"}.get(state, state)


def test_it_says_why_an_exported_model_is_not_served(copy: Settings, synthetic: Synthetic) -> None:
    history = copy.serving_dir() / "synthetic_garments" / "history.jsonl"
    push = copy.open_registry().history("synthetic_garments")[0]
    history.write_text(push.model_copy(update={"model_digest": "1" * 64, "computes": ""}).model_dump_json() + "\n")
    page = render(copy, run_of(synthetic))
    assert "Exported, but not pushed: this model was judged without a champion, but the champion is model 1111" in page


def test_it_says_why_a_blessed_model_is_not_exported(copy: Settings, synthetic: Synthetic) -> None:
    record = synthetic[1][-1]
    later = record.started_at + timedelta(microseconds=1)
    skipped = {"state": "skipped", "reason": "too large: 2 MiB > 1 MiB", "output": None, "started_at": later}
    copy.open_store().record(record.model_copy(update=skipped))
    page = body(render(copy, run_of(synthetic)))
    assert "Blessed</h2>" in page
    assert "<p>Not served, too large: 2 MiB &gt; 1 MiB. There is no champion.</p>" in page


def test_a_rollback_says_what_it_did(copy: Settings) -> None:
    history = copy.serving_dir() / "synthetic_garments" / "history.jsonl"
    push = copy.open_registry().history("synthetic_garments")[0]
    now = datetime.now(UTC)
    made = {"action": "rollback", "run_id": "back", "reason": "worse on <phones>", "by": "ann", "at": now}
    history.write_text(history.read_text() + push.model_copy(update=made).model_dump_json() + "\n")
    tasks = (Task("rollback", "success", now, now),)
    page = render(copy, Run("rollback_model", "back", "success", now, now, "", {}, tasks))
    assert "<h2>Rolled back to version 1 of synthetic_garments</h2>" in page
    assert "worse on &lt;phones&gt; (ann)" in page
    earlier = Run("rollback_model", "back", "success", now + timedelta(days=1), None, "", {}, tasks)
    assert "Rolled back" not in render(copy, earlier)


def test_a_run_in_progress_shows_what_has_ended(synthetic: Synthetic) -> None:
    run = run_of(synthetic, state="running", train="running", evaluate="None", label_errors="None", export="None")
    page = render(synthetic[0], run)
    assert "Running: train." in page
    assert [cells[0] for cells in rows(page).values()] == ["ran"] * 5 + ["running", *["waiting"] * 3]
    assert "Blessed" not in page


def test_a_failed_run_shows_the_step_and_the_error(copy: Settings, synthetic: Synthetic) -> None:
    record = synthetic[1][STEPS.index("train")]
    later = record.started_at + timedelta(hours=1)
    failed = {"state": "failed", "reason": "FloatingPointError: <loss> is NaN", "started_at": later, "output": None}
    copy.open_store().record(record.model_copy(update=failed))
    run = run_of(
        synthetic,
        state="failed",
        train="failed",
        evaluate="upstream_failed",
        label_errors="upstream_failed",
        export="upstream_failed",
    )
    tasks = tuple(Task(t.name, t.state, later, later) if t.name == "train" else t for t in run.tasks)
    page = render(copy, replace(run, tasks=tasks))
    assert "Failed: train</h2>" in page
    assert "FloatingPointError: &lt;loss&gt; is NaN" in page
    assert [cells[0] for cells in rows(page).values()] == ["ran"] * 5 + ["failed", *["not run"] * 3]


def test_a_task_that_failed_without_a_record_points_to_its_log(synthetic: Synthetic) -> None:
    run = run_of(synthetic, "unknown", state="failed", ingest="failed")
    assert rows(render(synthetic[0], run))["ingest"][:2] == ["failed", "The error is in the task's log."]


def test_a_run_that_exceeded_its_time_limit_says_so(synthetic: Synthetic) -> None:
    run = run_of(synthetic, state="failed", train="skipped", evaluate="skipped", export="skipped")
    assert "The run exceeded its time limit, or a user ended it." in body(render(synthetic[0], run))


def test_another_dag_s_run_has_nothing_to_show(synthetic: Synthetic) -> None:
    now = datetime.now(UTC)
    run = Run("other", "synthetic", "success", now, now, "", {}, (Task("extract", "success", now, now),))
    page = render(synthetic[0], run)
    assert "Nothing to show" in page
    assert "Lineage" not in page


def test_an_empty_store_is_left_as_it_is(synthetic: Synthetic, tmp_path: Path) -> None:
    page = render(Settings(store=str(tmp_path / "store"), manual_dir=None), run_of(synthetic))
    assert "Nothing to show" in page
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_artifact_is_said_to_be_damaged_and_the_rest_is_shown(
    copy: Settings, synthetic: Synthetic, refs: dict[str, str]
) -> None:
    report = copy.open_store().path(refs["evaluate"]) / "report.html"
    report.write_text(report.read_text() + "<script>")
    run = run_of(synthetic)
    page = render(copy, run)
    assert "evaluate: Expected" in page
    assert "missing, changed or extra" in page
    assert "<script>" not in page
    assert rows(page)["evaluate"][0] == "ran"
    with pytest.raises(ArtifactError):
        reported(copy.open_store(), run, "evaluate")


# --- whose records


def test_a_run_of_the_same_name_in_another_dag_shows_none_of_this_one_s(synthetic: Synthetic) -> None:
    store, run = Store(synthetic[0].store), run_of(synthetic)
    assert all(step.record for step in find_steps(store, run))
    later = tuple(
        Task(t.name, t.state, t.started_at + timedelta(days=1), t.ended_at + timedelta(days=1))  # type: ignore[operator, arg-type]
        for t in run.tasks
    )
    earlier = tuple(Task(t.name, t.state, datetime(2020, 1, 1, tzinfo=UTC), t.started_at) for t in run.tasks)
    for tasks in (later, earlier):
        other = replace(run, dag_id="other", tasks=tasks)
        assert not any(step.record for step in find_steps(store, other))
        assert reported(store, other, "evaluate") is None


def test_only_an_artifact_with_a_report_is_reported(synthetic: Synthetic) -> None:
    store, run = Store(synthetic[0].store), run_of(synthetic)
    assert isinstance(reported(store, run, "evaluate"), ModelEvaluation)
    for task in ("train", "export", "../evaluate", "*"):
        assert reported(store, run, task) is None


# --- what a text can't do


class Elements(HTMLParser):
    """The elements of a page and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(name for name, _ in attrs)}


def elements(page: str) -> set[str]:
    parser = Elements()
    parser.feed(page)
    return parser.found


def evil(place: str) -> str:
    """A text that would add an element and an attribute to the page wherever it was not escaped."""
    return f'''"'><evil onevil="{place}"></evil><script>{place}</script>'''


@pytest.mark.parametrize("state", ["complete", "cached", "skipped", "failed"])
def test_no_text_of_a_step_a_run_or_a_user_becomes_a_part_of_the_page(
    copy: Settings, synthetic: Synthetic, state: str
) -> None:
    record = synthetic[1][STEPS.index("train")]
    later = record.started_at + timedelta(hours=1)
    values = {"state": state, "reason": evil("reason"), "started_at": later, "host": evil("host")}
    values |= {"run_id": evil("run"), "output": record.output if state in ("complete", "cached") else None}
    copy.open_store().record(record.model_copy(update=values))
    task_state = {"failed": "failed", "skipped": "skipped"}.get(state, "success")
    tasks = (Task("train", task_state, later, later), Task(evil("task"), "skipped", later, later, evil("why")))
    changed = {evil("name"): (evil("default"), [evil("value")])}
    run = Run(evil("dag"), evil("run"), task_state, later, later, evil("note"), changed, tasks)
    page = render(copy, run)
    found = elements(page)
    assert not {"evil", "onevil", "script"} & found
    plain = html.unescape(page)
    # as the lineage goes by artifact, it names the newest record that made the model
    for place in ("reason", "run", "dag", "task", "why", "note", "name", "default"):
        assert evil(place) in plain, place
    cells = re.findall(r'<td class="why">(.*?)</td>', page, re.DOTALL)
    assert [html.unescape(cell) for cell in cells] == [evil("reason"), evil("why")]


def test_no_text_of_a_rollback_becomes_a_part_of_the_page(copy: Settings) -> None:
    history = copy.serving_dir() / "synthetic_garments" / "history.jsonl"
    push, now = copy.open_registry().history("synthetic_garments")[0], datetime.now(UTC)
    made = {"action": "rollback", "run_id": evil("run"), "reason": evil("reason"), "by": evil("by"), "at": now}
    history.write_text(history.read_text() + push.model_copy(update=made).model_dump_json() + "\n")
    tasks = (Task("rollback", "success", now, now),)
    page = render(copy, Run("rollback_model", evil("run"), "success", now, now, "", {}, tasks))
    assert not {"evil", "onevil", "script"} & elements(page)
    for place in ("run", "reason", "by"):
        assert evil(place) in html.unescape(page), place
