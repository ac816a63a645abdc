"""The DAG of batch inference and files that call `inference_dag`, as Airflow loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ridgeline.history import HistoryEntry

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).resolve().parents[2]
FILE = '''
"""Sort the photos of the day."""

from dags.inference import inference_dag

inference_dag("photos", "Photos", __doc__, model="shop", folder="/photos/new", new_files_only=True,
              output="/photos/classes", schedule="0 5 * * *")
inference_dag("shop", "Shop", __doc__, model="shop", folder="s3://bucket/photos", schedule="pushed")
'''
LOAD = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from ridgeline.airflow.form import parse_form
from ridgeline.settings import Settings

bag = DagBag()

def describe(dag):
    values = {name: param.value for name, param in dag.params.items()}
    return {
        "names": [dag.dag_display_name, dag.doc_md, *sorted(dag.tags)],
        "tasks": {task.task_id: task.doc_md for task in dag.tasks},
        "schedule": [asset.name for asset in dag.schedule] if isinstance(dag.schedule, list) else
            getattr(dag.schedule, "expression", dag.schedule),
        "outlets": [asset.name for task in dag.tasks for asset in task.outlets],
        "values": values,
        "titles": [param.schema["title"] for param in dag.params.values()],
        "params": parse_form(dict(dag.params.items()), values, Settings())["infer"].model_dump(),
    }

print("\\n" + json.dumps({"errors": bag.import_errors, "tensorflow": "tensorflow" in sys.modules,
                          "dags": {d: describe(dag) for d, dag in bag.dags.items() if "inference" in d}}))
"""

# What the DAGs that change a champion start: the ids of the DAGs that wait for a run, after each of two runs.
CHANGE = """
import json, sys
from ridgeline.airflow.local import start_quickly

start_quickly()
from airflow.dag_processing.dagbag import DagBag
from airflow.models.asset import AssetDagRunQueue, AssetEvent
from airflow.utils.db import initdb
from airflow.utils.session import create_session
from sqlalchemy import select
from ridgeline.registry import Registry

Registry.verify = lambda *_: None  # there is nothing to load
initdb()
bag, found = DagBag(), []
for dag_id, values in json.loads(sys.argv[1]):
    dag = bag.dags[dag_id]
    dag.deadline = None
    run = dag.test(run_conf={"model": "fashion_mnist", "reason": "a test", **values})
    with create_session() as session:
        events = [[event.asset.name, event.extra["action"]] for event in session.scalars(select(AssetEvent))]
        waiting = list(session.scalars(select(AssetDagRunQueue.target_dag_id)))
    found.append([str(run.state), events, waiting])
print("\\n" + json.dumps(found))
"""


def test_the_dag_is_one_task_with_a_form_and_starts_by_hand(load_dags: Any) -> None:
    loaded = load_dags(LOAD, None)
    assert loaded["errors"] == {}
    assert not loaded["tensorflow"]
    dag = loaded["dags"]["batch_inference"]
    assert dag["names"][0] == "Batch inference"
    assert dag["names"][2:] == ["fashion-mnist", "inference"]
    assert all(dag["tasks"].values())
    assert list(dag["tasks"]) == ["infer"]
    assert dag["schedule"] is None
    assert dag["outlets"] == ["batch_predictions"]
    assert dag["values"] == {
        "infer.model": "fashion_mnist",
        "infer.version": None,
        "infer.folder": None,
        "infer.new_files_only": False,
        "rerun": [],
    }
    assert all(dag["titles"])
    assert dag["params"] == {"model": "fashion_mnist", "version": None, "folder": None, "new_files_only": False}


@pytest.mark.parametrize(
    ("setting", "schedule"), [("0 4 * * *", "0 4 * * *"), ("pushed", ["fashion_mnist_pushed_model"])]
)
def test_settings_schedule_it_and_name_its_folder(load_dags: Any, setting: str, schedule: object) -> None:
    defaults = '{"infer.folder": "/photos", "infer.new_files_only": true}'
    loaded = load_dags(LOAD, None, RIDGELINE_INFERENCE_SCHEDULE=setting, RIDGELINE_DEFAULTS=defaults)
    assert loaded["errors"] == {}
    dag = loaded["dags"]["batch_inference"]
    assert dag["schedule"] == schedule
    assert (dag["params"]["folder"], dag["params"]["new_files_only"]) == ("/photos", True)


def test_a_file_defines_a_dag_of_its_own(load_dags: Any, tmp_path: Path) -> None:
    (tmp_path / "photos_inference.py").write_text(FILE)
    (tmp_path / "url_inference.py").write_text(FILE.replace("/photos/classes", "s3://bucket/classes"))
    loaded = load_dags(LOAD, None, AIRFLOW__CORE__DAGS_FOLDER=str(tmp_path), PYTHONPATH=str(ROOT))
    (error,) = loaded["errors"].values()
    assert "Expected an absolute path as the output; received a URL." in error
    photos, shop = loaded["dags"]["photos_inference"], loaded["dags"]["shop_inference"]
    assert photos["names"] == ["Photos inference", "Sort the photos of the day.", "inference", "shop"]
    assert photos["schedule"] == "0 5 * * *"
    assert photos["params"] == {"model": "shop", "version": None, "folder": "/photos/new", "new_files_only": True}
    assert shop["schedule"] == ["shop_pushed_model"]
    assert shop["outlets"] == ["shop_predictions"]


def test_pushed_starts_it_whenever_the_champion_changes_and_not_for_a_canary(load_dags: Any, tmp_path: Path) -> None:
    serving = tmp_path / "serving" / "fashion_mnist"
    entries = []
    for version in (1, 2):
        (serving / str(version)).mkdir(parents=True)
        values = {"version": version, "action": "push", "model_digest": str(version), "artifact": "", "accuracy": 0.8}
        entries.append(HistoryEntry.model_validate(values | {"run_id": "run"}).model_dump_json())
    (serving / "history.jsonl").write_text("\n".join(entries) + "\n")
    runs = [
        ["canary_model", {"version": 1}],
        ["canary_model", {"action": "promote"}],
        ["rollback_model", {"version": 2}],
    ]
    settings = {"RIDGELINE_STORE": str(tmp_path), "RIDGELINE_SERVING": str(tmp_path / "serving")}
    started, promoted, rolled_back = load_dags(CHANGE, runs, RIDGELINE_INFERENCE_SCHEDULE="pushed", **settings)
    asset = "fashion_mnist_pushed_model"
    assert started == ["success", [], []]
    assert promoted == ["success", [[asset, "promote"]], ["batch_inference"]]
    assert rolled_back == ["success", [[asset, "promote"], [asset, "rollback"]], ["batch_inference"]]
