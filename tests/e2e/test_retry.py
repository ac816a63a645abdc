"""A training task that is killed in a real Airflow: the retry resumes from the checkpoint."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

from components.train import train
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.pipeline import parse_params
from ridgeline.settings import Settings
from ridgeline.store import Store

DAG = "fashion_mnist_training"
EPOCHS = 150
CONF = {
    "train.epochs": EPOCHS,
    "train.momentum": 0.9,
    "train.mlp.hidden_units": [8],
}


def test_a_killed_training_is_retried_from_its_checkpoint_to_the_same_bytes(airflow: Any, tmp_path: Path) -> None:
    run_id = airflow.trigger(DAG, CONF)

    def task() -> dict[str, Any]:
        return airflow.call("GET", f"/api/v2/dags/{DAG}/dagRuns/{run_id}/taskInstances/train")[1]

    store = Store(airflow.store)
    airflow.wait("a checkpoint", lambda: any((store.local / "scratch").glob("*/checkpoint")))
    os.kill(task()["pid"], signal.SIGKILL)
    airflow.wait("the failure to be seen", lambda: task()["state"] == "up_for_retry")
    airflow.wait("the retry", lambda: task()["state"] in ("running", "success", "failed"))
    # Start no later task: Airflow would wait for it when it stops.
    assert airflow.call("PATCH", f"/api/v2/dags/{DAG}", {"is_paused": True})[0] == 200
    airflow.wait("the training", lambda: task()["state"] in ("success", "failed"))
    assert airflow.call("PATCH", f"/api/v2/dags/{DAG}/dagRuns/{run_id}", {"state": "failed"})[0] == 200
    assert airflow.call("PATCH", f"/api/v2/dags/{DAG}", {"is_paused": False})[0] == 200

    assert task()["try_number"] == 2
    assert re.search(rf"resuming from epoch \d+ of {EPOCHS}", airflow.log(DAG, run_id, "train"))
    records = airflow.records(run_id)
    assert {name: record.state for name, record in records.items()} == {
        "ingest": "cached",
        "transform": "cached",
        "statistics": "cached",
        "schema": "cached",
        "validate": "cached",
        "train": "complete",
    }
    execution = records["train"]
    examples = store.open(execution.inputs["examples"], Examples)
    (tmp_path / "whole").mkdir()
    params = parse_params([train], {name: CONF[name] for name in CONF if name.startswith("train.")}, Settings())
    whole = train(examples=examples, params=params["train"], output=tmp_path / "whole")
    assert store.open(execution.output or "", Model).digest == whole.digest
