"""A training task that is killed in a real Airflow: the retry resumes from the checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.train import train
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.pipeline import StepResult
from ridgeline.settings import Settings
from ridgeline.store import Store

DAG = "fashion_mnist_training"
EPOCHS = 150
CONF = {
    "ingest.dataset": "synthetic_garments:1.0.0",
    "transform.validation_examples": 1000,
    "train.epochs": EPOCHS,
    "train.momentum": 0.9,
    "train.hidden_units": [8],
}


@pytest.fixture
def airflow(tmp_path: Path, start_airflow: Any, synthetic: tuple[Settings, list[StepResult]]) -> Iterator[Any]:
    """A running Airflow with a store that holds the synthetic examples."""
    shutil.copytree(synthetic[0].store, tmp_path / "store")
    with start_airflow(tmp_path, RIDGELINE_STORE=str(tmp_path / "store")) as running:
        yield running


def test_a_killed_training_is_retried_from_its_checkpoint_to_the_same_bytes(airflow: Any, tmp_path: Path) -> None:
    run_id = airflow.trigger(DAG, CONF)

    def task() -> dict[str, Any]:
        return airflow.call("GET", f"/api/v2/dags/{DAG}/dagRuns/{run_id}/taskInstances/train")[1]

    airflow.wait("a checkpoint", lambda: any((tmp_path / "store/scratch").glob("*/checkpoint")))
    os.kill(task()["pid"], signal.SIGKILL)
    airflow.wait("the failure to be seen", lambda: task()["state"] == "up_for_retry")
    airflow.wait("the retry", lambda: task()["state"] in ("running", "success", "failed"))
    # Start no later task: Airflow would wait for it when it stops.
    assert airflow.call("PATCH", f"/api/v2/dags/{DAG}", {"is_paused": True})[0] == 200
    airflow.wait("the training", lambda: task()["state"] in ("success", "failed"))

    assert task()["try_number"] == 2
    assert re.search(rf"resuming from epoch \d+ of {EPOCHS}", airflow.log(DAG, run_id, "train"))
    store = Store(tmp_path / "store")
    execution = next(store.executions("train"))
    assert (execution.run_id, execution.state) == (run_id, "complete")
    examples = store.open(execution.inputs["examples"], Examples)
    values = {name.removeprefix("train."): value for name, value in CONF.items() if name.startswith("train.")}
    (tmp_path / "whole").mkdir()
    whole = train(examples=examples, params=train.parse(values), output=tmp_path / "whole")
    assert store.open(execution.output or "", Model).digest == whole.digest
    assert {run["run_type"] for run in airflow.runs(DAG)} == {"manual"}, "a new Airflow waits for the week's tick"
