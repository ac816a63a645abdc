"""The DAG file as Airflow loads it, in a process and an AIRFLOW_HOME of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ridgeline import pipeline

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).resolve().parents[2]
BAD_VALUES = {
    "train.epochs": 0,
    "train.batch_size": 2.5,
    "train.penalty.l2": "strong",
    "train.penalty.l1": "-1e-4",
    "train.learning_rate": -0.1,
    "train.momentum": "1.5",
    "train.penalty.kind": "l3",
    "train.mlp.hidden_units": [100, "many"],
    "ingest.dataset": "fashion mnist",
    "evaluate.min_accuracy": 1.5,
    "sweep.l1": [0.1, "strong"],
    "penalty_from": "elsewhere",
    "rerun": ["trian"],
}
LOAD = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import ParamValidationError

bag = DagBag()
dag = bag.dags["fashion_mnist_training"]
facts = {
    "dags": sorted(bag.dags),
    "import_errors": bag.import_errors,
    "tensorflow": "tensorflow" in sys.modules,
    "order": [task.task_id for task in dag.topological_sort()],
    "upstream": {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks},
    "docs": [task.doc_md for task in dag.tasks] + [dag.doc_md],
    "timeouts": [task.execution_timeout.total_seconds() for task in dag.tasks],
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


def test_the_dags_folder_loads_without_errors_and_without_tensorflow(facts: dict[str, Any]) -> None:
    assert facts["import_errors"] == {}
    assert "fashion_mnist_training" in facts["dags"]
    assert not facts["tensorflow"]


def test_the_tasks_are_the_steps_in_their_order(facts: dict[str, Any]) -> None:
    assert facts["order"] == [
        "ingest", "transform", "statistics", "schema", "validate", "sweep", "select", "train", "evaluate",
        "label_errors", "export",
    ]  # fmt: skip
    assert facts["order"] == [step.name for step in pipeline.plan("export", ["sweep"])]
    assert facts["upstream"] == {
        "ingest": [],
        "transform": ["ingest"],
        "statistics": ["transform"],
        "schema": ["statistics"],
        "validate": ["ingest", "schema", "statistics", "transform"],
        "sweep": ["transform", "validate"],
        "select": ["sweep"],
        "train": ["select", "transform", "validate"],
        "evaluate": ["ingest", "train", "transform"],
        "label_errors": ["ingest", "train", "transform"],
        "export": ["evaluate", "ingest", "label_errors", "train", "transform"],
    }


def test_every_task_has_documentation_and_a_time_limit(facts: dict[str, Any]) -> None:
    assert all(facts["docs"])
    assert all(seconds > 0 for seconds in facts["timeouts"])


def test_the_params_are_those_of_the_steps_with_their_defaults(facts: dict[str, Any]) -> None:
    expected = {
        f"{step.name}.{name}": str(value) if isinstance(value, float) else value  # numbers are typed as text
        for step in pipeline.plan("export", ["sweep"])
        for name, value in step.defaults().items()
        if not f"{step.name}.{name}".startswith("sweep.train.")  # those of train
    }
    assert facts["params"] == expected | {"penalty_from": "form", "rerun": []}
    assert "ingest.manual_dir" not in facts["params"]


def test_bad_values_are_refused(facts: dict[str, Any]) -> None:
    assert facts["refused"] == list(BAD_VALUES)
