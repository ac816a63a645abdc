"""Serve an earlier version of a model again. **Triggering this DAG moves the champion at once**; nothing asks again.

The version is verified first: every byte of it, and what it serves in a fresh process. Then it becomes the champion,
and the history records who did it and why. Nothing is copied or deleted, so this is undone the same way: roll back
to the version that was left. A scheduled run does not push the model again that was rolled back from. Clearing the
task of a rollback that is done does not roll back a second time.

What there is to go back to: `ridgeline models show fashion_mnist`.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Param, dag, task

from ridgeline.airflow.notifications import Notifier, deadline
from ridgeline.airflow.task import rollback_in_task


@dag(
    dag_display_name="Models: roll back",
    doc_md=__doc__,
    schedule=None,
    is_paused_upon_creation=False,
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=3),
    tags=["fashion-mnist", "registry"],
    params={
        "model": Param(
            "fashion_mnist",
            "Its name in the registry: the dataset's.",
            type="string",
            title="Model",
            minLength=1,
        ),
        "version": Param(
            None,
            "Number of the version to serve. Empty: that of the last other model that the champion replaced.",
            type=["integer", "null"],
            title="Version",
            allOf=[{"minimum": 1}],  # where the form does not see it: it would turn a 0 into a 1 without a word
        ),
        "reason": Param(
            description="Why, in at least 5 characters; it is recorded in the history with your name.",
            type="string",
            title="Reason",
            minLength=5,
            maxLength=500,
        ),
    },
    deadline=deadline(),
    default_args={"retries": 0, "on_failure_callback": Notifier("failed")},
)
def rollback_model() -> None:
    """Declare the one task."""

    @task(execution_timeout=timedelta(minutes=30))
    def rollback() -> str:
        """Verify the version, make it the champion, and record who asked for it and why."""
        return rollback_in_task()

    rollback()


rollback_model()
