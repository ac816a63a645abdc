"""Unattended runs of the training DAG: scheduled, triggered by an asset, backfilled, late, and failed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ridgeline.registry import Registry
from ridgeline.settings import Settings

DAG = "fashion_mnist_training"
DEFAULTS = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1000}


@pytest.fixture(scope="module")
def messages() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook: its address for Apprise, and what it received."""
    received: list[dict[str, Any]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"json://127.0.0.1:{server.server_port}/hook", received
        server.shutdown()


@pytest.fixture(scope="module")
def scheduled(start_airflow: Any, tmp_path_factory: pytest.TempPathFactory, messages: Any) -> Iterator[Any]:
    settings = {
        "RIDGELINE_SCHEDULE": "* * * * *",
        "RIDGELINE_DEFAULTS": json.dumps(DEFAULTS),
        "RIDGELINE_DEADLINE_MINUTES": "0.05",
        "RIDGELINE_NOTIFY": messages[0],
    }
    with start_airflow(tmp_path_factory.mktemp("schedule"), **settings) as running:
        yield running


@pytest.fixture(scope="module")
def two_runs(scheduled: Any) -> list[dict[str, Any]]:
    """The first two scheduled runs."""

    def done() -> list[dict[str, Any]]:
        runs = [run for run in scheduled.runs(DAG) if run["run_type"] == "scheduled" and run["end_date"]]
        return runs if len(runs) >= 2 else []

    runs = scheduled.wait("two scheduled runs", done, 400)[:2]
    assert scheduled.call("PATCH", f"/api/v2/dags/{DAG}", {"is_paused": True})[0] == 200
    return runs


def records(scheduled: Any, run_id: str) -> dict[str, Any]:
    executions = Settings(store=scheduled.store).open_store().executions()
    return {execution.component: execution for execution in executions if execution.run_id == run_id}


def test_the_schedule_starts_runs_and_the_second_reuses_everything(scheduled: Any, two_runs: Any) -> None:
    first, second = two_runs
    assert (first["state"], second["state"]) == ("success", "success")
    assert {e.state for e in records(scheduled, first["dag_run_id"]).values()} == {"complete"}
    reused = records(scheduled, second["dag_run_id"])
    assert [e.state for e in reused.values()] == ["cached"] * 5
    assert {e.reason for e in reused.values()} == {"same inputs, parameters and code"}


def test_the_pool_of_the_tasks_exists_before_the_first_run(scheduled: Any) -> None:
    status, pool = scheduled.call("GET", "/api/v2/pools/tensorflow")
    assert (status, pool["slots"]) == (200, 2)


def test_an_unchanged_run_says_so_and_serves_no_second_version(scheduled: Any, two_runs: Any) -> None:
    log = scheduled.log(DAG, two_runs[1]["dag_run_id"], "export")
    assert "nothing changed: every step was reused" in log
    history = Registry(Settings(store=scheduled.store).serving_dir()).history("synthetic_garments")
    assert [(entry.version, entry.run_id) for entry in history] == [(1, two_runs[0]["dag_run_id"])]


def test_the_log_of_training_has_no_noise(scheduled: Any, two_runs: Any) -> None:
    log = scheduled.log(DAG, two_runs[0]["dag_run_id"], "train")
    assert "epoch 2/2" in log
    assert "absl" not in log
    assert "I0000" not in log


def test_a_late_run_is_reported(messages: Any, scheduled: Any, two_runs: Any) -> None:
    late = scheduled.wait("the message", lambda: [m for m in messages[1] if "late" in m["title"]], 60)
    assert late[0]["title"] == f"{DAG} is late"
    assert late[0]["message"].startswith(f"Run {two_runs[0]['dag_run_id']} has not succeeded by its deadline, ")
    assert f"{DAG} is late. Run {two_runs[0]['dag_run_id']}" in scheduled.log_file.read_text()


def test_a_failure_is_reported_with_the_field_at_fault(messages: Any, scheduled: Any, two_runs: Any) -> None:
    assert scheduled.call("PATCH", f"/api/v2/dags/{DAG}", {"is_paused": False})[0] == 200
    run = scheduled.trigger(DAG, {"train.penalty.l1": "1e-3"})
    assert scheduled.wait_for_run(DAG, run, 120) == "failed"
    states = scheduled.states(DAG, run)
    assert states == dict.fromkeys(states, "upstream_failed") | {"ingest": "failed"}
    failures = scheduled.wait("the message", lambda: [m for m in messages[1] if "failed" in m["title"]], 30)
    assert failures[0]["title"] == f"{DAG} failed at ingest"
    assert "train.penalty.l1: expected 0 or the default 0.0001 with kind='l2'" in failures[0]["message"]
    assert f"{DAG} failed at ingest. Run {run}, try 1" in scheduled.log(DAG, run, "ingest")
    assert records(scheduled, run) == {}


def test_the_asset_of_the_source_starts_a_run(scheduled: Any, two_runs: Any) -> None:
    status, found = scheduled.call("GET", "/api/v2/assets?name_pattern=fashion_mnist_source")
    assert status == 200, found
    body = {"asset_id": found["assets"][0]["id"], "extra": {"files": "new"}}
    assert scheduled.call("POST", "/api/v2/assets/events", body)[0] == 200

    def triggered() -> list[Any]:
        return [r for r in scheduled.runs(DAG) if r["run_type"] == "asset_triggered" and r["state"] == "success"]

    assert scheduled.wait("the asset's run", triggered, 120)


def test_the_asset_events_describe_the_artifacts(scheduled: Any, two_runs: Any) -> None:
    status, found = scheduled.call("GET", f"/api/v2/assets/events?source_dag_id={DAG}&limit=100")
    assert status == 200, found
    first = {e["name"]: e["extra"] for e in found["asset_events"] if e["source_run_id"] == two_runs[0]["dag_run_id"]}
    assert set(first) == {f"fashion_mnist_{name}" for name in ("dataset", "examples", "model", "pushed_model")}
    assert first["fashion_mnist_model"]["artifact"].startswith("Model/")
    assert first["fashion_mnist_model"]["val_accuracy"] > 0.3
    pushed = first["fashion_mnist_pushed_model"]
    assert (pushed["served_version"], pushed["pushed"], pushed["state"]) == (1, True, "complete")


def test_a_range_of_dates_is_backfilled(scheduled: Any, two_runs: Any) -> None:
    body = {
        "dag_id": DAG,
        "from_date": "2026-03-01T00:00:00Z",
        "to_date": "2026-03-01T00:01:00Z",
        "max_active_runs": 1,
        "reprocess_behavior": "none",
        "run_backwards": False,
        "dag_run_conf": {},
    }
    # SQLite is locked at times.
    scheduled.wait("the backfill to start", lambda: scheduled.call("POST", "/api/v2/backfills", body)[0] == 200, 60)

    def done() -> list[Any]:
        runs = [run for run in scheduled.runs(DAG) if run["run_type"] == "backfill"]
        return runs if len(runs) == 2 and all(run["state"] == "success" for run in runs) else []

    runs = scheduled.wait("the backfill", done, 180)
    assert [run["logical_date"] for run in runs] == ["2026-03-01T00:00:00Z", "2026-03-01T00:01:00Z"]
