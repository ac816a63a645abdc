"""The DAGs `rollback_model` and `canary_model` in Airflow."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.registry import Registry
from ridgeline.settings import Settings
from ridgeline.store import Store

DAG = "rollback_model"
NAME = "rolled_back"
RUNS = {
    "unknown name": {"model": NAME, "reason": "worse in production", "verison": 1},
    "back": {"model": NAME, "reason": "worse in production"},
    "nothing before it": {"model": NAME, "reason": "worse in production"},
    "forward": {"model": NAME, "version": 2, "reason": "it was not the model"},
}


@pytest.fixture(scope="module")
def registry(
    airflow: Any, tmp_path_factory: pytest.TempPathFactory, synthetic_store: Store, refs: dict[str, str]
) -> Registry:
    """Two versions of one SavedModel, as if they were two models with a name of their own."""
    folder = tmp_path_factory.mktemp("rollback")
    settings = Settings(store=airflow.store)
    store, registry = settings.open_store(), settings.open_registry()
    model = synthetic_store.open(refs["export"], PushedModel)
    for number, champion in ((1, None), (2, f"{1:064x}")):
        shutil.copytree(model.path, folder / f"{number}")
        (folder / f"{number}" / "manifest.json").unlink()
        changed = {"model_name": NAME, "model_digest": f"{number:064x}", "champion": champion}
        facts = model.facts.model_copy(update=changed)
        artifact = PushedModel.seal(folder / f"{number}", facts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ridgeline.registry.check", lambda *_: None)  # the rollbacks check the versions
            registry.push(store.open(store.publish(artifact), PushedModel), f"run {number}")
    return registry


@pytest.fixture(scope="module")
def runs(registry: Registry, airflow: Any) -> dict[str, str]:
    """The ids of the runs, which were made one after the other."""
    ids = {}
    for name, conf in RUNS.items():
        ids[name] = airflow.trigger(DAG, conf)
        airflow.wait_for_run(DAG, ids[name], 120)
    return ids


def test_it_moves_the_champion_back_and_forth_and_records_who_and_why(
    airflow: Any, runs: dict[str, str], registry: Registry
) -> None:
    for run in ("back", "forward"):
        assert airflow.states(DAG, runs[run]) == {"rollback": "success"}
    pushes, rollbacks = registry.history(NAME)[:2], registry.history(NAME)[2:4]
    assert [entry.version for entry in pushes] == [1, 2]
    assert [(e.version, e.action, e.reason, e.run_id, e.by) for e in rollbacks] == [
        (1, "rollback", "worse in production", runs["back"], "admin"),
        (2, "rollback", "it was not the model", runs["forward"], "admin"),
    ]


def test_what_the_registry_refuses_fails_without_a_retry(airflow: Any, runs: dict[str, str]) -> None:
    for run in ("nothing before it", "unknown name"):
        task = airflow.call("GET", f"/api/v2/dags/{DAG}/dagRuns/{runs[run]}/taskInstances/rollback")[1]
        assert (task["state"], task["try_number"]) == ("failed", 1)


def test_a_run_without_a_reason_is_refused_before_it_starts(airflow: Any) -> None:
    with pytest.raises(ValueError, match="400, .*reason"):
        airflow.trigger(DAG, {"model": NAME})


def test_a_canary_is_started_and_promoted(airflow: Any, runs: dict[str, str], registry: Registry) -> None:
    ids = {}
    for action, conf in (("canary", {"version": 1, "share": 0.25}), ("promote", {})):
        ids[action] = airflow.trigger("canary_model", {"model": NAME, "action": action, "reason": "as decided", **conf})
        airflow.wait_for_run("canary_model", ids[action], 120)
        assert airflow.states("canary_model", ids[action]) == {"decide": "success"}
    entries = registry.history(NAME)[-2:]
    assert [(e.version, e.action, e.share, e.reason, e.run_id, e.by) for e in entries] == [
        (1, "canary", 0.25, "as decided", ids["canary"], "admin"),
        (1, "promote", 0.0, "as decided", ids["promote"], "admin"),
    ]
