from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

OLD = time.time() - 40 * 86400


@pytest.fixture(scope="module")
def maintenance(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))  # read at Airflow's first import
        from ridgeline.airflow import maintenance
    return maintenance


class Task:
    """A stand-in for an Airflow task: its params, its configuration and its XComs."""

    def __init__(self, module: ModuleType, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.params = {name: param.value for name, param in module.form().items()}
        self.xcoms: dict[str, str] = {}
        context = {
            "dag": SimpleNamespace(dag_id="maintenance", params=module.form()),
            "params": self.params,
            "run_id": "manual__1",
            "ti": SimpleNamespace(xcom_push=lambda key, value: self.xcoms.update({key: value})),
        }
        for name in (module.__name__, "ridgeline.airflow.task"):
            patch.setattr(sys.modules[name], "get_current_context", lambda: context)
        folders = {"base_log_folder": folder, "dag_processor_child_process_log_directory": folder / "dag_processor"}
        patch.setattr(module, "conf", SimpleNamespace(get=lambda _, name: str(folders[name])))


@pytest.fixture
def task(maintenance: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Task:
    return Task(maintenance, monkeypatch, tmp_path / "logs")


def write(path: Path, modified_at: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("line\n")
    if modified_at:
        os.utime(path, (modified_at, modified_at))
    return path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


OLD_LOGS = {
    "dag_id=d/run_id=r/task_id=t/attempt=1.log",
    "dag_id=d/run_id=r/task_id=t/attempt=1.log.trigger.7.log",
    "dag_id=d/run_id=r/task_id=t/map_index=3/attempt=1.log",
    "dag_processor/2026-01-02/dags-folder/dags/d.py.log",
}
OTHER_FILES = {"other.log", "dag_id=d/notes.txt", "dag_id=d/run_id=r/notes.txt", "dag_processor/other/file.log"}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Old logs, a new one, old files that are not logs of tasks, and a link."""
    folder = tmp_path / "logs"
    for name in OLD_LOGS | OTHER_FILES:
        write(folder / name, OLD)
    write(folder / "dag_id=d/run_id=new/task_id=t/attempt=1.log")
    outside = write(tmp_path / "outside.log", OLD)
    (folder / "dag_id=d/run_id=r/task_id=t/attempt=2.log").symlink_to(outside)
    return folder


def test_old_logs_are_deleted_and_nothing_else(task: Task, maintenance: ModuleType, logs: Path) -> None:
    before = files(logs)
    assert maintenance.delete_logs_in_task() == "deleted 4 log files, 0.0 MB"
    assert before - files(logs) == OLD_LOGS
    assert not (logs / "dag_processor/2026-01-02").exists(), "empty folders are removed"
    assert (logs.parent / "outside.log").exists()


def test_a_dry_run_lists_old_logs_and_deletes_none(
    task: Task, maintenance: ModuleType, logs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, task.params["dry_run"] = files(logs), True
    with caplog.at_level("INFO", logger="ridgeline"):
        assert maintenance.delete_logs_in_task() == "would delete 4 log files, 0.0 MB"
    assert files(logs) == before
    assert {line for line in caplog.messages if "dag_id" in line or "2026" in line} == {
        f"would delete {logs / name}" for name in OLD_LOGS
    }


def test_the_retention_is_a_param(task: Task, maintenance: ModuleType, logs: Path) -> None:
    task.params["log_retention_days"] = 50
    assert maintenance.delete_logs_in_task() == "deleted 0 log files, 0.0 MB"


def test_a_folder_of_logs_may_be_missing(task: Task, maintenance: ModuleType) -> None:
    assert maintenance.delete_logs_in_task() == "deleted 0 log files, 0.0 MB"


def test_an_unknown_param_is_refused_without_a_retry(task: Task, maintenance: ModuleType, logs: Path) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    task.params["keep_run"] = 3
    for work in (maintenance.collect_garbage_in_task, maintenance.delete_logs_in_task):
        with pytest.raises(AirflowFailException, match="received keep_run"):
            work()
    assert files(logs) >= OLD_LOGS


def test_the_settings_give_the_defaults_of_the_form(maintenance: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def defaults() -> dict[str, Any]:
        return {name: param.resolve() for name, param in maintenance.form().items()}

    usual = {"keep_runs": 50, "log_retention_days": 30, "metadata_retention_days": 90, "dry_run": False}
    assert defaults() == usual
    monkeypatch.setenv("RIDGELINE_KEEP_RUNS", "5")
    monkeypatch.setenv("RIDGELINE_LOG_RETENTION_DAYS", "7")
    monkeypatch.setenv("RIDGELINE_METADATA_RETENTION_DAYS", "14")
    changed = {"keep_runs": 5, "log_retention_days": 7, "metadata_retention_days": 14}
    assert defaults() == usual | changed


def test_the_schedule_is_configured(maintenance: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert maintenance.schedule().expression == "0 6 * * 0"
    monkeypatch.setenv("RIDGELINE_MAINTENANCE_SCHEDULE", "never")
    assert maintenance.schedule() is None


# --- metadata


def test_the_blocked_url_is_not_handed_on(
    task: Task, maintenance: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[Any] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        received.append((command, env))
        return SimpleNamespace(returncode=0, stdout="Checking table dag_run\n\nFound 2 rows\n")

    monkeypatch.setattr(maintenance.subprocess, "run", run)
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "airflow-db-not-allowed:///")
    monkeypatch.setenv("AIRFLOW__CORE__SQL_ALCHEMY_CONN", "sqlite:////a.db")
    task.params["dry_run"] = True
    with caplog.at_level("INFO", logger="ridgeline"):
        assert maintenance.clean_metadata_in_task().startswith("would delete metadata of runs before ")
    command, env = received[0]
    assert command[1:6] == ["-P", "-m", "ridgeline.airflow.metadata", "maintenance", "manual__1"]
    assert command[-1] == "--dry-run"
    assert "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN" not in env
    assert env["AIRFLOW__CORE__SQL_ALCHEMY_CONN"] == "sqlite:////a.db"
    assert "Found 2 rows" in caplog.messages


def test_a_failed_clean_up_fails_the_task_with_its_last_line(
    task: Task, maintenance: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(returncode=1, stdout="...\nRuntimeError: locked\n")
    monkeypatch.setattr(maintenance.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match="Cannot clean Airflow's metadata: RuntimeError: locked"):
        maintenance.clean_metadata_in_task()


@pytest.mark.airflow
def test_without_the_database_of_the_run_it_is_skipped_with_the_reason(
    task: Task, maintenance: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "airflow-db-not-allowed:///")
    with pytest.raises(AirflowSkipException):
        maintenance.clean_metadata_in_task()
    assert task.xcoms["reason"].startswith("Cannot clean Airflow's metadata: the configured database sqlite:///")
    assert "home/airflow.db does not exist. Set AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_CMD" in task.xcoms["reason"]
    assert not (tmp_path / "home/airflow.db").exists()


@pytest.mark.airflow
def test_another_airflow_s_database_is_left_alone(tmp_path: Path) -> None:
    env = {**os.environ, "AIRFLOW_HOME": str(tmp_path)}
    make = [sys.executable, "-c", "from airflow.utils.db import initdb; initdb()"]
    subprocess.run(make, env=env, capture_output=True, timeout=200, check=True)
    command = [sys.executable, "-m", "ridgeline.airflow.metadata", "maintenance", "manual__1", "2026-01-01T00:00:00Z"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1].endswith("does not hold the run manual__1 of maintenance.")
