"""The DAG `rollback_model`, run by Airflow itself, in a process and an AIRFLOW_HOME of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.registry import Registry
from ridgeline.store import Store

ROOT = Path(__file__).resolve().parents[2]
NAME = "synthetic_garments"
RUNS = {
    "unknown name": {"model": NAME, "reason": "worse in production", "verison": 1},
    "back": {"model": NAME, "reason": "worse in production"},
    "nothing before it": {"model": NAME, "reason": "worse in production"},
    "forward": {"model": NAME, "version": 2, "reason": "it was not the model"},
    "no reason": {"model": NAME},
}
RUN_DAGS = """
import json, sys
from pathlib import Path
from airflow.dag_processing.dagbag import DagBag
from airflow.utils.db import initdb

initdb()
results = {}
for name, conf in json.loads(sys.argv[1]).items():
    dag = DagBag().dags["rollback_model"]  # loaded again: a run leaves its values in the DAG's params
    dag.deadline = None  # dag.test fails where a DAG with a deadline succeeds
    try:
        run = dag.test(run_conf=conf)
    except ValueError as error:
        results[name] = {"error": str(error)}
        continue
    tasks = {task.task_id: (str(task.state), task.try_number) for task in run.get_task_instances()}
    results[name] = {"state": str(run.state), "run_id": run.run_id, "tasks": tasks}
Path(sys.argv[2]).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, synthetic_store: Store, refs: dict[str, str]) -> Registry:
    """Two versions of one SavedModel, as if they were two models; served from a copy of the synthetic store."""
    folder = tmp_path_factory.mktemp("e2e")
    shutil.copytree(synthetic_store.local, folder / "store")
    store, registry = Store(folder / "store"), Registry(folder / "store" / "serving")
    model = store.open(refs["export"], PushedModel)
    shutil.copytree(model.path, folder / "second")
    facts = model.facts.model_copy(update={"model_digest": "0" * 64, "champion": model.facts.model_digest})
    registry.push(store.open(store.publish(PushedModel.seal(folder / "second", facts)), PushedModel), "run 2")
    return registry


@pytest.fixture(scope="module")
def results(registry: Registry, run_dags: Any) -> dict[str, Any]:
    return run_dags(registry.root.parent.parent, RUN_DAGS, RUNS)


def test_it_moves_the_champion_back_and_forth_and_records_who_and_why(
    results: dict[str, Any], registry: Registry
) -> None:
    assert [results[run]["state"] for run in ("back", "forward")] == ["success", "success"]
    pushes, rollbacks = registry.history(NAME)[:2], registry.history(NAME)[2:]
    assert [entry.version for entry in pushes] == [1, 2]
    assert [(e.version, e.action, e.reason, e.run_id) for e in rollbacks] == [
        (1, "rollback", "worse in production", results["back"]["run_id"]),
        (2, "rollback", "it was not the model", results["forward"]["run_id"]),
    ]
    assert {entry.by for entry in rollbacks} == {"dag_test"}  # what dag.test gives as the triggering user


def test_what_the_registry_refuses_fails_without_a_retry(results: dict[str, Any]) -> None:
    for run in ("nothing before it", "unknown name"):
        assert results[run]["state"] == "failed"
        assert results[run]["tasks"] == {"rollback": ["failed", 1]}


def test_a_run_without_a_reason_is_refused_before_it_starts(results: dict[str, Any]) -> None:
    assert "reason" in results["no reason"]["error"]
