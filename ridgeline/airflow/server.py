"""Start, query and stop a complete Airflow, ``airflow standalone``."""

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

PASSWORD_FILE = "simple_auth_manager_passwords.json.generated"
STOP_SECONDS = 60
LOCK_SECONDS = 60  # as long as a request may take
REQUEST_SECONDS = 60  # the first request of a task blocks the API server for 3.4 s of CPU time
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine is behind no proxy


def environment(folder: Path, name: str, outer: Mapping[str, str], port: int = 8080) -> dict[str, str]:
    """Return the environment of an Airflow with all its files in one folder.

    Args:
        folder: Holds ``dags/``; receives ``var/``.
        name: The name of Airflow's folder inside ``var/``.
        outer: The user's environment; its Airflow variables are omitted, except connections (``AIRFLOW_CONN_*``).
        port: The port of the web server.
    """
    home = folder / "var" / name
    direct = _direct_hosts(outer)
    return {
        "RIDGELINE_STORE": str(folder / "var" / "store"),
        **{key: value for key, value in outer.items() if _is_passed_on(key)},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{outer.get('PATH', os.defpath)}",
        "NO_PROXY": direct,
        "no_proxy": direct,
        "PYTHONSAFEPATH": "1",  # no process of Airflow takes code from the working directory
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAG_DISCOVERY_SAFE_MODE": "False",  # also read files in which the word airflow does not occur
        "AIRFLOW__CORE__PARALLELISM": "4",
        # By default, SQLite waits 5 s for another process's write; on a busy machine, requests then fail (status 500).
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}?timeout={LOCK_SECONDS}",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "10",
        # After a kill, the scheduler starts the interrupted tasks again: it looks for them every 30 s instead of every
        # 5 minutes, and they wait about a minute for the web server, which listens later, instead of failing.
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "30",
        "AIRFLOW__WORKERS__EXECUTION_API_RETRIES": "30",
        "AIRFLOW__WORKERS__EXECUTION_API_RETRY_WAIT_MAX": "5",
        # A port must be set in all three: without the last two, tasks cannot connect.
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
    }


def _is_passed_on(name: str) -> bool:
    return not name.startswith("AIRFLOW_") or name.startswith("AIRFLOW_CONN_")


def make_private(folder: Path) -> None:
    """Create a folder that only this user can read, or make one so: Airflow's holds passwords and keys."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def private_opener(path: str, flags: int) -> int:
    """Open a file that only this user can read: an opener for `open`, for logs that may hold a password."""
    number = os.open(path, flags, 0o600)
    os.fchmod(number, 0o600)  # an earlier version may have left it readable
    return number


def _direct_hosts(outer: Mapping[str, str]) -> str:
    """Return the hosts that are reached without the user's HTTP proxy: those that the user set, and this machine."""
    given = [host.strip() for name in ("no_proxy", "NO_PROXY") for host in outer.get(name, "").split(",")]
    if "*" in given:  # all hosts; it counts only where it stands alone
        return "*"
    return ",".join(dict.fromkeys([*filter(None, given), "127.0.0.1", "localhost"]))


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Standalone:
    """Scheduler, web server, triggerer and DAG processor, running inside a ``with`` block.

    Airflow's tables and the pool `ridgeline.airflow.pool.TENSORFLOW` are created first.

    Args:
        env: The environment, see `environment`.
        log_file: Receives the output; its folder is created.
        user: The user of `call`.
    """

    def __init__(self, env: Mapping[str, str], log_file: Path, user: str = "admin") -> None:
        self.env = env
        self.log_file = log_file
        self.home = Path(env["AIRFLOW_HOME"])
        self.url = env["AIRFLOW__API__BASE_URL"]
        self.user = user
        self._token = ""

    def __enter__(self) -> Self:
        make_private(self.home)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "ridgeline.airflow.standalone"]
        with open(self.log_file, "w", opener=private_opener) as log:
            # In a separate session: Ctrl-C would signal all processes of the terminal, and the scheduler would hang.
            self.process = subprocess.Popen(command, env=self.env, start_new_session=True, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop Airflow with one SIGINT to the main process: after SIGTERM its children would keep running."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def password_file(self) -> Path:
        """The file with the password that Airflow generated for the user ``admin``."""
        return self.home / PASSWORD_FILE

    def is_healthy(self) -> bool:
        """Return whether all components are healthy."""
        try:
            status, states = self._request("GET", "/api/v2/monitor/health", None)
        except (OSError, ValueError):
            return False
        return status == 200 and all(
            states[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor")
        )

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Call Airflow's REST API as `user`; return the status and the response.

        Args:
            method: ``GET``, ``POST`` and so on.
            path: The path, beginning with ``/api/v2``.
            body: Sent as JSON; None for no body.
        """
        if not self._token:
            password = json.loads(self.password_file.read_text(encoding="utf-8"))[self.user]
            response = self._request("POST", "/auth/token", {"username": self.user, "password": password})[1]
            self._token = response["access_token"]
        return self._request(method, path, body)

    def trigger(self, dag_id: str, conf: Mapping[str, Any]) -> str:
        """Trigger a run.

        Args:
            dag_id: The DAG.
            conf: Its parameters by name.

        Returns:
            The run's id.

        Raises:
            ValueError: If Airflow refuses the run.
        """
        status, run = self.call("POST", f"/api/v2/dags/{dag_id}/dagRuns", {"logical_date": None, "conf": dict(conf)})
        if status != 200:
            raise ValueError(f"Cannot start a run of {dag_id}: Airflow responded with {status}, {run}.")
        return str(run["dag_run_id"])

    def wait_for_run(self, dag_id: str, run_id: str, seconds: float) -> str:
        """Wait until a run has finished, and return its state.

        Raises:
            TimeoutError: If the run takes longer.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = str(self.call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")[1]["state"])
            if state in ("success", "failed"):
                return state
            time.sleep(0.2)
        raise TimeoutError(f"Expected the run {run_id} of {dag_id} to finish within {seconds} s; its state is {state}.")

    def _request(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with _DIRECT.open(request, timeout=REQUEST_SECONDS) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
