"""Export of runs to an MLflow tracking server, which MLflow's own environment variables name; off without one.

MLflow runs in a process of its own: its threads, its log and its timeouts stay outside of the step. Nothing that it
does changes the outcome of a run of the pipeline.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import CARD_MARKDOWN, PushedModel
from ridgeline.masking import mask, remember
from ridgeline.store import Execution, Store

log = logging.getLogger(__name__)

SERVER = "MLFLOW_TRACKING_URI"
LIMIT_SECONDS = 300
# By default, MLflow waits for a server that hangs for two minutes, eight times, and reports its use to its makers.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
BATCH = 100  # parameters or metrics of a request
MAX_CHARACTERS = 6_000  # of a parameter's value
SHOWN_CHARACTERS = 600  # of an error
TAG = "ridgeline.evaluation"


def export_run(store: Store, run_id: str, version: int | None) -> None:
    """Export a run that evaluated a model: parameters, metrics by epoch, test metrics, report, model card and model.

    Nothing happens if ``MLFLOW_TRACKING_URI`` is not set, the run evaluated no model, or the server has the evaluation
    already: a run that is repeated adds nothing. A failure is logged in one line and raises nothing.

    Args:
        store: Holds the artifacts.
        run_id: The run.
        version: The version that it pushed; None if it pushed none.
    """
    server = os.environ.get(SERVER)
    if not server:
        return
    remember(server)
    if importlib.util.find_spec("mlflow") is None:
        log.warning(
            "Cannot export to MLflow: %s is set, but mlflow is not installed. Install ridgeline[mlflow].", SERVER
        )
        return
    try:
        outcome = _export(store, run_id, version)
    except Exception as error:  # nothing here may fail the run
        cause = f"no response within {LIMIT_SECONDS} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        reason = mask(" ".join(cause.split()))[:SHOWN_CHARACTERS]
        log.warning("Cannot export to MLflow at %s: %s. The run itself is not affected.", mask(server), reason)
    else:
        if outcome:
            log.info("MLflow at %s: %s", mask(server), outcome)


def _export(store: Store, run_id: str, version: int | None) -> str:
    """Return what was done; empty if the run evaluated no model."""
    records: dict[str, Execution] = {}
    for execution in store.executions(run_id=run_id):
        records.setdefault(execution.component, execution)  # newest first
    refs = {ref.partition("/")[0]: ref for execution in records.values() if (ref := execution.output)}
    if not {Model.__name__, ModelEvaluation.__name__} <= refs.keys():
        return ""
    model = store.open(refs[Model.__name__], Model)
    evaluation = store.open(refs[ModelEvaluation.__name__], ModelEvaluation)
    pushed = store.open(refs[PushedModel.__name__], PushedModel) if PushedModel.__name__ in refs else None
    cards = [pushed.card, pushed.card.with_name(CARD_MARKDOWN)] if pushed and pushed.card else []
    request = {
        "experiment": model.facts.model_name,
        "run_name": run_id,
        "tags": {
            TAG: evaluation.ref,
            "ridgeline.model": model.ref,
            "ridgeline.dataset": model.facts.dataset,
            "ridgeline.blessed": str(evaluation.facts.verdict.blessed),
            "ridgeline.synthetic": str(evaluation.facts.synthetic),
            **({"ridgeline.version": str(version)} if version else {}),
        },
        "params": dict(_params(records)),
        "metrics": list(_metrics(model, evaluation)),
        "files": [str(path) for path in (evaluation.report, *cards) if path],
        "started_at": min(_milliseconds(execution) for execution in records.values()),
        "model": _model(pushed) if pushed else None,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ridgeline.mlflow_export"],
        input=json.dumps(request),
        env=DEFAULTS | os.environ,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise OSError(done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}")
    return done.stdout.strip().rpartition("\n")[2]


def _params(records: Mapping[str, Execution]) -> Iterator[tuple[str, str]]:
    for step, execution in records.items():
        for name, value in execution.parts.params.items():
            yield f"{step}.{name}", str(value)[:MAX_CHARACTERS]


def _metrics(model: Model, evaluation: ModelEvaluation) -> Iterator[tuple[str, float, int]]:
    """Yield name, value and epoch, from 1; the metrics on the test split have the last epoch."""
    epoch = 0
    for name, values in model.history().items():
        for epoch, value in enumerate(values, start=1):
            yield name, value, epoch
    facts = evaluation.facts
    low, high = facts.accuracy_interval
    for name, value in (
        ("test_accuracy", facts.accuracy),
        ("test_accuracy_low", low),
        ("test_accuracy_high", high),
        ("test_cross_entropy", facts.cross_entropy),
        ("test_calibration_error", facts.calibration_error),
        ("test_min_class_recall", min(metrics.recall for metrics in facts.classes)),
    ):
        yield name, value, epoch


def _milliseconds(execution: Execution) -> int:
    return round(execution.started_at.timestamp() * 1_000)


def _model(pushed: PushedModel) -> dict[str, Any]:
    """Return the folder of the SavedModel, and what MLflow's file ``MLmodel`` says about it."""

    def tensor(name: str, dtype: str, *shape: int) -> dict[str, Any]:
        return {"name": name, "type": "tensor", "tensor-spec": {"dtype": dtype, "shape": [-1, *shape]}}

    outputs = [
        tensor("probabilities", "float32", len(pushed.facts.class_names)),
        tensor("class_id", "int64"),
        tensor("class_name", "object"),
    ]
    flavor = {
        "model_type": "tf1-estimator",  # MLflow's name of any SavedModel that is called by its signature
        "saved_model_dir": "saved_model",
        "meta_graph_tags": ["serve"],
        "signature_def_key": "serving_default",
    }
    return {
        "name": pushed.facts.model_name,
        "saved_model": str(pushed.saved_model),
        "description": {
            "flavors": {
                "tensorflow": flavor,
                "python_function": {
                    "loader_module": "mlflow.tensorflow",
                    "python_version": platform.python_version(),
                    "env": {"virtualenv": "python_env.yaml"},
                },
            },
            "signature": {
                "inputs": json.dumps([tensor("images", "uint8", *pushed.facts.image_shape)]),
                "outputs": json.dumps(outputs),
                "params": None,
            },
        },
    }


