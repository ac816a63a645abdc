"""OpenLineage events of the training DAG, run by Airflow with the provider's file transport."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ridgeline.airflow.server import environment
from ridgeline.pipeline import StepResult, load_components
from ridgeline.registry import Pushed
from ridgeline.settings import Settings
from ridgeline.store import Execution

pytest.importorskip("openlineage.client")

ROOT = Path(__file__).resolve().parents[3]
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1_000}
RUN = """
import json, sys
from ridgeline.airflow.local import start_quickly

start_quickly()
from airflow.dag_processing.dagbag import DagBag
from airflow.utils.db import initdb

initdb()
dag = DagBag(sys.argv[2]).dags["fashion_mnist_training"]
dag.deadline = None  # dag.test fails where a DAG with a deadline succeeds
assert dag.test(run_conf=json.loads(sys.argv[1])).state == "success"
"""


def named(dataset: dict[str, Any]) -> tuple[str, str, str]:
    return dataset["namespace"], dataset["name"], dataset["facets"]["version"]["datasetVersion"]


@pytest.mark.airflow
def test_each_task_emits_its_artifacts_with_their_digests(
    synthetic: tuple[Settings, list[Execution]], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(synthetic[0].store, store)
    shutil.rmtree(store / "serving")
    shutil.copytree(ROOT / "dags", tmp_path / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    transport = {"type": "file", "log_file_path": str(tmp_path / "events.jsonl"), "append": True}
    env = environment(tmp_path, "airflow", os.environ) | {
        "RIDGELINE_STORE": str(store),
        "OPENLINEAGE__TRANSPORT": json.dumps(transport),
    }
    for name in ("RIDGELINE_MANUAL_DIR", "RIDGELINE_SERVING", "MLFLOW_TRACKING_URI"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(SYNTHETIC), str(tmp_path / "dags" / "fashion_mnist_training.py")],
        env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    emitted = {event["job"]["name"].rpartition(".")[2]: event for event in events if event["eventType"] == "RUNNING"}

    def artifact(ref: str) -> tuple[str, str, str]:
        return "file", f"{store}/artifacts/{ref}", ref.partition("/")[2]

    for execution in synthetic[1]:
        event = emitted[execution.component]
        assert {artifact(ref) for ref in execution.inputs.values()} == set(map(named, event["inputs"]))
        assert execution.output
        assert artifact(execution.output) in set(map(named, event["outputs"]))
    exported = next(execution.output for execution in synthetic[1] if execution.component == "export") or ""
    served = ("file", f"{store}/serving/synthetic_garments/1", exported.partition("/")[2])
    assert served in set(map(named, emitted["export"]["outputs"]))


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What would be emitted, with the provider turned on."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    from airflow.providers.openlineage import api, conf

    events: list[dict[str, Any]] = []
    monkeypatch.setattr(conf, "is_disabled", lambda: False)
    monkeypatch.setattr(api, "emit_dataset_lineage", lambda **given: events.append(given))
    return events


def test_objects_and_sources_are_named_as_openlineage_says(
    synthetic: tuple[Settings, list[Execution]],
    emitted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from ridgeline.airflow.openlineage import emit_lineage

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = Settings(store="s3://bucket/team/store")
    ingest = load_components()["ingest"]
    made = synthetic[1][0]
    made = made.model_copy(update={"parts": made.parts.model_copy(update={"sources": {"image_dir": "1" * 64}})})
    params = ingest.parse({"dataset": "folder", "name": "shop", "image_dir": "s3://shop/photos"})
    emit_lineage(settings, ingest, params, StepResult(made, None))
    (event,) = emitted
    (source,), (dataset,) = event["inputs"], event["outputs"]
    assert (source.namespace, source.name) == ("s3://shop", "photos")
    assert source.facets["version"].datasetVersion == "1" * 64
    assert (dataset.namespace, dataset.name) == ("s3://bucket", f"team/store/artifacts/{made.output}")


def test_a_version_that_was_not_pushed_now_is_no_output(
    synthetic: tuple[Settings, list[Execution]], emitted: list[dict[str, Any]], tmp_path: Path
) -> None:
    from ridgeline.airflow.openlineage import emit_lineage

    export, made = load_components()["export"], synthetic[1][-1]
    for new in (True, False):
        pushed = Pushed(str(tmp_path / "serving" / "shoes" / "1"), 1, "", new)
        emit_lineage(synthetic[0], export, export.parse({}), StepResult(made, pushed))
    assert [len(event["outputs"]) for event in emitted] == [2, 1]


def test_a_failure_is_logged_and_raises_nothing(
    synthetic: tuple[Settings, list[Execution]],
    emitted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from airflow.providers.openlineage import api

    from ridgeline.airflow.openlineage import emit_lineage

    def fail(**given: Any) -> None:
        raise ConnectionError("no route to https://ann:secret-word@example.org")

    monkeypatch.setattr(api, "emit_dataset_lineage", fail)
    export, made = load_components()["export"], synthetic[1][-1]
    emit_lineage(synthetic[0], export, export.parse({}), StepResult(made, None))
    (message,) = (r.getMessage() for r in caplog.records if r.name == "ridgeline.airflow.openlineage")
    assert message.startswith("Cannot emit OpenLineage events: no route to https://***@example.org.")
