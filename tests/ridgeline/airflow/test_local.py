from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from ridgeline.airflow.server import free_port

DAG = {"run": ["fashion_mnist_training"], "ui": []}


@pytest.mark.parametrize("command", ["run", "ui"])
def test_another_folder_is_refused(command: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "ridgeline.airflow.local", command, *DAG[command]]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Expected Ridgeline's folder as the working directory; received")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "home"), [("run", "airflow-run"), ("ui", "airflow-ui")])
def test_one_at_a_time_in_a_folder(command: str, home: str, tmp_path: Path) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "var" / home).mkdir(parents=True)
    port = ["--port", str(free_port())] if command == "ui" else []
    arguments = [sys.executable, "-m", "ridgeline.airflow.local", command, *DAG[command], *port]
    with FileLock(tmp_path / "var" / home / ".lock"):
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Cannot start ")
    assert f"in {tmp_path / 'var' / home}. " in done.stderr


@pytest.mark.parametrize("command", ["run", "ui"])
def test_a_bad_setting_is_refused_before_airflow_starts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dags").mkdir()
    monkeypatch.setenv("RIDGELINE_SCHEDULE", "weekly")
    arguments = [sys.executable, "-P", "-m", "ridgeline.airflow.local", command, *DAG[command]]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Setting RIDGELINE_SCHEDULE: expected a cron expression")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "var").exists()


CHECKED_ONCE = """
from airflow.sdk import Param
from jsonschema import SchemaError
from ridgeline.airflow.local import start_quickly
start_quickly()
for _ in range(2):
    for value, schema, error in ((1, {"type": "no type"}, SchemaError), ("x", {"type": "integer"}, ValueError)):
        try:
            Param(value, **schema).resolve()
        except error:
            continue
        raise SystemExit(f"{schema} with {value} was accepted")
    assert Param(1, type="integer").resolve() == 1
"""


def test_a_wrong_schema_and_a_wrong_value_are_refused_each_time() -> None:
    subprocess.run([sys.executable, "-P", "-c", CHECKED_ONCE], timeout=60, check=True)
