"""A training task that is killed in a real Airflow: the scheduler's retry goes on from the checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.train import train
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.embedded_airflow import PASSWORD_FILE, environment
from ridgeline.pipeline import StepResult
from ridgeline.settings import Settings
from ridgeline.store import Store

ROOT = Path(__file__).resolve().parents[2]
PORT = 8191
URL = f"http://127.0.0.1:{PORT}"
EPOCHS = 150
CONF = {
    "ingest.dataset": "synthetic_garments:1.0.0",
    "transform.validation_examples": 1000,
    "train.epochs": EPOCHS,
    "train.momentum": 0.9,
    "train.hidden_units": [8],
}


def until(expected: Callable[[], Any], seconds: float = 300.0) -> Any:
    """Return what a function returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := expected()):
        assert time.monotonic() < end, f"not within {seconds} s: {expected}"
        time.sleep(0.2)
    return value


def call(path: str, token: str = "", body: Any = None, method: str | None = None) -> Any:
    """Return the web server's JSON answer; None while it does not answer."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, content, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
    except OSError:
        return None


@pytest.fixture
def airflow(tmp_path: Path, synthetic: tuple[Settings, list[StepResult]]) -> Iterator[Path]:
    """The folder of a running ``airflow standalone``, and of a store that holds the synthetic examples."""
    shutil.copytree(synthetic[0].store, tmp_path / "store")
    env = environment(tmp_path, "airflow", os.environ, PORT)
    env |= {"AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"), "RIDGELINE_STORE": str(tmp_path / "store")}
    for name in ("RIDGELINE_MANUAL_DIR", "RIDGELINE_SERVING"):
        env.pop(name, None)
    Path(env["AIRFLOW_HOME"]).mkdir(parents=True)
    command = [sys.executable, "-m", "airflow", "standalone"]
    with (tmp_path / "standalone.log").open("w") as log:
        process = subprocess.Popen(command, env=env, start_new_session=True, stdout=log, stderr=log)
        try:
            yield tmp_path
        finally:
            process.send_signal(signal.SIGINT)  # to it alone, once: it stops its children
            process.wait(timeout=120)


def test_a_killed_training_is_retried_from_its_checkpoint_to_the_same_bytes(airflow: Path, tmp_path: Path) -> None:
    password_file = airflow / "var/airflow" / PASSWORD_FILE
    until(lambda: password_file.exists() and call("/api/v2/version"))
    login = {"username": "admin", "password": json.loads(password_file.read_text())["admin"]}
    token = until(lambda: call("/auth/token", body=login))["access_token"]
    dag = "/api/v2/dags/fashion_mnist_training"
    runs = f"{dag}/dagRuns"
    run_id = until(lambda: call(runs, token, {"logical_date": None, "conf": CONF}))["dag_run_id"]

    def task() -> dict[str, Any]:
        return until(lambda: call(f"{runs}/{run_id}/taskInstances/train", token))

    until(lambda: any((airflow / "store/scratch").glob("*/checkpoint")))
    os.kill(task()["pid"], signal.SIGKILL)
    until(lambda: task()["state"] == "up_for_retry")
    until(lambda: task()["state"] in ("running", "success", "failed"))
    assert call(dag, token, {"is_paused": True}, "PATCH")  # no later task is to start: Airflow's end would wait for it
    until(lambda: task()["state"] in ("success", "failed"))

    assert task()["try_number"] == 2
    (log,) = (airflow / "var/airflow/logs").glob(f"*/run_id={run_id}/task_id=train/attempt=2.log")
    assert re.search(rf"resuming from epoch \d+ of {EPOCHS}", log.read_text())
    store = Store(airflow / "store")
    execution = next(store.executions("train"))
    assert (execution.run_id, execution.state) == (run_id, "complete")
    examples = store.open(execution.inputs["examples"], Examples)
    values = {name.removeprefix("train."): value for name, value in CONF.items() if name.startswith("train.")}
    (tmp_path / "whole").mkdir()
    whole = train(examples=examples, params=train.parse(values), output=tmp_path / "whole")
    assert store.open(execution.output or "", Model).digest == whole.digest
