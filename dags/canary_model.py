"""Let a version answer a share of the requests; promote or abort it. **A run of this DAG changes what is served**.

A canary is verified before it starts and before it is promoted: every byte, and its predictions in a fresh process.
The history records who decided and why. Nothing is copied or deleted. A rollback also ends a canary.

`ridgeline models show fashion_mnist` lists the versions. A run of the training DAG with a canary share above 0 pushes
its model as a canary.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Param, dag, get_current_context, task

from ridgeline.airflow.champions import CHAMPIONS
from ridgeline.airflow.notifications import Notifier, deadline
from ridgeline.airflow.task import change_in_task


@dag(
    dag_display_name="Models: canary",
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
        "action": Param(
            "canary",
            "canary: start it, or change its share. promote: make it the champion. abort: end it.",
            type="string",
            title="Action",
            enum=["canary", "promote", "abort"],
        ),
        "version": Param(
            None,
            "Number of the version. If empty: the present canary. Only the present canary can be promoted or aborted.",
            type=["integer", "null"],
            title="Version",
            allOf=[{"minimum": 1}],  # the form would silently turn 0 into 1 if it saw this bound
        ),
        "share": Param(
            0.1,
            "To start a canary: the share of the requests that it answers, above 0, below 1.",
            type="number",
            title="Share",
            exclusiveMinimum=0,
            exclusiveMaximum=1,
        ),
        "reason": Param(
            description="Why, in at least 5 characters. The history records it with your name.",
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
def canary_model() -> None:
    """Declare the one task."""

    @task(execution_timeout=timedelta(minutes=30), outlets=[CHAMPIONS])
    def decide() -> str:
        """Start, promote or abort the canary, and record who decided and why."""
        return change_in_task(get_current_context()["params"]["action"])

    decide()


canary_model()
