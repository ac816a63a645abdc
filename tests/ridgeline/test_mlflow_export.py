"""The export to MLflow, with MLflow's own client, a database in a file, and servers that fail."""

import json
import logging
import logging.handlers
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ridgeline import mlflow_export, pipeline
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.store import Execution, Store

pytestmark = pytest.mark.fresh_process

READ = """
import json, os, sys
from mlflow import MlflowClient
client = MlflowClient()
experiment = client.get_experiment_by_name(sys.argv[1]).experiment_id
runs = [
    {
        "status": run.info.status, "name": run.info.run_name, "tags": run.data.tags, "params": run.data.params,
        "metrics": run.data.metrics, "files": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        "history": [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, "val_accuracy")],
    }
    for run in client.search_runs([experiment])
]
models = [[model.name, str(model.status), model.artifact_location, model.source_run_id]
          for model in client.search_logged_models([experiment])]
print(json.dumps([runs, models]))
"""


@pytest.fixture(scope="module")
def run_id(synthetic):
    return synthetic[1][0].run_id


def read(experiment="synthetic_garments"):
    """Return the runs and models of an experiment."""
    done = subprocess.run([sys.executable, "-c", READ, experiment], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def use_database(folder, patch):
    """Let MLflow use its own store in a file."""
    pytest.importorskip("mlflow")
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    patch.chdir(folder)  # without a server, MLflow writes artifacts into the working directory


@pytest.fixture
def database(tmp_path, monkeypatch):
    """An empty store of MLflow; the function that returns the runs and models of an experiment."""
    use_database(tmp_path, monkeypatch)
    return read


@pytest.fixture(scope="module")
def exported(synthetic_store, run_id, tmp_path_factory):
    """What MLflow holds of a run that was exported twice, and what was logged."""
    handler = logging.handlers.BufferingHandler(100)
    with pytest.MonkeyPatch.context() as patch:
        use_database(tmp_path_factory.mktemp("exported"), patch)
        logger = logging.getLogger(mlflow_export.__name__)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        for _ in range(2):
            mlflow_export.export_run(synthetic_store, run_id, 1)
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        return *read(), [record.getMessage() for record in handler.buffer]


def test_nothing_happens_without_a_server(synthetic_store, run_id, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(subprocess, "run", None)
    mlflow_export.export_run(synthetic_store, run_id, 1)
    assert not caplog.messages


def test_without_the_extra_one_line_says_so(synthetic_store, run_id, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    mlflow_export.export_run(synthetic_store, run_id, 1)
    assert caplog.messages == [
        "Cannot export to MLflow: MLFLOW_TRACKING_URI is set, but mlflow is not installed. Install ridgeline[mlflow]."
    ]


def test_a_run_is_exported_once_with_its_model(synthetic_store, refs, run_id, exported):
    (run,), ((name, status, _, source),), logged = exported
    assert ["exported as run" in logged[0], "was exported before" in logged[1]] == [True, True]
    assert (run["status"], run["name"]) == ("FINISHED", run_id)
    assert run["tags"]["ridgeline.evaluation"] == refs["evaluate"]
    assert run["tags"]["ridgeline.model"] == refs["train"]
    assert run["tags"]["ridgeline.version"] == "1"
    assert run["params"]["ingest.dataset"] == "synthetic_garments:1.0.0"
    assert run["params"]["train.penalty.kind"] == "l2"
    assert run["files"] == ["model-card.html", "model-card.md", "report.html"]
    history = synthetic_store.open(refs["train"], Model).history()["val_accuracy"]
    assert run["history"] == [[epoch, value] for epoch, value in enumerate(history, start=1)]
    facts = synthetic_store.open(refs["evaluate"], ModelEvaluation).facts
    assert run["metrics"]["test_accuracy"] == facts.accuracy
    assert (name, status) == ("synthetic_garments", "READY")
    assert source


def test_mlflows_folder_serves_the_evaluations_predictions(synthetic_store, refs, exported):
    import tensorflow as tf

    _, ((_, _, location, _),), _ = exported
    folder = Path(location.removeprefix("file://"))
    described = json.loads((folder / "MLmodel").read_text())
    flavor = described["flavors"]["tensorflow"]
    loaded = tf.saved_model.load(str(folder / flavor["saved_model_dir"]), tags=flavor["meta_graph_tags"])
    serve = loaded.signatures[flavor["signature_def_key"]]
    check = synthetic_store.open(refs["export"], PushedModel).check
    served = serve(images=tf.constant(np.load(check / "images.npy")))
    np.testing.assert_allclose(served["probabilities"].numpy(), np.load(check / "probabilities.npy"), atol=1e-5)
    assert {entry["name"] for entry in json.loads(described["signature"]["outputs"])} == served.keys()
    (images,) = json.loads(described["signature"]["inputs"])
    assert images["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 28, 28]}


def test_the_experiment_may_be_named(synthetic_store, run_id, database, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "my experiment")
    mlflow_export.export_run(synthetic_store, run_id, None)
    (run,), _ = database("my experiment")
    assert "ridgeline.version" not in run["tags"]


def test_a_run_without_a_blessed_model_has_no_model(synthetic, tmp_path, database):
    settings, executions = synthetic
    shutil.copytree(settings.store, tmp_path / "store")
    store = Store(tmp_path / "store")
    for execution in executions:
        if execution.component != "export":
            store.record(Execution.model_validate(execution.model_dump() | {"run_id": "not blessed"}))
    mlflow_export.export_run(store, "not blessed", None)
    (run,), models = database()
    assert (run["files"], models) == (["report.html"], [])


def test_a_run_that_evaluated_nothing_is_not_exported(store, database, caplog):
    mlflow_export.export_run(store, "no such run", None)
    assert not caplog.messages


def test_an_export_that_failed_half_way_is_marked_and_repeated(synthetic_store, run_id, database, tmp_path, caplog):
    (tmp_path / "mlruns").write_text("no folder for artifacts")
    mlflow_export.export_run(synthetic_store, run_id, 1)
    assert_one_line(caplog, "mlruns")
    assert [run["status"] for run in database()[0]] == ["FAILED"]
    (tmp_path / "mlruns").unlink()
    mlflow_export.export_run(synthetic_store, run_id, 1)
    runs, models = database()
    assert sorted(run["status"] for run in runs) == ["FAILED", "FINISHED"]
    assert [status for _, status, _, _ in models] == ["READY"]


class Failing(BaseHTTPRequestHandler):
    """Answers each request with status 500."""

    def do_GET(self):
        self.send_error(500, "out of order")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


def assert_one_line(caplog, *parts):
    (message,) = (record.getMessage() for record in caplog.records if record.name == mlflow_export.__name__)
    assert message.startswith("Cannot export to MLflow at ")
    assert message.endswith(" The run itself is not affected.")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_server_that_is_down_gives_one_line(synthetic_store, run_id, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:s3cret-word@127.0.0.1:{port}")
    mlflow_export.export_run(synthetic_store, run_id, 1)
    assert_one_line(caplog, "Connection refused")
    assert "s3cret-word" not in caplog.text


def test_a_server_that_fails_gives_one_line(synthetic_store, run_id, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        mlflow_export.export_run(synthetic_store, run_id, 1)
        server.shutdown()
    assert_one_line(caplog, "500")


def test_a_server_that_hangs_gives_one_line(synthetic_store, run_id, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        mlflow_export.export_run(synthetic_store, run_id, 1)
    assert_one_line(caplog, "timed out")


def test_the_time_for_all_of_it_is_limited(synthetic_store, run_id, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setattr(mlflow_export, "LIMIT_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    mlflow_export.export_run(synthetic_store, run_id, 1)
    assert_one_line(caplog, "no response within 0.5 s")


def test_a_run_whose_export_fails_ends_as_without_it(synthetic, tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    settings, executions = synthetic
    shutil.copytree(settings.store, tmp_path / "store")
    settings = settings.model_copy(update={"store": str(tmp_path / "store")})
    export = next(execution for execution in executions if execution.component == "export")
    calls = []

    def fail(store, run_id, version):
        calls.append((run_id, version))
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(mlflow_export, "_export", fail)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    component = pipeline.load_components()["export"]
    result = pipeline.run_step(settings, component, export.inputs, component.parse({}), "again")
    assert result.execution.state == "cached"
    assert calls == [("again", None)]
    assert_one_line(caplog, "division by zero")
