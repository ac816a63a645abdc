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
dag = bag.dags["canary_model"]
facts = {
    "import_errors": bag.import_errors,
    "tensorflow": "tensorflow" in sys.modules,
    "tasks": [task.task_id for task in dag.tasks],
    "retries": [task.retries for task in dag.tasks],
    "callbacks": [type(callback).__name__ for task in dag.tasks for callback in task.on_failure_callback],
    "display_name": dag.dag_display_name,
    "docs": [task.doc_md for task in dag.tasks] + [dag.doc_md],
    "dag": [dag.schedule, dag.is_paused_upon_creation, dag.max_active_runs],
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
    ["version", 0], ["version", "two"], ["share", 0], ["share", 1], ["share", "all"], ["action", "stop"],
    ["reason", ""], ["reason", "bad"], ["reason", None], ["model", ""],
]  # fmt: skip


@pytest.fixture(scope="module")
def facts(load_dags: Any) -> dict[str, Any]:
    return load_dags(LOAD, BAD_VALUES, AIRFLOW__CORE__DEFAULT_TASK_RETRIES="2")


def test_the_dag_loads_without_tensorflow_and_is_documented(facts: dict[str, Any]) -> None:
    assert facts["import_errors"] == {}
    assert not facts["tensorflow"]
    assert all(facts["docs"])


def test_it_is_one_task_that_users_trigger_and_that_is_not_retried(facts: dict[str, Any]) -> None:
    assert facts["tasks"] == ["decide"]
    assert facts["retries"] == [0]
    assert facts["dag"] == [None, False, 1]


def test_a_failure_is_reported_and_the_dag_has_a_display_name(facts: dict[str, Any]) -> None:
    assert facts["callbacks"] == ["Notifier"]
    assert facts["display_name"] == "Models: canary"


def test_every_field_is_titled_and_bad_values_are_refused(facts: dict[str, Any]) -> None:
    assert all(schema["title"] for schema in facts["schemas"].values())
    assert facts["refused"] == BAD_VALUES
