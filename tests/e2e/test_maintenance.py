"""The DAG `maintenance`, run by Airflow itself, in a process and an AIRFLOW_HOME of its own."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.store import Store

TASKS = ("collect_garbage", "delete_logs", "clean_metadata", "announce_stale")
RUNS = {
    "dry run": {"keep_runs": 1, "dry_run": True},
    "real run": {"keep_runs": 1},
    "unknown param": {"keep_run": 1},
    "bad value": {"keep_runs": 0},
}
# One run and one log are older than any retention.
RUN_DAGS = """
import json, os, sys, time
from datetime import timedelta
from pathlib import Path
from ridgeline.airflow.local import start_quickly

start_quickly()
from airflow.configuration import conf
from airflow.dag_processing.dagbag import DagBag
from airflow.models.dagrun import DagRun
from airflow.utils.db import initdb
from airflow.utils.session import create_session
from sqlalchemy import inspect, select
from ridgeline.settings import Settings

initdb()
logs = Path(conf.get("logging", "base_log_folder"))

def run(conf):
    dag = DagBag(f"{os.environ['AIRFLOW__CORE__DAGS_FOLDER']}/maintenance.py").dags["maintenance"]
    dag.deadline = None  # dag.test fails where a DAG with a deadline succeeds
    return dag.test(run_conf=conf)

def run_ids():
    with create_session() as session:
        return sorted(session.scalars(select(DagRun.run_id)))

def archives():
    with create_session() as session:
        return [name for name in inspect(session.get_bind()).get_table_names() if "airflow_deleted" in name]

old = run({"dry_run": True}).run_id
with create_session() as session:
    found = session.scalar(select(DagRun).where(DagRun.run_id == old))
    found.start_date = found.start_date - timedelta(days=100)
old_log, new_log = (logs / f"dag_id=d/run_id={name}/task_id=t/attempt=1.log" for name in ("old", "new"))
for log in (old_log, new_log):
    log.parent.mkdir(parents=True)
    log.touch()
os.utime(old_log, (time.time() - 40 * 86400,) * 2)

results = {"old": old}
for name, values in json.loads(sys.argv[1]).items():
    try:
        found = run(values)
    except ValueError as error:
        results[name] = {"error": str(error)}
        continue
    with create_session() as session:
        tasks = {task.task_id: str(task.state) for task in found.get_task_instances(session=session)}
    logs_left = [log.exists() for log in (old_log, new_log)]
    artifacts = Settings().open_store().refs()
    results[name] = {"state": str(found.state), "run_id": found.run_id, "tasks": tasks, "runs": run_ids()}
    results[name] |= {"logs": logs_left, "artifacts": artifacts, "archives": archives()}
Path(sys.argv[2]).write_text(json.dumps(results))
"""


pytestmark = pytest.mark.airflow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, synthetic_store: Store, refs: dict[str, str]) -> Store:
    """The synthetic store, and an artifact that no run made."""
    folder = tmp_path_factory.mktemp("maintenance")
    shutil.copytree(synthetic_store.local, folder / "store")
    store = Store(folder / "store")
    model = store.open(refs["export"], PushedModel)
    shutil.copytree(model.path, folder / "other")
    store.publish(PushedModel.seal(folder / "other", model.facts.model_copy(update={"model_digest": "0" * 64})))
    return store


@pytest.fixture(scope="module")
def results(store: Store, refs: dict[str, str], run_dags: Any) -> dict[str, Any]:
    return run_dags(store.local.parent, RUN_DAGS, RUNS)


def test_a_dry_run_deletes_nothing(results: dict[str, Any], refs: dict[str, str]) -> None:
    found = results["dry run"]
    assert found["state"] == "success"
    assert found["tasks"] == dict.fromkeys(TASKS, "success")
    assert len(found["artifacts"]) == len(refs) + 1
    assert found["logs"] == [True, True]
    assert found["runs"] == sorted([results["old"], found["run_id"]])


def test_a_real_run_deletes_the_old_and_keeps_the_new(results: dict[str, Any], refs: dict[str, str]) -> None:
    found = results["real run"]
    assert found["state"] == "success"
    assert found["tasks"] == dict.fromkeys(TASKS, "success")
    assert found["artifacts"] == sorted(refs.values())
    assert found["logs"] == [False, True]
    assert found["runs"] == sorted([results["dry run"]["run_id"], found["run_id"]])
    assert found["archives"] == []


def test_an_unknown_param_deletes_nothing(results: dict[str, Any]) -> None:
    assert results["unknown param"]["state"] == "failed"
    assert results["unknown param"]["tasks"] == dict.fromkeys(TASKS, "failed") | {"announce_stale": "success"}
    assert "keep_runs" in results["bad value"]["error"]
