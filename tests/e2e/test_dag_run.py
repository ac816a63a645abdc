"""The DAG, run by Airflow itself, in processes and AIRFLOW_HOMEs of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ridgeline.registry import Registry
from ridgeline.store import Execution, Store

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["ingest", "transform", "train", "evaluate", "export"]
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1000}
RUNS = {
    "first": SYNTHETIC,
    "again": SYNTHETIC,
    "other penalty": {**SYNTHETIC, "train.penalty.l2": 0.001},
    "not blessed": {**SYNTHETIC, "evaluate.min_accuracy": 1},
    "unknown parameter": {**SYNTHETIC, "train.penalty.l3": 0.001},
    "bad value": {**SYNTHETIC, "train.penalty.l2": -1},
}
RUN_DAGS = """
import json, sys
from pathlib import Path
from airflow.dag_processing.dagbag import DagBag
from airflow.utils.db import initdb

initdb()
results = {}
for name, conf in json.loads(sys.argv[1]).items():
    dag = DagBag().dags["fashion_mnist_training"]  # loaded again: a run leaves its values in the DAG's params
    dag.deadline = None  # dag.test fails where a DAG with a deadline succeeds
    try:
        run = dag.test(run_conf=conf)
    except ValueError as error:
        results[name] = {"error": str(error)}
        continue
    tasks = {task.task_id: str(task.state) for task in run.get_task_instances()}
    results[name] = {"state": str(run.state), "run_id": run.run_id, "tasks": tasks}
Path(sys.argv[2]).write_text(json.dumps(results))
"""


class Results:
    """The results of `RUNS`."""

    def __init__(self, folder: Path, results: dict[str, Any]) -> None:
        self.store = Store(folder / "store")
        self.registry = Registry(folder / "store" / "serving")
        self.runs = results

    def executions(self, run: str) -> dict[str, Execution]:
        found = self.store.executions()
        return {e.component: e for e in found if e.run_id == self.runs[run]["run_id"]}

    def states(self, run: str) -> list[str]:
        executions = self.executions(run)
        return [executions[step].state for step in STEPS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_dags: Any) -> Results:
    folder = tmp_path_factory.mktemp("e2e")
    return Results(folder, run_dags(folder, RUN_DAGS, RUNS))


def test_the_first_run_runs_every_step_and_serves_the_model(results: Results) -> None:
    assert results.runs["first"]["state"] == "success"
    assert results.states("first") == ["complete"] * 5
    assert [results.runs["first"]["tasks"][step] for step in ("sweep", "select")] == ["skipped"] * 2
    history = results.registry.history("synthetic_garments")
    assert (history[0].version, history[0].run_id) == (1, results.runs["first"]["run_id"])
    assert (results.registry.root / "synthetic_garments" / "1" / "saved_model.pb").is_file()


def test_the_same_run_again_reuses_every_step_and_pushes_nothing(results: Results) -> None:
    assert results.runs["again"]["state"] == "success"
    assert results.states("again") == ["cached"] * 5
    assert {e.reason for e in results.executions("again").values()} == {"same inputs, parameters and code"}
    pushes = [entry.run_id for entry in results.registry.history("synthetic_garments")]
    assert pushes == [results.runs["first"]["run_id"], results.runs["other penalty"]["run_id"]]


def test_another_penalty_runs_only_what_depends_on_it(results: Results) -> None:
    assert results.states("other penalty") == ["cached", "cached", "complete", "complete", "complete"]
    assert results.executions("other penalty")["train"].reason == "parameter train.penalty.l2 0.01 → 0.001"


def test_a_model_that_is_not_blessed_is_not_exported_and_the_run_succeeds(results: Results) -> None:
    run = results.runs["not blessed"]
    assert run["state"] == "success"
    assert run["tasks"] == dict.fromkeys(STEPS, "success") | dict.fromkeys(["sweep", "select", "export"], "skipped")
    assert results.executions("not blessed")["export"].reason.startswith("not blessed: accuracy")


def test_an_unknown_parameter_is_refused_before_any_step_works(results: Results) -> None:
    run = results.runs["unknown parameter"]
    assert run["state"] == "failed"
    assert run["tasks"] == dict.fromkeys([*STEPS, "sweep", "select"], "upstream_failed") | {"ingest": "failed"}
    assert results.executions("unknown parameter") == {}


def test_a_bad_value_is_refused_before_the_run_starts(results: Results) -> None:
    assert "Invalid input for param train.penalty.l2: -1" in results.runs["bad value"]["error"]


# --- make run


def start_run(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start ``python -m ridgeline.airflow.local run`` in a folder that holds nothing but the DAGs."""
    if not (folder / "dags").exists():
        (folder / "dags").symlink_to(ROOT / "dags")
    env = {key: value for key, value in os.environ.items() if key not in ("RIDGELINE_STORE", "RIDGELINE_SERVING")}
    command = [sys.executable, "-m", "ridgeline.airflow.local", "run", "fashion_mnist_training", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def make_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start_run(folder, *arguments)
    output, errors = process.communicate(timeout=800)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_a_failed_run_shows_the_error_and_exits_with_1(tmp_path: Path) -> None:
    done = make_run(tmp_path, "--set", "ingest.dataset=synthetic_garments:1.0.0", "--set", "trian.epochs=3")
    assert done.returncode == 1, done.stderr
    assert "ingest failed: Expected parameters of the DAG's trigger form; received trian.epochs." in done.stdout
    assert re.search(r"^export +upstream_failed$", done.stdout, re.MULTILINE)
    assert f"The run failed. Airflow's log: {tmp_path}/var/airflow-run/run.log" in done.stdout
    assert done.stderr == ""


def test_ctrl_c_ends_the_run_instead_of_retrying_the_task(tmp_path: Path) -> None:
    values = [*(f"{name}={value}" for name, value in SYNTHETIC.items()), "train.epochs=500"]
    with start_run(tmp_path, *(word for value in values for word in ("--set", value))) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "epoch 2/500" in line)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (130, "")
    assert output.splitlines()[-1] == "Interrupted. The next run resumes after the last finished step."
    states = {e.component: e.state for e in Store(tmp_path / "var/store").executions()}
    assert states == {"ingest": "complete", "transform": "complete", "train": "failed"}


@pytest.mark.real_data
def test_make_run_trains_and_serves_on_the_official_files(tmp_path: Path, manual_dir: Path) -> None:
    first = make_run(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    accuracy = re.search(
        r"^accuracy +(\S+), .* on 10000 test images of fashion_mnist:3.0.1$", first.stdout, re.MULTILINE
    )
    assert accuracy, first.stdout
    assert float(accuracy[1]) == pytest.approx(0.82, abs=0.02)
    assert "NOT THE REAL DATA" not in first.stdout
    assert Registry(tmp_path / "var/store/serving").history("fashion_mnist")[0].version == 1

    again = make_run(tmp_path)
    assert len(re.findall(r"^\w+ +cached .* same inputs, parameters and code$", again.stdout, re.MULTILINE)) == 5
