"""The pipeline as a person uses it: Airflow's UI in Debian's Chromium. Screenshots are kept in test-output/.

It works on drawn images, in the Airflow that the other tests used; `make screenshots` gives it the official files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import FrameLocator, Page, expect

from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.settings import Settings

DAG = "fashion_mnist_training"
BAD = {"evaluate.min_accuracy": 1}  # no model is that good
SCREENSHOTS = Path(__file__).resolve().parents[2] / "test-output"
RUN_SECONDS = 600


def shoot(page: Page, name: str) -> None:
    page.screenshot(path=SCREENSHOTS / f"{name}.png", animations="disabled")


def open_form(page: Page, dag_id: str) -> None:
    page.goto(f"/dags/{dag_id}")
    page.get_by_role("button", name="Trigger").first.click()
    expect(page.get_by_role("dialog").get_by_text("Run Parameters")).to_be_visible()


def field(page: Page, name: str) -> Any:
    return page.locator(f"[id='element_{name}']")


def press_trigger(page: Page, dag_id: str) -> tuple[int, Any]:
    """Press the form's button, and return the status and the answer that the form gets."""
    with page.expect_response(lambda r: r.request.method == "POST" and r.url.endswith(f"/{dag_id}/dagRuns")) as answer:
        page.get_by_role("dialog").get_by_role("button", name="Trigger", exact=True).click()
    return answer.value.status, answer.value.json()


def watch(page: Page, dag_id: str, run_id: str, state: str = "Success") -> None:
    page.goto(f"/dags/{dag_id}/runs/{run_id}")
    expect(page.get_by_test_id("state-badge").first).to_have_text(state, timeout=1000 * RUN_SECONDS)


def report(page: Page) -> FrameLocator:
    page.get_by_role("tab", name="Report").or_(page.get_by_role("link", name="Report")).first.click()
    return page.frame_locator("iframe[title=Report]")


def evaluation(airflow: Any, run_id: str) -> ModelEvaluation:
    output = airflow.records(run_id)["evaluate"].output
    return Settings(store=airflow.store).open_store().open(output, ModelEvaluation)


def pushed_version(airflow: Any, run_id: str) -> int:
    registry = Settings(store=airflow.store).open_registry()
    return next(e.version for name in registry.model_names() for e in registry.history(name) if e.run_id == run_id)


def triggered(airflow: Any) -> list[str]:
    return [run["dag_run_id"] for run in airflow.runs(DAG) if run["run_type"] == "manual"]


# --- the form


def test_the_form_refuses_a_bad_value(page: Page, airflow: Any) -> None:
    before = triggered(airflow)
    open_form(page, DAG)
    field(page, "train.penalty.l1").fill("strong")
    status, answer = press_trigger(page, DAG)
    assert status == 400
    assert "train.penalty.l1" in json.dumps(answer)
    expect(page.get_by_text("Failed to Trigger Dag").first).to_be_visible()  # it is shown twice for a moment
    shoot(page, "refused")
    assert triggered(airflow) == before


# --- a run


@pytest.fixture(scope="module")
def with_l1(tab: Page, airflow: Any) -> str:
    """The id of a run with an L1 penalty, triggered by the form, which has ended."""
    open_form(tab, DAG)
    field(tab, "train.penalty.kind").click()
    tab.get_by_role("option", name="L1: zeros weights").click()
    field(tab, "train.penalty.l1").fill("1e-4")
    tab.get_by_text("Run Parameters").evaluate("heading => heading.scrollIntoView()")
    shoot(tab, "form")
    status, run = press_trigger(tab, DAG)
    assert status == 200, run
    tab.goto("about:blank")
    run_id: str = run["dag_run_id"]
    assert airflow.wait_for_run(DAG, run_id, RUN_SECONDS) == "success"
    watch(tab, DAG, run_id)
    shoot(tab, "run")
    tab.goto("about:blank")
    return run_id


def test_the_report_shows_the_artifact_s_figures(page: Page, airflow: Any, with_l1: str) -> None:
    facts = evaluation(airflow, with_l1).facts
    watch(page, DAG, with_l1)
    frame = report(page)
    expect(frame.get_by_role("heading", name="Blessed").first).to_be_visible()
    expect(frame.locator(".tiles div", has_text="Test accuracy").locator("dd")).to_contain_text(
        f"{100 * facts.accuracy:.2f} %"
    )
    for reason in facts.verdict.reasons:
        expect(frame.get_by_text(reason).first).to_be_visible()
    expect(frame.get_by_role("row", name="train.penalty.kind l2 l1")).to_be_visible()
    expect(frame.get_by_text(f"Pushed as version {pushed_version(airflow, with_l1)}")).to_be_visible()
    shoot(page, "report")


