"""The tasks of the maintenance DAG: collect garbage, delete old logs, clean Airflow's metadata, announce old models."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.configuration import conf
from airflow.sdk import CronTriggerTimetable, Param, get_current_context
from airflow.sdk.exceptions import AirflowFailException

from ridgeline.airflow import metadata
from ridgeline.airflow.form import refuse_unknown
from ridgeline.airflow.schedule import cron
from ridgeline.airflow.settings import AirflowSettings
from ridgeline.airflow.task import settings_in_task, skip
from ridgeline.announcements import announce
from ridgeline.component import ParameterError
from ridgeline.gc import collect_garbage
from ridgeline.pipeline import load_components
from ridgeline.settings import MAX_RETENTION_DAYS, MIN_RETENTION_DAYS

log = logging.getLogger(__name__)

BLOCKED = "airflow-db-not-allowed"  # Airflow puts this scheme into the database's URL in the environment of tasks
URL_VARIABLES = ("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "AIRFLOW__CORE__SQL_ALCHEMY_CONN")
# Only files that match are deleted: the folder of logs may hold other files.
TASK_LOGS = "dag_id=*/run_id=*/**/*.log*"
PROCESSOR_LOGS = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]/**/*.log*"


def schedule() -> CronTriggerTimetable | None:
    """Return the timetable of the maintenance DAG, see `Settings`."""
    return cron(AirflowSettings().maintenance_schedule)


def form() -> dict[str, Param]:
    """Return the params of the maintenance DAG; `Settings` gives their defaults."""
    settings = AirflowSettings()
    return {
        "keep_runs": _whole_number(
            "Runs to keep",
            "Number of latest runs whose artifacts stay in the store. Artifacts of served versions always stay.",
            settings.keep_runs,
            minimum=1,
        ),
        "log_retention_days": _whole_number(
            "Log retention (days)",
            "Older logs of tasks are deleted.",
            settings.log_retention_days,
            minimum=1,
            maximum=MAX_RETENTION_DAYS,
        ),
        "metadata_retention_days": _whole_number(
            "Metadata retention (days)",
            "Older runs are deleted from Airflow's database. The last scheduled run of each DAG stays.",
            settings.metadata_retention_days,
            minimum=MIN_RETENTION_DAYS,
            maximum=MAX_RETENTION_DAYS,
        ),
        "dry_run": Param(
            False,
            "Delete nothing; list in the log what would be deleted.",
            title="Dry run",
            type="boolean",
        ),
    }


def _whole_number(title: str, description: str, default: int, minimum: int, maximum: int | None = None) -> Param:
    # The form would silently move a value into bounds that it sees; it does not see those in allOf.
    bounds = {"minimum": minimum} | ({"maximum": maximum} if maximum else {})
    return Param(default, description, title=title, type="integer", allOf=[bounds])


def announce_stale_in_task() -> None:
    """Announce the models whose champion is stale, and send the messages that were not delivered."""
    announce(settings_in_task())


def collect_garbage_in_task() -> str:
    """Delete the artifacts and records that no served version and no recent run need.

    Returns:
        What was deleted, as a sentence.

    Raises:
        AirflowFailException: If a param is unknown; not retried.
    """
    params, settings = _params(), settings_in_task()
    dry_run = params["dry_run"]
    store, registry, steps = settings.open_store(), settings.open_registry(), load_components().values()
    garbage = collect_garbage(store, registry, params["keep_runs"], dry_run, settings.longest_run, steps)
    for ref, size in garbage.artifacts.items():
        log.info("%s %s, %.1f MB", _verb(dry_run), ref, size / 1e6)
    return _report(
        f"{_verb(dry_run)} {len(garbage.artifacts)} artifacts, {garbage.num_executions} execution records and "
        f"{len(garbage.scratch) + len(garbage.staging)} scratch folders, {garbage.freed_bytes / 1e6:.1f} MB"
    )


def delete_logs_in_task() -> str:
    """Delete logs of tasks and of the DAG processor that are older than the retention.

    Returns:
        What was deleted, as a sentence.

    Raises:
        AirflowFailException: If a param is unknown; not retried.
    """
    params = _params()
    before = datetime.now(UTC) - timedelta(days=params["log_retention_days"])
    folders = {
        Path(conf.get("logging", "base_log_folder")): TASK_LOGS,
        Path(conf.get("logging", "dag_processor_child_process_log_directory")): PROCESSOR_LOGS,
    }
    deleted = [size for folder, pattern in folders.items() for size in _delete(folder, pattern, before, params)]
    return _report(f"{_verb(params['dry_run'])} {len(deleted)} log files, {sum(deleted) / 1e6:.1f} MB")


def _delete(folder: Path, pattern: str, before: datetime, params: dict[str, Any]) -> Iterator[int]:
    """Delete the files that match a pattern and were last written before a time; yield their sizes."""
    for file in old_files(folder, pattern, before):
        with suppress(FileNotFoundError):  # another process deleted it
            size = file.stat().st_size
            log.info("%s %s", _verb(params["dry_run"]), file)
            if not params["dry_run"]:
                file.unlink()
                _remove_empty(file.parent, folder)
            yield size


def old_files(folder: Path, pattern: str, before: datetime) -> list[Path]:
    """Return the files of a folder that match a pattern and were last written before a time; links are left out.

    Args:
        folder: The folder; it may be missing.
        pattern: A pattern of `Path.glob`.
        before: The time.
    """
    found = []
    for file in sorted(folder.glob(pattern)):
        with suppress(FileNotFoundError):
            if file.is_file() and not file.is_symlink() and file.stat().st_mtime < before.timestamp():
                found.append(file)
    return found


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove a folder and the folders around it, below `top`, as far as they are empty."""
    with suppress(OSError):
        while folder != top:
            folder.rmdir()
            folder = folder.parent


