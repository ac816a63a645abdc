"""Airflow for the tests: DAGs run in one process, or a complete Airflow with scheduler and web server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ridgeline.airflow.server import Standalone, environment, free_port

ROOT = Path(__file__).resolve().parents[2]


class Airflow(Standalone):
    """A running ``airflow standalone``, with queries for tests."""

    @property
    def store(self) -> str:
        """The store's root."""
        return self.env["RIDGELINE_STORE"]

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """Return a DAG's runs, oldest first."""
        return self.call("GET", f"/api/v2/dags/{dag_id}/dagRuns?order_by=run_after")[1]["dag_runs"]

    def states(self, dag_id: str, run_id: str) -> dict[str, str]:
        """Return the states of a run's tasks."""
        found = self.call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances")[1]["task_instances"]
        return {task["task_id"]: task["state"] for task in found}

    def log(self, dag_id: str, run_id: str, task_id: str) -> str:
        """Return the log of a task's last try."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        number = self.call("GET", path)[1]["try_number"]
        return json.dumps(self.call("GET", f"{path}/logs/{number}")[1], ensure_ascii=False)

    def wait(self, what: str, happened: Callable[[], Any], seconds: float = 300) -> Any:
        """Wait until something is true, and return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if result := happened():
                return result
            time.sleep(0.5)
        raise TimeoutError(
            f"Waited {seconds} s for {what}. Airflow's log ends with:\n{self.log_file.read_text()[-5000:]}"
        )


@contextmanager
def airflow(folder: Path, **settings: str) -> Iterator[Airflow]:
    """Run Airflow with the project's DAGs and a store in the folder.

    Args:
        folder: Receives all files.
        **settings: More environment variables.
    """
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RIDGELINE_")}
    env = environment(folder, "airflow", outer, free_port()) | {"AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags")}
    with Airflow(env | settings, folder / "standalone.log") as running:
        running.wait("Airflow to be healthy", running.is_healthy)
        running.wait("the password", running.password_file.exists)
        num_dags = len(list((ROOT / "dags").glob("[!_]*.py")))
        running.wait("the DAGs", lambda: running.call("GET", "/api/v2/dags")[1]["total_entries"] == num_dags)
        yield running


@pytest.fixture(scope="session")
def run_dags() -> Callable[[Path, str, Any], Any]:
    """Run a program on the project's DAGs. It gets a value as JSON and writes its result as JSON into a file."""

    def run(folder: Path, program: str, value: Any) -> Any:
        env = environment(folder, "airflow", os.environ)
        env |= {"AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"), "RIDGELINE_STORE": str(folder / "store")}
        for name in ("RIDGELINE_MANUAL_DIR", "RIDGELINE_SERVING"):
            env.pop(name, None)
        report = folder / "results.json"
        command = [sys.executable, "-c", program, json.dumps(value), str(report)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return json.loads(report.read_text())

    return run


@pytest.fixture(scope="session")
def start_airflow() -> Callable[..., Any]:
    """The context manager `airflow`."""
    return airflow
