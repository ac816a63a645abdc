"""The overhead of Airflow per task in runs that reuse every step, with Airflow's default settings and Ridgeline's."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.steps import ROOT, SYNTHETIC, row
from ridgeline.airflow.server import Standalone, environment, free_port
from ridgeline.settings import Settings

DAG_ID = "fashion_mnist_training"
RUNS = 4  # the first is not counted: it fills caches
# Airflow's defaults of the settings that `ridgeline.airflow.server.environment` changes.
AIRFLOW_DEFAULTS = {
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "1",
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "300",
    "AIRFLOW__CORE__PARALLELISM": "32",
}


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    print("\nOverhead of Airflow per task: a run that reuses every step")
    for name, changed in {"Airflow's default settings": AIRFLOW_DEFAULTS, "Ridgeline's settings": {}}.items():
        with tempfile.TemporaryDirectory() as folder:
            added = _added_seconds(Path(folder), settings, changed)
        goal = "" if changed else "<= 2 s"
        row(f"beyond the step, {name}", f"{added['all']:.2f} s", goal)
        row("  scheduling and starting the task's process", f"{added['scheduling']:.2f} s")
        row("  in the task's process, before and after the step", f"{added['process']:.2f} s")


def _added_seconds(folder: Path, settings: Settings, changed: dict[str, str]) -> dict[str, float]:
    """Return the overhead per task, in seconds: the median over runs of their time beyond that of the steps."""
    env = environment(folder, "airflow", os.environ, free_port())
    env |= {"AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"), "RIDGELINE_SCHEDULE": "never", **changed}
    env |= {"RIDGELINE_STORE": settings.store}
    if settings.manual_dir:
        env |= {"RIDGELINE_MANUAL_DIR": str(settings.manual_dir)}
    found: dict[str, list[float]] = {"all": [], "scheduling": [], "process": []}
    with Standalone(env, folder / "log.txt") as airflow:
        while not airflow.is_healthy():
            time.sleep(1)
        while airflow.call("GET", f"/api/v2/dags/{DAG_ID}")[0] != 200:
            time.sleep(1)
        for _ in range(RUNS):
            run_id = airflow.trigger(DAG_ID, _conf(settings))
            assert airflow.wait_for_run(DAG_ID, run_id, 300) == "success"
            run = airflow.call("GET", f"/api/v2/dags/{DAG_ID}/dagRuns/{run_id}")[1]
            tasks = airflow.call("GET", f"/api/v2/dags/{DAG_ID}/dagRuns/{run_id}/taskInstances")[1]["task_instances"]
            steps = [e.seconds for e in settings.open_store().executions() if e.run_id == run_id]
            in_tasks = sum(_seconds(task) for task in tasks)
            found["all"].append((_seconds(run) - sum(steps)) / len(tasks))
            found["scheduling"].append((_seconds(run) - in_tasks) / len(tasks))
            found["process"].append((in_tasks - sum(steps)) / len(tasks))
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def _conf(settings: Settings) -> dict[str, Any]:
    return {} if settings.manual_dir else SYNTHETIC


def _seconds(timed: dict[str, Any]) -> float:
    start, end = (datetime.fromisoformat(timed[name]) for name in ("start_date", "end_date"))
    return (end - start).total_seconds()
