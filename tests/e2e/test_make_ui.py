"""What `make ui` runs, in the way that users have it: behind a proxy, with any umask, killed and started again."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ridgeline.airflow.server import Standalone, environment, free_port
from tests.processes import kill

pytestmark = pytest.mark.airflow
SLOW = """
import time
from datetime import timedelta
from pathlib import Path
from airflow.sdk import dag, task

@dag(schedule=None, is_paused_upon_creation=False, default_args={{"retries": 1, "retry_delay": timedelta(seconds=10)}})
def slow():
    @task
    def train():
        while not Path({goes_on!r}).exists():
            time.sleep(0.1)

    train()

slow()
"""


def wait_for(what: str, happened: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.5)


def test_a_run_survives_a_kill_and_only_the_user_can_read_the_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "slow.py").write_text(SLOW.format(goes_on=str(tmp_path / "goes_on")))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")  # nothing listens there
    env = environment(tmp_path, "airflow-ui", os.environ, free_port())
    env["AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD"] = "12"  # seconds; a heartbeat is sent every 5
    home = tmp_path / "var" / "airflow-ui"
    home.mkdir(parents=True)
    (home / "standalone.log").touch(0o666)
    umask = os.umask(0)
    try:
        with Standalone(env, home / "standalone.log") as airflow:
            wait_for("Airflow", airflow.is_healthy)
            wait_for("the DAG", lambda: airflow.call("GET", "/api/v2/dags/slow")[0] == 200)
            run_id = airflow.trigger("slow", {})
            task = f"/api/v2/dags/slow/dagRuns/{run_id}/taskInstances/train"
            wait_for("the task", lambda: airflow.call("GET", task)[1]["state"] == "running")
            kill(airflow.process)
            (tmp_path / "goes_on").touch()
    finally:
        os.umask(umask)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in [home, *home.iterdir()] if path.exists()}
    secret = ["simple_auth_manager_passwords.json.generated", "standalone.log", "airflow.cfg", "airflow.db"]
    assert modes["airflow-ui"] == "0o700"
    assert {name: modes[name] for name in secret} == dict.fromkeys(secret, "0o600")
    password = json.loads(airflow.password_file.read_text())["admin"]
    assert password not in (home / "standalone.log").read_text()

    time.sleep(13)  # then the new scheduler takes the old one for dead, and starts the task again at once
    with Standalone(env, home / "standalone.log") as airflow:
        wait_for("Airflow", airflow.is_healthy)
        assert airflow.wait_for_run("slow", run_id, 180) == "success"
        assert password not in (home / "standalone.log").read_text()