def clean_metadata_in_task() -> str:
    """Delete runs, and what belongs to them, from Airflow's database if they are older than the retention.

    Tasks have no access to the database through Airflow's classes. So the work is done by a process of its own, which
    takes the database's address from Airflow's configuration, as the scheduler does.

    Returns:
        What was deleted, as a sentence.

    Raises:
        AirflowFailException: If a param is unknown; not retried.
        AirflowSkipException: If the configuration on this machine does not name the database of this run.
        RuntimeError: If the clean-up fails.
    """
    params, context = _params(), get_current_context()
    before = datetime.now(UTC) - timedelta(days=params["metadata_retention_days"])
    arguments = [context["dag"].dag_id, context["run_id"], before.isoformat(), *["--dry-run"] * params["dry_run"]]
    # Airflow replaces these variables in a task's environment. Without them the other sources of the URL apply.
    env = {n: v for n, v in os.environ.items() if n not in URL_VARIABLES or not v.startswith(BLOCKED)}
    command = [sys.executable, "-P", "-m", metadata.__name__, *arguments]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for line in lines:
        log.info("%s", line)
    if done.returncode == metadata.NOT_FOUND:
        skip(
            f"Cannot clean Airflow's metadata: {lines[-1]} Set AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_CMD or "
            "sql_alchemy_conn in airflow.cfg where tasks run, or run `airflow db clean` on the server."
        )
    if done.returncode != 0:
        last = lines[-1] if lines else f"exit status {done.returncode}"
        raise RuntimeError(f"Cannot clean Airflow's metadata: {last} The log above has the details.")
    return _report(f"{_verb(params['dry_run'])} metadata of runs before {before:%Y-%m-%d %H:%M} UTC")


def _params() -> dict[str, Any]:
    context = get_current_context()
    try:
        refuse_unknown(context["dag"].params, context["params"])
    except ParameterError as error:
        raise AirflowFailException(str(error)) from error
    return dict(context["params"])


def _verb(dry_run: bool) -> str:
    return "would delete" if dry_run else "deleted"


def _report(sentence: str) -> str:
    log.info("%s", sentence)
    return sentence
