"""Unattended runs of the training DAG: scheduled, triggered by an asset, backfilled, late, and failed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from ridgeline.registry import Registry
from ridgeline.settings import Settings

DAG = "fashion_mnist_training"


def scheduled(airflow: Any, count: int) -> list[dict[str, Any]]:
    """Wait for the first scheduled runs, and return them."""

    def done() -> list[dict[str, Any]]:
        runs = [run for run in airflow.runs(DAG) if run["run_type"] == "scheduled" and run["end_date"]]
        return runs if len(runs) >= count else []

    return airflow.wait("the scheduled runs", done, 400)[:count]


@pytest.fixture(scope="module")
def first_run(airflow: Any) -> dict[str, Any]:
    """The first scheduled run. The tests that need no second one come first: its time may not have come yet."""
    return scheduled(airflow, 1)[0]


@pytest.fixture(scope="module")
def two_runs(airflow: Any) -> list[dict[str, Any]]:
    """The first two scheduled runs."""
    return scheduled(airflow, 2)


def test_the_pool_of_the_tasks_exists_before_the_first_run(airflow: Any) -> None:
    status, pool = airflow.call("GET", "/api/v2/pools/tensorflow")
    assert (status, pool["slots"]) == (200, 2)


def test_the_log_of_training_has_no_noise(airflow: Any, first_run: Any) -> None:
    log = airflow.log(DAG, first_run["dag_run_id"], "train")
    assert "epoch 2/2" in log
    assert "absl" not in log
    assert "I0000" not in log


def test_a_late_run_is_reported(airflow: Any, first_run: Any) -> None:
    late = airflow.wait("the message", lambda: [m for m in airflow.messages if "late" in m["title"]], 60)
    assert late[0]["title"] == f"{DAG} is late"
    assert late[0]["message"].startswith(f"Run {first_run['dag_run_id']} has not succeeded by its deadline, ")
    assert f"{DAG} is late. Run {first_run['dag_run_id']}" in airflow.log_file.read_text()


@pytest.fixture(scope="module")
def failed_run(airflow: Any, first_run: Any) -> str:
    """The id of a run with a bad parameter."""
    run: str = airflow.trigger(DAG, {"train.penalty.l1": "1e-3"})
    assert airflow.wait_for_run(DAG, run, 120) == "failed"
    return run


def test_a_failure_is_reported_with_the_field_at_fault(airflow: Any, failed_run: str) -> None:
    states = airflow.states(DAG, failed_run)
    assert states == dict.fromkeys(states, "upstream_failed") | {"ingest": "failed"}

    def messages() -> list[dict[str, Any]]:
        return [m for m in airflow.messages if failed_run in m["message"] and "failed" in m["title"]]

    failure = airflow.wait("the message", messages, 30)[0]
    assert failure["title"] == f"{DAG} failed at ingest"
    assert "train.penalty.l1: expected 0 or the default 0.0001 with kind='l2'" in failure["message"]
    assert f"{DAG} failed at ingest. Run {failed_run}, try 1" in airflow.log(DAG, failed_run, "ingest")
    assert airflow.records(failed_run) == {}


def test_the_schedule_starts_runs_and_the_second_reuses_everything(airflow: Any, two_runs: Any) -> None:
    first, second = two_runs
    assert (first["state"], second["state"]) == ("success", "success")
    states = airflow.states(DAG, first["dag_run_id"])
    assert states == dict.fromkeys(states, "success") | dict.fromkeys(("sweep", "select"), "skipped")
    assert [e.state for e in airflow.records(first["dag_run_id"]).values()] == ["complete"] * 9
    reused = airflow.records(second["dag_run_id"])
    assert [e.state for e in reused.values()] == ["cached"] * 9
    assert {e.reason for e in reused.values()} == {"same inputs, parameters and code"}


def test_an_unchanged_run_says_so_and_serves_no_second_version(airflow: Any, two_runs: Any) -> None:
    log = airflow.log(DAG, two_runs[1]["dag_run_id"], "export")
    assert "nothing changed: every step was reused" in log
    registry = Registry(Settings(store=airflow.store).serving_dir())
    history = registry.history("synthetic_garments")
    assert [(entry.version, entry.run_id) for entry in history] == [(1, two_runs[0]["dag_run_id"])]
    assert (registry.root / "synthetic_garments" / "1" / "saved_model.pb").is_file()


def test_the_asset_events_describe_the_artifacts(airflow: Any, two_runs: Any) -> None:
    status, found = airflow.call("GET", f"/api/v2/assets/events?source_dag_id={DAG}&limit=100")
    assert status == 200, found
    first = {e["name"]: e["extra"] for e in found["asset_events"] if e["source_run_id"] == two_runs[0]["dag_run_id"]}
    pushed_model = "synthetic_garments_pushed_model"  # named after the model
    assert set(first) == {f"fashion_mnist_{name}" for name in ("dataset", "examples", "model")} | {pushed_model}
    assert first["fashion_mnist_model"]["artifact"].startswith("Model/")
    assert first["fashion_mnist_model"]["val_accuracy"] > 0.3
    pushed = first[pushed_model]
    assert (pushed["served_version"], pushed["pushed"], pushed["state"]) == (1, True, "complete")
    second = {e["name"] for e in found["asset_events"] if e["source_run_id"] == two_runs[1]["dag_run_id"]}
    assert second == first.keys() - {pushed_model}  # it pushed nothing


def test_messages_reach_the_recipient_of_a_connection_in_the_database(
    airflow: Any, failed_run: str, two_runs: Any
) -> None:
    def titles(run: str) -> set[str]:
        return {m["title"] for m in airflow.messages_by_connection if run in m["message"]}

    airflow.wait("the message of the task", lambda: f"{DAG} failed at ingest" in titles(failed_run), 120)
    second = two_runs[1]["dag_run_id"]  # the connection may be younger than the first
    airflow.wait("the message of the triggerer", lambda: f"{DAG} is late" in titles(second), 120)


def test_the_asset_of_the_source_starts_a_run(airflow: Any, two_runs: Any) -> None:
    status, found = airflow.call("GET", "/api/v2/assets?name_pattern=fashion_mnist_source")
    assert status == 200, found
    body = {"asset_id": found["assets"][0]["id"], "extra": {"files": "new"}}
    assert airflow.call("POST", "/api/v2/assets/events", body)[0] == 200

    def triggered() -> list[Any]:
        return [r for r in airflow.runs(DAG) if r["run_type"] == "asset_triggered" and r["state"] == "success"]

    assert airflow.wait("the asset's run", triggered)  # after that of the schedule, if one works


def test_a_range_of_dates_is_backfilled(airflow: Any, two_runs: Any) -> None:
    dates = [(tick - timedelta(days=200)).strftime("%Y-%m-%dT%H:%M:%SZ") for tick in airflow.ticks[:2]]
    body = {
        "dag_id": DAG,
        "from_date": dates[0],
        "to_date": dates[1],
        "max_active_runs": 1,
        "reprocess_behavior": "none",
        "run_backwards": False,
        "dag_run_conf": {},
    }

    def accepted(method: str, path: str, value: dict[str, Any]) -> bool:
        return airflow.call(method, path, value)[0] == 200  # SQLite is locked at times

    # If it is locked between two runs of a backfill, Airflow deletes the first one, and a scheduler that works on this
    # one dies of it (ObjectDeletedError). It does not touch the runs of a paused DAG.
    airflow.wait("the pause", lambda: accepted("PATCH", f"/api/v2/dags/{DAG}", {"is_paused": True}), 60)
    airflow.wait("the backfill to be accepted", lambda: accepted("POST", "/api/v2/backfills", body), 60)
    airflow.wait("the end of the pause", lambda: accepted("PATCH", f"/api/v2/dags/{DAG}", {"is_paused": False}), 60)

    def done() -> list[Any]:
        runs = [run for run in airflow.runs(DAG) if run["run_type"] == "backfill"]
        return runs if len(runs) == 2 and all(run["state"] == "success" for run in runs) else []

    runs = airflow.wait("the backfill", done)
    assert [run["logical_date"] for run in runs] == dates