# --- in MLflow's process


def main() -> None:
    """Export the request on the standard input; print what was done in one line, or why it failed."""
    request = json.load(sys.stdin)
    try:
        print(_send(request))
    except Exception as error:  # MLflow and its transports raise many kinds
        raise SystemExit(" ".join(f"{type(error).__name__}: {error}".split())) from None


def _send(request: Mapping[str, Any]) -> str:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = _experiment(client, request["experiment"])
    same = f"tags.`{TAG}` = '{request['tags'][TAG]}' and attributes.status = 'FINISHED'"
    if client.search_runs([experiment], same, max_results=1):
        return "the evaluation was exported before"
    run = client.create_run(experiment, request["started_at"], request["tags"], request["run_name"]).info.run_id
    try:
        _fill(client, experiment, run, request)
    except BaseException:
        with contextlib.suppress(Exception):
            client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run, "FINISHED")
    return f"exported as run {run} of experiment {experiment}"


def _experiment(client: Any, name: str) -> str:
    """Return the id of the experiment that MLflow's variables name; else of the one with the model's name."""
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def _fill(client: Any, experiment: str, run: str, request: Mapping[str, Any]) -> None:
    from mlflow.entities import Metric, Param

    params = [Param(name, value) for name, value in request["params"].items()]
    metrics = [Metric(name, value, request["started_at"], epoch) for name, value, epoch in request["metrics"]]
    for start in range(0, max(len(params), len(metrics)), BATCH):
        stop = start + BATCH
        client.log_batch(run, metrics[start:stop], params[start:stop], synchronous=True)
    for file in request["files"]:
        client.log_artifact(run, file)
    if model := request["model"]:
        logged = client.create_logged_model(experiment, model["name"], run)
        try:
            with tempfile.TemporaryDirectory(prefix="ridgeline-mlflow-") as folder:
                _write_description(Path(folder), model, logged.model_id, run)
                client.log_model_artifacts(logged.model_id, folder)
            client.log_model_artifacts(logged.model_id, model["saved_model"], "saved_model")
            client.finalize_logged_model(logged.model_id, "READY")
        except BaseException:
            with contextlib.suppress(Exception):
                client.finalize_logged_model(logged.model_id, "FAILED")
            raise


def _write_description(folder: Path, model: Mapping[str, Any], model_id: str, run: str) -> None:
    """Write what a folder in MLflow's format has beside the SavedModel: `MLmodel` and the requirements."""
    import importlib.metadata

    import mlflow

    versions = [f"{name}=={importlib.metadata.version(name)}" for name in ("tensorflow", "keras", "numpy")]
    (folder / "requirements.txt").write_text("\n".join(["mlflow", *versions]) + "\n")
    description = {"model_id": model_id, "run_id": run, "mlflow_version": mlflow.__version__, **model["description"]}
    (folder / "MLmodel").write_text(json.dumps(description, indent=1))  # YAML: JSON is a part of it
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(json.dumps(environment))


if __name__ == "__main__":
    main()
