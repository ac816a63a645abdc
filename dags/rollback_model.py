"""Serve an earlier version of a model again. **A run of this DAG moves the champion at once**.

The version is verified first: every byte, and its predictions in a fresh process. Then it becomes the champion, and
the history records who rolled back and why. Nothing is copied or deleted. To undo a rollback, roll back to the version
that was the champion before. Scheduled runs do not push the replaced model again. Clearing the task of a finished
rollback does not roll back a second time.

`ridgeline models show fashion_mnist` lists the versions.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Param, dag, task

from ridgeline.airflow.champions import CHAMPIONS
from ridgeline.airflow.notifications import Notifier, deadline
from ridgeline.airflow.task import change_in_task


@dag(
    dag_display_name="Models: roll back",
    doc_md=__doc__,
    schedule=None,
    is_paused_upon_creation=False,
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=3),
    tags=["models"],
    params={
        "model": Param(
            "fashion_mnist",
            "Name in the registry, which is the name of the dataset.",
            type="string",
            title="Model",
            minLength=1,
        ),
        "version": Param(
            None,
            "Number of the version to serve. If empty: the last one before the champion that is another model.",
            type=["integer", "null"],
            title="Version",
            allOf=[{"minimum": 1}],  # the form would silently turn 0 into 1 if it saw this bound
        ),
        "reason": Param(
            description="Why you roll back, in at least 5 characters. The history records it with your name.",
            type="string",
            title="Reason",
            minLength=5,
            maxLength=500,
        ),
    },
    deadline=deadline(),
    on_failure_callback=Notifier("run_failed"),
    default_args={"retries": 0, "on_failure_callback": Notifier("task_failed")},
)
def rollback_model() -> None:
    """Declare the one task."""

    @task(execution_timeout=timedelta(minutes=30), outlets=[CHAMPIONS])
    def rollback() -> str:
        """Verify the version, make it the champion, and record who rolled back and why."""
        return change_in_task("rollback")

    rollback()


rollback_model()
