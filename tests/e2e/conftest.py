"""An Airflow that is wholly there: scheduler, web server, triggerer, in a folder of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ridgeline.embedded_airflow import PASSWORD_FILE, environment

ROOT = Path(__file__).resolve().parents[2]


class Airflow:
    """A running ``airflow standalone``."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.home = folder / "var" / "airflow"
        self.token = ""

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return the status and the answer of Airflow's REST API."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def password(self) -> str:
        """Return the password of the user ``admin``."""
        return json.loads((self.home / PASSWORD_FILE).read_text())["admin"]

    def log_in(self) -> None:
        """Get a token for `call`."""
        status, answer = self.call("POST", "/auth/token", {"username": "admin", "password": self.password()})
        assert status == 201, answer
        self.token = answer["access_token"]

    def trigger(self, dag: str, conf: dict[str, Any]) -> str:
        """Trigger a run and return its id."""
        status, run = self.call("POST", f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})
        assert status == 200, run
        return run["dag_run_id"]

    def runs(self, dag: str) -> list[dict[str, Any]]:
        """Return a DAG's runs, oldest first."""
        return self.call("GET", f"/api/v2/dags/{dag}/dagRuns?order_by=run_after")[1]["dag_runs"]

    def tasks(self, dag: str, run: str) -> dict[str, dict[str, Any]]:
        """Return a run's task instances by task."""
        found = self.call("GET", f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances")[1]["task_instances"]
        return {task["task_id"]: task for task in found}

    def log(self, dag: str, run: str, task: str) -> str:
        """Return the log of a task's last try."""
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/{task}"
        number = self.call("GET", path)[1]["try_number"]
        return json.dumps(self.call("GET", f"{path}/logs/{number}")[1], ensure_ascii=False)

    def wait(self, what: str, happened: Callable[[], Any], seconds: float = 300) -> Any:
        """Wait until something is true, and return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if result := happened():
                return result
            time.sleep(0.5)
        log = (self.folder / "standalone.log").read_text()[-5000:]
        raise TimeoutError(f"Waited {seconds} s for {what}. Airflow's log ends with:\n{log}")

    def wait_for_run(self, dag: str, run: str, seconds: float = 300) -> str:
        """Wait until a run is done, and return its state."""

        def state() -> str | None:
            found = self.call("GET", f"/api/v2/dags/{dag}/dagRuns/{run}")[1]["state"]
            return found if found in ("success", "failed") else None

        return self.wait(f"run {run} to be done", state, seconds)

    def is_healthy(self) -> bool:
        """Tell whether all of its parts run."""
        try:
            states = self.call("GET", "/api/v2/monitor/health")[1]
        except (OSError, ValueError):
            return False
        return all(states[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def airflow(folder: Path, **settings: str) -> Iterator[Airflow]:
    """Run ``airflow standalone`` with the project's DAGs and a store in the folder, logged in.

    Args:
        folder: Receives everything.
        **settings: More environment variables.
    """
    port = free_port()
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RIDGELINE_")}
    env = environment(folder, "airflow", outer, port) | {"AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags")} | settings
    running = Airflow(folder, f"http://127.0.0.1:{port}")
    command = [sys.executable, "-m", "airflow", "standalone"]
    with (
        (folder / "standalone.log").open("w") as log,
        subprocess.Popen(command, env=env, start_new_session=True, stdout=log, stderr=log) as process,
    ):
        try:
            running.wait("Airflow to be healthy", running.is_healthy)
            running.wait("the password", (running.home / PASSWORD_FILE).exists)
            running.log_in()
            yield running
        finally:
            process.send_signal(signal.SIGINT)  # one, to it alone: SIGTERM would orphan its children
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def start_airflow() -> Callable[..., Any]:
    """The context manager `airflow`."""
    return airflow
