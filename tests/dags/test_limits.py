"""The limits of every DAG: duration of a run, deadline, pool, retries, messages about failures."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.airflow
LOAD = """
import json
from airflow.dag_processing.dagbag import DagBag

def longest(dag):
    seconds = {}
    for task in dag.topological_sort():
        before = [seconds[name] for name in task.upstream_task_ids]
        seconds[task.task_id] = task.execution_timeout.total_seconds() + max(before, default=0)
    return max(seconds.values())

def events(owner):
    callbacks = owner.on_failure_callback
    return {callback.event for callback in (callbacks if isinstance(callbacks, list) else [callbacks])}

facts = {
    dag_id: {
        "timeout": dag.dagrun_timeout and dag.dagrun_timeout.total_seconds(),
        "longest": longest(dag),
        "deadlines": [alert.interval.total_seconds() for alert in dag.deadline or []],
        "callbacks": [*events(dag), *set.union(*map(events, dag.tasks))],
        "pools": {task.task_id: task.pool for task in dag.tasks},
        "retries": {
            task.task_id: [task.retries, task.retry_delay.total_seconds() if task.retries else 0] for task in dag.tasks
        },
        "limits": {task.task_id: task.execution_timeout.total_seconds() / 60 for task in dag.tasks},
        "rules": {task.task_id: task.trigger_rule for task in dag.tasks},
        "task_callbacks": {task.task_id: sorted(events(task)) for task in dag.tasks},
        "dag_callbacks": sorted(events(dag)),
        "deadline_callbacks": [
            [alert.callback.path.rpartition(".")[2], alert.callback.kwargs["event"], type(alert.reference).__name__]
            for alert in dag.deadline or []
        ],
        "runs": [dag.max_active_runs, dag.catchup, dag.is_paused_upon_creation],
    }
    for dag_id, dag in DagBag().dags.items()
}
print("\\n" + json.dumps(facts))
"""

DEADLINE_MINUTES = 90
# The installation's own defaults, all other than what the DAG files say: a DAG that says nothing would follow them.
OTHER_DEFAULTS = {
    "RIDGELINE_DEADLINE_MINUTES": str(DEADLINE_MINUTES),
    "AIRFLOW__CORE__DEFAULT_TASK_RETRIES": "7",
    "AIRFLOW__CORE__DEFAULT_TASK_RETRY_DELAY": "777",
    "AIRFLOW__CORE__DEFAULT_TASK_EXECUTION_TIMEOUT": "7777",
    "AIRFLOW__CORE__MAX_ACTIVE_RUNS_PER_DAG": "7",
    "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "True",
    "AIRFLOW__SCHEDULER__CATCHUP_BY_DEFAULT": "True",
}


@pytest.fixture(scope="module")
def dags(load_dags: Any) -> dict[str, Any]:
    return load_dags(LOAD, None, **OTHER_DEFAULTS)


def test_every_run_has_a_time_limit_above_that_of_its_tasks_and_above_the_deadline(dags: dict[str, Any]) -> None:
    for dag_id, dag in dags.items():
        assert dag["timeout"], dag_id
        assert dag["timeout"] > dag["longest"], dag_id
        assert dag["timeout"] > 120 * 60, dag_id  # the default deadline


def test_every_dag_reports_late_runs(dags: dict[str, Any]) -> None:
    deadlines = {dag_id: dag["deadlines"] for dag_id, dag in dags.items()}
    assert deadlines == {dag_id: [DEADLINE_MINUTES * 60] for dag_id in dags}


def test_every_dag_reports_failed_runs_and_failed_tasks(dags: dict[str, Any]) -> None:
    callbacks = {dag_id: dag["callbacks"] for dag_id, dag in dags.items()}
    assert callbacks == {dag_id: ["run_failed", "task_failed"] for dag_id in dags}


def test_the_metadata_of_a_run_in_progress_is_never_old(dags: dict[str, Any]) -> None:
    shortest_retention = 2 * 86400  # see ridgeline.airflow.maintenance.form
    assert max(dag["timeout"] for dag in dags.values()) < shortest_retention


def test_tasks_with_tensorflow_use_the_pool_and_the_others_do_not(dags: dict[str, Any]) -> None:
    pools = {(dag_id, task): pool for dag_id, dag in dags.items() for task, pool in dag["pools"].items()}
    outside = {("rollback_model", "rollback"), ("canary_model", "decide"), ("regularization_path", "split")}
    outside |= {("maintenance", name) for name in dags["maintenance"]["pools"]}
    assert {key for key, pool in pools.items() if pool == "default_pool"} == outside
    assert {pools[key] for key in pools.keys() - outside} == {"tensorflow"}


RETRIES = {  # of a task, and the seconds between two tries
    "fashion_mnist_training": [1, 10],
    "regularization_path": [1, 10],
    "maintenance": [1, 60],
    "batch_inference": [1, 10],
    "rollback_model": [0, 0],  # a second try might roll back once more
    "canary_model": [0, 0],
}
MINUTES = {
    "fashion_mnist_training": {
        "ingest": 60, "transform": 30, "statistics": 30, "schema": 30, "validate": 30, "sweep": 360,
        "select": 30, "train": 360, "evaluate": 30, "label_errors": 30, "export": 30,
    },
    "regularization_path": {
        "ingest": 60, "transform": 30, "statistics": 30, "schema": 30, "validate": 30, "split": 5,
        "sweep": 360, "select": 30,
    },
    "maintenance": {"collect_garbage": 60, "delete_logs": 60, "clean_metadata": 60, "announce_stale": 60},
    "batch_inference": {"infer": 720},
    "rollback_model": {"rollback": 30},
    "canary_model": {"decide": 30},
}  # fmt: skip
HOURS = {
    "fashion_mnist_training": 24 + 12,
    "regularization_path": 24,
    "maintenance": 6,
    "batch_inference": 24,
    "rollback_model": 3,
    "canary_model": 3,
}


def test_every_task_of_every_dag_has_its_retries_and_its_time_limit(dags: dict[str, Any]) -> None:
    assert {dag_id: dag["limits"] for dag_id, dag in dags.items()} == MINUTES
    assert {dag_id: dag["timeout"] / 3600 for dag_id, dag in dags.items()} == HOURS
    for dag_id, dag in dags.items():
        retries = {task: RETRIES[dag_id] for task in MINUTES[dag_id]}
        assert dag["retries"] == retries | ({"export": [3, 10]} if "export" in retries else {}), dag_id


def test_every_task_reports_its_own_failure_and_every_dag_its_failed_and_late_runs(dags: dict[str, Any]) -> None:
    for dag_id, dag in dags.items():
        assert dag["task_callbacks"] == {task: ["task_failed"] for task in MINUTES[dag_id]}, dag_id
        assert dag["dag_callbacks"] == ["run_failed"], dag_id
        assert [callback[:2] for callback in dag["deadline_callbacks"]] == [["Notifier", "late"]], dag_id
        assert "Queued" in dag["deadline_callbacks"][0][2], dag_id  # not from the logical date: a manual run has none


def test_one_run_at_a_time_none_made_up_for_and_no_dag_waits_to_be_unpaused(dags: dict[str, Any]) -> None:
    assert {dag_id: dag["runs"] for dag_id, dag in dags.items()} == {dag_id: [1, False, False] for dag_id in MINUTES}


def test_a_task_runs_only_after_success_but_train_also_without_a_sweep(dags: dict[str, Any]) -> None:
    rules = {(dag_id, task): rule for dag_id, dag in dags.items() for task, rule in dag["rules"].items()}
    assert {key for key, rule in rules.items() if rule != "all_success"} == {("fashion_mnist_training", "train")}
    assert rules["fashion_mnist_training", "train"] == "none_failed"
