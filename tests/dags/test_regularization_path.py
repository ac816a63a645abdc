"""The DAG file as Airflow loads it, in a process and an AIRFLOW_HOME of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ridgeline import pipeline

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).resolve().parents[2]
BAD_VALUES = {
    "sweep.l1": [0.0],
    "sweep.l2": [0.1, "strong"],
    "sweep.l1_l2": [[0.1, -0.1]],
    "select.tolerance": 2,
    "sweep.train.epochs": 0,
    "spread_tasks": 0,
}
LOAD = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import ParamValidationError

bag = DagBag()
dag = bag.dags["regularization_path"]
facts = {
    "import_errors": bag.import_errors,
    "tensorflow": "tensorflow" in sys.modules,
    "upstream": {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks},
    "docs": [task.doc_md for task in dag.tasks] + [dag.doc_md],
    "params": {name: param.value for name, param in dag.params.items()},
    "refused": [],
}
for name, value in json.loads(sys.argv[1]).items():
    try:
        dag.params[name] = value
    except ParamValidationError as error:
        facts["refused"].append(name)
print("\\n" + json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(load_dags: Any) -> dict[str, Any]:
    return load_dags(LOAD, BAD_VALUES)


def test_the_dag_loads_without_tensorflow_and_every_task_is_documented(facts: dict[str, Any]) -> None:
    assert facts["import_errors"] == {}
    assert not facts["tensorflow"]
    assert all(facts["docs"])


def test_the_grid_is_divided_swept_in_parts_and_one_penalty_is_selected(facts: dict[str, Any]) -> None:
    assert facts["upstream"] == {
        "ingest": [],
        "transform": ["ingest"],
        "split": [],
        "statistics": ["transform"],
        "schema": ["statistics"],
        "validate": ["ingest", "schema", "statistics", "transform"],
        "sweep": ["split", "transform", "validate"],
        "select": ["sweep"],
    }


def test_the_params_are_those_of_the_steps_with_their_defaults(facts: dict[str, Any]) -> None:
    expected = {
        f"{step.name}.{name}": str(value) if isinstance(value, float) else value  # numbers are typed as text
        for step in pipeline.plan("select")
        for name, value in step.defaults().items()
    }
    assert facts["params"] == expected | {"spread_tasks": 1, "rerun": []}
    assert facts["params"]["sweep.train.epochs"] == 2


def test_bad_values_are_refused(facts: dict[str, Any]) -> None:
    assert facts["refused"] == list(BAD_VALUES)
