"""Approval of a push in Airflow: over REST and in the web interface."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from ridgeline.airflow.server import Standalone
from ridgeline.decisions import Decision, Decisions
from ridgeline.history import HistoryEntry
from ridgeline.settings import Settings

DAG = "fashion_mnist_training"
MODEL = "synthetic_garments"
PASS_TIME = "UPDATE task_instance SET trigger_timeout = '2026-01-01' WHERE state = 'awaiting_input'"


@pytest.fixture
def waiting(airflow: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """The id of a run that waits for approval; each has a reason of its own, so that it would be pushed again."""
    conf = {"export.approval": "always", "evaluate.force_blessing": f"for {request.node.name}"}
    run_id = airflow.trigger(DAG, conf)
    airflow.wait("the question", lambda: airflow.states(DAG, run_id).get("export") == "awaiting_input")
    yield run_id
    finish(airflow, run_id, "Reject", "the test has ended")  # the next run would wait for this one


def question(run_id: str) -> str:
    return f"/api/v2/dags/{DAG}/dagRuns/{run_id}/taskInstances/export/-1/hitlDetails"


def respond(airflow: Standalone, run_id: str, option: str, reason: str) -> int:
    return airflow.call("PATCH", question(run_id), {"chosen_options": [option], "params_input": {"reason": reason}})[0]


def finish(airflow: Any, run_id: str, option: str, reason: str) -> None:
    """Answer, also if Airflow asks again because the answer came before its scheduler noted that the task waits."""

    def has_ended() -> bool:
        asked = airflow.call("GET", question(run_id))[1]
        if not asked["response_received"] and asked["task_instance"]["state"] == "awaiting_input":
            time.sleep(3)
            respond(airflow, run_id, option, reason)
        return airflow.call("GET", f"/api/v2/dags/{DAG}/dagRuns/{run_id}")[1]["state"] == "success"

    airflow.wait("the run to succeed", has_ended)


def history(airflow: Any) -> list[HistoryEntry]:
    return Settings(store=airflow.store).open_registry().history(MODEL)


def decisions(airflow: Any, run_id: str) -> list[Decision]:
    found = Decisions(Settings(store=airflow.store).open_store()).all()
    return [decision for decision in reversed(found) if decision.run_id == run_id]


def test_a_model_that_an_assigned_user_approves_is_pushed_and_the_history_says_who_and_why(
    airflow: Any, waiting: str
) -> None:
    before = len(history(airflow))
    asked = airflow.call("GET", question(waiting))[1]
    assert asked["options"] == ["Approve", "Reject"]
    assert asked["defaults"] == ["Reject"]
    assert [user["id"] for user in asked["assigned_users"]] == ["admin"]
    assert "| Ankle boot | " in asked["body"]
    assert f"]({airflow.url}/dags/{DAG}/runs/" in asked["body"]

    other = Standalone(airflow.env, airflow.log_file, user="other")
    assert respond(other, waiting, "Approve", "I want it") == 403
    assert airflow.states(DAG, waiting)["export"] == "awaiting_input"
    assert len(history(airflow)) == before

    finish(airflow, waiting, "Approve", "figures look right")
    entries = history(airflow)
    assert len(entries) == before + 1
    assert (entries[-1].approved_by, entries[-1].approval) == ("admin", "figures look right")
    assert [decision.kind for decision in decisions(airflow, waiting)] == ["approval_asked", "approved", "pushed"]
    assert respond(airflow, waiting, "Reject", "too late") == 409


def test_a_model_that_nobody_approves_in_time_is_not_pushed(airflow: Any, waiting: str) -> None:
    before = history(airflow)
    with sqlite3.connect(airflow.home / "airflow.db", timeout=60) as database:  # the time limit passes
        done = database.execute(PASS_TIME)
        assert done.rowcount == 1
    database.close()
    assert airflow.wait_for_run(DAG, waiting, 120) == "success"
    assert history(airflow) == before
    last = decisions(airflow, waiting)[-1]
    assert (last.kind, last.reasons) == ("approval_expired", ("nobody answered within 12 hours",))


def test_a_person_rejects_a_model_in_the_web_interface(airflow: Any, waiting: str, page: Page) -> None:
    before = history(airflow)
    page.goto(f"/dags/{DAG}/runs/{waiting}/tasks/export/required_actions")
    expect(page.get_by_text("recall of the champion")).to_be_visible()
    page.locator("[id='element_reason']").fill("worse on shirts")
    page.get_by_role("button", name="Reject").click()
    finish(airflow, waiting, "Reject", "worse on shirts")
    assert history(airflow) == before
    last = decisions(airflow, waiting)[-1]
    assert (last.kind, last.answered_by, last.reasons) == ("rejected", "admin", ("worse on shirts",))
    page.goto(f"/dags/{DAG}/runs/{waiting}")
    page.get_by_role("tab", name="Report").or_(page.get_by_role("link", name="Report")).first.click()
    decision = page.frame_locator("iframe[title=Report]").get_by_role(
        "row", name="was rejected by admin, and not pushed"
    )
    expect(decision).to_contain_text("worse on shirts")
