"""Delete data that is no longer needed: artifacts, logs of tasks, and metadata of old runs. Report stale models.

Runs weekly, unless `RIDGELINE_MAINTENANCE_SCHEDULE` names another time or `never`. To see what a run would delete,
trigger it with **Dry run**: it deletes nothing and lists everything in the tasks' logs.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task

from ridgeline.airflow import maintenance as tasks
from ridgeline.airflow.notifications import Notifier, deadline


@dag(
    dag_display_name="Maintenance",
    doc_md=__doc__,
    schedule=tasks.schedule(),
    is_paused_upon_creation=False,
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=6),
    tags=["maintenance"],
    params=tasks.form(),
    deadline=deadline(),
    on_failure_callback=Notifier("run_failed"),
    default_args={
        "retries": 1,
        "retry_delay": timedelta(minutes=1),
        "execution_timeout": timedelta(hours=1),
        "on_failure_callback": Notifier("task_failed"),
    },
)
def maintenance() -> None:
    """Declare the tasks; none depends on another."""

    @task
    def collect_garbage() -> str:
        """Delete artifacts and records that no served version and no recent run need."""
        return tasks.collect_garbage_in_task()

    @task
    def delete_logs() -> str:
        """Delete old logs of tasks and of the DAG processor."""
        return tasks.delete_logs_in_task()

    @task
    def clean_metadata() -> str:
        """Delete old runs from Airflow's database."""
        return tasks.clean_metadata_in_task()

    @task
    def announce_stale() -> None:
        """Tell people of models whose champion is old or whose successors were refused, once for each."""
        tasks.announce_stale_in_task()

    collect_garbage()
    delete_logs()
    clean_metadata()
    announce_stale()


maintenance()
