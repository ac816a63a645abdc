"""The DAG of batch inference and files that call `inference_dag`, as Airflow loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
