"""The sweep, run by Airflow in a process: in one task, spread over several, and feeding the training DAG."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ridgeline.artifacts.model import Model
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.artifacts.trials import Trials
from ridgeline.store import Execution, Store

ROOT = Path(__file__).resolve().parents[2]
DATA = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1000}
GRID = {"sweep.l1": [], "sweep.l2": [0.001]}  # and dense: one solver, so that each task compiles once
RUNS = {
    "spread": ("regularization_path", {**DATA, **GRID, "sweep.train.epochs": 1, "spread_tasks": 2}),
    "one task": ("regularization_path", {**DATA, **GRID, "sweep.train.epochs": 1}),
    "switch": ("fashion_mnist_training", {**DATA, **GRID, "train.epochs": 1, "penalty_from": "regularization_path"}),
}
RUN_DAGS = """
import json, os, sys
from pathlib import Path
from ridgeline.airflow.local import start_quickly

start_quickly()
from airflow.dag_processing.dagbag import DagBag
from airflow.utils.db import initdb

initdb()
results = {}
for name, (dag_id, conf) in json.loads(sys.argv[1]).items():
    dag = DagBag(f"{os.environ['AIRFLOW__CORE__DAGS_FOLDER']}/{dag_id}.py").dags[dag_id]
    dag.deadline = None  # dag.test fails where a DAG with a deadline succeeds
    run = dag.test(run_conf=conf)
    tasks = {f"{task.task_id}[{task.map_index}]": str(task.state) for task in run.get_task_instances()}
    results[name] = {"state": str(run.state), "run_id": run.run_id, "tasks": tasks}
Path(sys.argv[2]).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, synthetic_store: Store) -> Path:
    """Holds a copy of the synthetic store."""
    folder = tmp_path_factory.mktemp("sweep_e2e")
    shutil.copytree(synthetic_store.local, folder / "store")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path, run_dags: Any) -> dict[str, Any]:
    return run_dags(folder, RUN_DAGS, RUNS)


def executions(folder: Path, run: dict[str, Any]) -> list[Execution]:
    """The run's executions, oldest first."""
    return [e for e in Store(folder / "store").executions() if e.run_id == run["run_id"]][::-1]


@pytest.mark.airflow
def test_a_spread_sweep_trains_each_point_once_with_the_result_of_one_task(folder, runs):
    spread, one = runs["spread"], runs["one task"]
    assert (spread["state"], one["state"]) == ("success", "success")
    assert [name for name in spread["tasks"] if "sweep" in name] == ["sweep[0]", "sweep[1]"]
    assert [name for name in one["tasks"] if "sweep" in name] == ["sweep[0]"]
    store = Store(folder / "store")
    sweeps = [e for e in executions(folder, spread) if e.component == "sweep"]
    assert [len(store.open(e.output or "", Trials).facts.trials) for e in sweeps] == [1, 1]
    select = executions(folder, spread)[-1]
    assert [store.open(ref, Trials).digest for ref in select.inputs.values()] == [
        store.open(e.output or "", Trials).digest
        for e in sorted(sweeps, key=lambda e: str(e.parts.params["dense"]), reverse=True)
    ]
    assert executions(folder, one)[-1].output == select.output


@pytest.mark.airflow
def test_the_training_dag_takes_the_penalty_from_the_sweep_and_reuses_it(folder, runs):
    run = runs["switch"]
    assert run["state"] == "success"
    assert set(run["tasks"].values()) <= {"success", "skipped"}
    assert run["tasks"]["train[-1]"] == run["tasks"]["evaluate[-1]"] == "success"
    by_step = {e.component: e for e in executions(folder, run)}
    assert by_step["sweep"].state == "cached"
    store = Store(folder / "store")
    facts = store.open(by_step["select"].output or "", SweepResult).facts
    model = store.open(by_step["train"].output or "", Model).facts
    assert model.params["penalty"] == facts.winner_params["penalty"]
    assert model.metrics == facts.trials[facts.winner].metrics
