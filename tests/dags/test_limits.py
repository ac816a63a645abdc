"""The limits of every DAG: duration of a run, deadline, pool."""

from __future__ import annotations

from typing import Any

import pytest

from ridgeline.settings import Settings

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
    }
    for dag_id, dag in DagBag().dags.items()
}
print("\\n" + json.dumps(facts))
"""


@pytest.fixture(scope="module")
def dags(load_dags: Any) -> dict[str, Any]:
    return load_dags(LOAD, None)


def test_every_run_has_a_time_limit_above_that_of_its_tasks_and_above_the_deadline(dags: dict[str, Any]) -> None:
    for dag_id, dag in dags.items():
        assert dag["timeout"], dag_id
        assert dag["timeout"] > dag["longest"], dag_id
        assert dag["timeout"] > Settings().deadline_minutes * 60, dag_id


def test_every_dag_reports_late_runs(dags: dict[str, Any]) -> None:
    deadlines = {dag_id: dag["deadlines"] for dag_id, dag in dags.items()}
    assert deadlines == {dag_id: [Settings().deadline_minutes * 60] for dag_id in dags}


def test_every_dag_reports_failed_runs_and_failed_tasks(dags: dict[str, Any]) -> None:
    callbacks = {dag_id: dag["callbacks"] for dag_id, dag in dags.items()}
    assert callbacks == {dag_id: ["run_failed", "task_failed"] for dag_id in dags}


def test_the_metadata_of_a_run_in_progress_is_never_old(dags: dict[str, Any]) -> None:
    shortest_retention = 2 * 86400  # see ridgeline.airflow.maintenance.form
    assert max(dag["timeout"] for dag in dags.values()) < shortest_retention


def test_tasks_with_tensorflow_use_the_pool_and_the_others_do_not(dags: dict[str, Any]) -> None:
    pools = {(dag_id, task): pool for dag_id, dag in dags.items() for task, pool in dag["pools"].items()}
    outside = {("rollback_model", "rollback"), ("regularization_path", "split")}
    outside |= {("maintenance", name) for name in dags["maintenance"]["pools"]}
    assert {key for key, pool in pools.items() if pool == "default_pool"} == outside
    assert {pools[key] for key in pools.keys() - outside} == {"tensorflow"}
