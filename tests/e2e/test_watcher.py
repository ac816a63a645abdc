"""A folder that is watched, by an Airflow of its own that is stopped and started again."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ridgeline.airflow.server import Standalone, environment, free_port

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).resolve().parents[2]
DAG_FILE = """
from airflow.sdk import DAG, task

from ridgeline.airflow.watcher import watched_asset

with DAG("photos", schedule=[watched_asset("photos_source", {folder!r})], is_paused_upon_creation=False):

    @task
    def count():
        print("counted")

    count()
"""


def wait(what: str, found: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.5)
    raise TimeoutError(f"Expected {what} within {seconds} s.")


def runs(airflow: Standalone) -> list[dict[str, Any]]:
    if not airflow.is_healthy():
        return []
    found = airflow.call("GET", "/api/v2/dags/photos/dagRuns?order_by=run_after")[1].get("dag_runs", [])
    return [run for run in found if run["state"] == "success"]


def events(airflow: Standalone) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = airflow.call("GET", "/api/v2/assets/events?order_by=timestamp")[1]["asset_events"]
    return found


def test_each_content_starts_one_run_also_across_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "train" / "cat").mkdir(parents=True)
    (folder / "train" / "cat" / "1.png").write_bytes(b"first")
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "photos.py").write_text(DAG_FILE.format(folder=str(folder)))
    env = environment(tmp_path, "airflow", os.environ, free_port())
    env |= {"RIDGELINE_STILL_SECONDS": "2", "PYTHONPATH": str(ROOT)}
    with Standalone(env, tmp_path / "first.log") as airflow:
        wait("a run for the first content", lambda: len(runs(airflow)) == 1, 180)
        first = datetime.fromisoformat(events(airflow)[0]["timestamp"]).timestamp()
        time.sleep(max(0, first + 12 - time.time()))  # the watcher would fire again
        assert len(events(airflow)) == 1
    with Standalone(env, tmp_path / "second.log") as airflow:
        wait("a start", airflow.is_healthy, 120)
        wait("the watcher", lambda: re.search(r"trigger ID \d+ starting", airflow.log_file.read_text()), 120)
        time.sleep(8)  # it would fire after 3
        assert len(events(airflow)) == 1
        (folder / "train" / "cat" / "2.png").write_bytes(b"second")
        wait("a run for the second content", lambda: len(runs(airflow)) == 2, 60)
        payloads = [event["extra"]["payload"] for event in events(airflow)]
        assert len({payload["content"] for payload in payloads}) == len(payloads) == 2
        assert {payload["folder"] for payload in payloads} == {str(folder)}