def test_the_evaluation_s_own_report_is_on_the_same_page(page: Page, airflow: Any, with_l1: str) -> None:
    facts = evaluation(airflow, with_l1).facts
    watch(page, DAG, with_l1)
    frame = report(page)
    heading = frame.get_by_role("heading", name="Confusion matrix")
    heading.scroll_into_view_if_needed()
    expect(heading).to_be_visible()
    cells = frame.locator(".matrix tbody tr").first.locator("td").all_inner_texts()
    assert [int(cell) for cell in cells] == list(facts.confusion_matrix[0])
    assert frame.locator(".matrix").evaluate("e => getComputedStyle(e).borderCollapse") == "collapse"
    shoot(page, "confusion-matrix")


def test_the_report_runs_no_script_and_loads_nothing(page: Page, with_l1: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    watch(page, DAG, with_l1)
    expect(report(page).get_by_role("heading", name="Lineage").first).to_be_visible()
    inside = [url for url in asked if "/ridgeline/" in url]
    assert len(set(inside)) == 1
    assert report(page).locator("script").count() == 0


@pytest.mark.parametrize("task", ["evaluate", "export"])
def test_tasks_link_to_the_report(page: Page, airflow: Any, with_l1: str, task: str) -> None:
    pushed = f"Pushed as version {pushed_version(airflow, with_l1)}"
    page.goto(f"/dags/{DAG}/runs/{with_l1}/tasks/{task}/details")
    page.get_by_role("link", name="Report", exact=True).click()
    expect(page.frame_locator("iframe[title=Report]").get_by_text(pushed)).to_be_visible()


# --- the gate


def test_a_bad_model_is_skipped_by_the_gate(page: Page, not_blessed: str) -> None:
    watch(page, DAG, not_blessed)
    frame = report(page)
    expect(frame.get_by_role("heading", name="Not blessed").first).to_be_visible()
    row = frame.get_by_role("row", name=re.compile("^export"))
    expect(row.get_by_text("skipped", exact=True)).to_be_visible()
    expect(row.get_by_text("not blessed: accuracy")).to_be_visible()
    shoot(page, "not-blessed")


# --- back


def test_a_person_rolls_back(page: Page, airflow: Any, with_l1: str) -> None:
    forced = airflow.trigger(DAG, {**BAD, "evaluate.force_blessing": "asked for by the shop"})
    assert airflow.wait_for_run(DAG, forced, RUN_SECONDS) == "success"
    registry = Settings(store=airflow.store).open_registry()
    name = evaluation(airflow, forced).facts.dataset.partition(":")[0]
    good, bad = pushed_version(airflow, with_l1), pushed_version(airflow, forced)
    assert registry.champion(name).version == bad

    open_form(page, "rollback_model")
    field(page, "model").fill(name)
    field(page, "reason").fill("worse on <photos> from phones")
    status, run = press_trigger(page, "rollback_model")
    assert status == 200, run
    watch(page, "rollback_model", run["dag_run_id"])
    expect(report(page).get_by_role("heading", name=f"Rolled back to version {good} of {name}")).to_be_visible()
    assert registry.champion(name).version == good

    page.goto("/")
    page.get_by_role("link", name="Models").click()
    frame = page.frame_locator("iframe[title=Models]")
    section = frame.locator("section").filter(has=page.get_by_role("heading", name=name, exact=True))
    expect(section.locator(".tiles div", has_text="Champion").first).to_contain_text(f"Version {good}")
    row = section.get_by_role("row", name=re.compile(f"rolled back to version {good}"))
    expect(row).to_contain_text("admin")
    expect(row).to_contain_text("worse on <photos> from phones")
    expect(section.get_by_role("row", name=f"pushed version {bad} by force")).to_contain_text("asked for by the shop")
    shoot(page, "models")

    rejected = section.get_by_role("row").filter(has=page.get_by_role("rowheader", name=str(bad), exact=True))
    rejected.get_by_role("link", name=f"version {good}", exact=True).click()
    expect(frame.get_by_role("heading", name="Comparison")).to_be_visible()
    expect(frame.get_by_role("row", name="train.penalty.kind l1 l2")).to_be_visible()
    expect(frame.get_by_role("heading", name="Only A is right")).to_be_visible()
    image = frame.get_by_role("img", name="Test image").first
    image.scroll_into_view_if_needed()
    assert image.evaluate("image => image.naturalWidth") > 0
    shoot(page, "comparison")
    frame.get_by_role("link", name="Models").click()
    section.get_by_role("link", name=forced).first.click()
    expect(frame.get_by_role("heading", name="Blessed by force").first).to_be_visible()

    page.goto("/")
    page.get_by_role("link", name="Models").click()
    section.get_by_role("row", name=re.compile(f"^{good}")).get_by_role("link", name="Model card").click()
    expect(frame.get_by_role("heading", name=f"Model card: {name}")).to_be_visible()
    expect(frame.get_by_role("heading", name="Intended Use")).to_be_visible()
