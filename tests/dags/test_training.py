"""A second dataset: a file that calls `training_dag`, as Airflow loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).resolve().parents[2]
FILE = '''
"""Train a classifier of handwritten digits."""

from dags.training import training_dag

training_dag(
    "digits",
    "Digits",
    __doc__,
    schedule="0 3 * * *",
    defaults={"ingest.dataset": "mnist:3.0.1", "train.profile": "tuned", "train.epochs": 2, "train.penalty.l2": 0.001},
)
training_dag("digits_again", "Digits again", __doc__, schedule="never")
'''
LOAD = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from ridgeline.airflow.form import parse_form
from ridgeline.settings import Settings

bag = DagBag()

def describe(dag):
    values = {name: param.value for name, param in dag.params.items()}
    condition = getattr(dag.schedule, "asset_condition", None)
    assets = condition.objects if condition else dag.schedule
    return {
        "file": dag.fileloc.rpartition("/")[2],
        "names": [dag.dag_display_name, dag.doc_md, *sorted(dag.tags)],
        "tasks": sorted(dag.task_ids),
        "sources": [asset.name for asset in assets],
        "times": getattr(getattr(dag.schedule, "timetable", None), "expression", None),
        "outlets": sorted(asset.name for task in dag.tasks for asset in task.outlets),
        "values": values,
        "epochs": parse_form(dict(dag.params.items()), values, Settings())["train"].epochs,
    }

print("\\n" + json.dumps({"errors": bag.import_errors, "dags": {d: describe(dag) for d, dag in bag.dags.items()}}))
"""
# The last line of what Python prints about each call.
CALL = """
import json, sys, traceback
from dags.training import training_dag

errors = []
for name, options in json.loads(sys.argv[1]):
    try:
        training_dag(name, "", "", **options)
    except Exception as error:
        errors.append("".join(traceback.format_exception_only(error)).splitlines()[-1])
print("\\n" + json.dumps(errors))
"""


@pytest.fixture(scope="module")
def loaded(load_dags: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("own_dags")
    (folder / "digits_training.py").write_text(FILE)
    settings = {"RIDGELINE_DEFAULTS": '{"ingest.dataset": "kmnist:3.0.1", "train.seed": 7}'}
    return load_dags(LOAD, None, AIRFLOW__CORE__DAGS_FOLDER=str(folder), PYTHONPATH=str(ROOT), **settings)


def test_a_file_of_ten_lines_makes_a_dag_with_names_and_assets_of_its_own(loaded: dict[str, Any]) -> None:
    assert loaded["errors"] == {}
    assert loaded["dags"].keys() == {"digits_training", "digits_again_training"}
    dag = loaded["dags"]["digits_training"]
    assert dag["file"] == "digits_training.py"
    assert dag["names"] == ["Digits training", "Train a classifier of handwritten digits.", "digits", "training"]
    assert dag["sources"] == ["digits_source"]
    assert dag["outlets"] == ["champions", "digits_dataset", "digits_examples", "digits_model"]


def test_it_has_a_schedule_of_its_own(loaded: dict[str, Any]) -> None:
    assert loaded["dags"]["digits_training"]["times"] == "0 3 * * *"
    assert loaded["dags"]["digits_again_training"]["times"] is None
    assert loaded["dags"]["digits_again_training"]["sources"] == ["digits_again_source"]


def test_its_defaults_precede_those_of_the_installation(loaded: dict[str, Any]) -> None:
    values = loaded["dags"]["digits_training"]["values"]
    assert (values["ingest.dataset"], values["train.seed"], values["train.penalty.l2"]) == ("mnist:3.0.1", 7, "0.001")
    assert loaded["dags"]["digits_again_training"]["values"]["ingest.dataset"] == "kmnist:3.0.1"


def test_a_default_counts_under_a_profile_even_if_it_is_that_of_the_step(loaded: dict[str, Any]) -> None:
    assert loaded["dags"]["digits_training"]["epochs"] == 2  # the profile's would be 160


def test_bad_arguments_are_refused_in_one_line(load_dags: Any) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("Own images", {}),
        ("a", {"defaults": {"ingets.dataset": "x"}}),
        ("a", {"schedule": "daily"}),
    ]
    name, default, schedule = load_dags(CALL, calls, PYTHONPATH=str(ROOT))
    assert "Expected a name of lower-case letters, digits and _" in name
    assert "received ingets.dataset" in default
    assert "a cron expression" in schedule
