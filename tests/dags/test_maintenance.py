"""The DAG file as Airflow loads it, in a process and an AIRFLOW_HOME of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import ParamValidationError

bag = DagBag()
dag = bag.dags["maintenance"]
facts = {
    "import_errors": bag.import_errors,
    "tensorflow": "tensorflow" in sys.modules,
    "upstream": {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks},
    "callbacks": [type(callback).__name__ for task in dag.tasks for callback in task.on_failure_callback],
    "docs": [task.doc_md for task in dag.tasks] + [dag.doc_md],
    "dag": [dag.dag_display_name, dag.timetable.expression, dag.is_paused_upon_creation, dag.max_active_runs],
    "params": {name: param.value for name, param in dag.params.items()},
    "schemas": {name: param.schema for name, param in dag.params.items()},
    "refused": [],
}
for name, value in json.loads(sys.argv[1]):
    try:
        dag.params[name] = value
    except ParamValidationError as error:
        facts["refused"].append([name, value])
print("\\n" + json.dumps(facts))
"""
BAD_VALUES = [
    ["keep_runs", 0],
    ["keep_runs", 2.5],
    ["log_retention_days", 0],
    ["metadata_retention_days", 1],
    ["metadata_retention_days", None],
    ["dry_run", "no"],
]


@pytest.fixture(scope="module")
def facts(load_dags: Any) -> dict[str, Any]:
    return load_dags(LOAD, BAD_VALUES, RIDGELINE_KEEP_RUNS="20", RIDGELINE_MAINTENANCE_SCHEDULE="@daily")


def test_the_dag_loads_without_tensorflow_and_is_documented(facts: dict[str, Any]) -> None:
    assert facts["import_errors"] == {}
    assert not facts["tensorflow"]
    assert all(facts["docs"])


def test_its_tasks_are_independent_and_failures_are_reported(facts: dict[str, Any]) -> None:
    tasks = ("collect_garbage", "delete_logs", "clean_metadata", "announce_stale")
    assert facts["upstream"] == {task: [] for task in tasks}
    assert facts["callbacks"] == ["Notifier"] * 4


def test_the_settings_give_the_schedule_and_the_defaults(facts: dict[str, Any]) -> None:
    assert facts["dag"] == ["Maintenance", "0 0 * * *", False, 1]
    assert facts["params"]["keep_runs"] == 20


def test_every_field_is_titled_and_bad_values_are_refused(facts: dict[str, Any]) -> None:
    assert all(schema["title"] for schema in facts["schemas"].values())
    assert facts["refused"] == BAD_VALUES
