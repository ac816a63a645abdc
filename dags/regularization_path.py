"""Train under many L1 and L2 penalties, let validation choose one, and show what each penalty does.

The grid is trained in one task, or spread over several: `spread_tasks` on the form. The result is the same.
The training DAG can take the penalty from here: `penalty_from` on its form.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import Param, dag, get_current_context, task

import components.ingest
import components.sweep
import components.transform
from ridgeline.airflow_task import form, params_in_task, run_in_task
from ridgeline.notifications import Notifier


@dag(
    doc_md=__doc__,
    dag_display_name="Fashion-MNIST: regularization path",
    schedule=None,
    is_paused_upon_creation=False,
    catchup=False,
    max_active_runs=1,
    tags=["fashion-mnist", "regularization"],
    params={
        "spread_tasks": Param(
            1,
            "Tasks that share the grid, 1 to 32; more than 1 pays off with free cores.",
            title="Spread over tasks",
            type="integer",
            allOf=[{"minimum": 1, "maximum": 32}],  # where the form does not silently move a value into them
        )
    }
    | form(
        components.ingest.ingest,
        components.transform.transform,
        components.sweep.sweep,
        first=("sweep.l1", "sweep.l2", "sweep.dense", "sweep.tolerance", "sweep.train.epochs", "sweep.train.profile"),
    ),
    default_args={
        "queue": "tensorflow",
        "retries": 1,
        "retry_delay": timedelta(seconds=10),
        "on_failure_callback": Notifier("failed"),
    },
)
def regularization_path() -> None:
    """Wire the steps."""

    @task(execution_timeout=timedelta(hours=1))
    def ingest() -> str:
        """Prepare the dataset with tfds, from the network or a folder of downloaded files."""
        return run_in_task(components.ingest.ingest)

    @task(execution_timeout=timedelta(minutes=30))
    def transform(dataset: str) -> str:
        """Split the dataset into training, validation and test arrays; learn the normalization."""
        return run_in_task(components.transform.transform, dataset=dataset)

    @task(execution_timeout=timedelta(minutes=5), queue="default")
    def split() -> list[dict[str, Any]]:
        """Deal the grid out to the tasks that share it; to none, if one task is to do it all."""
        count = get_current_context()["params"]["spread_tasks"]
        return params_in_task(components.sweep.sweep).split(count) if count > 1 else []

    # A mapped task's docstring is not shown, so it is given.
    @task(
        execution_timeout=timedelta(hours=6),
        doc_md="Train at a part of the grid's points.",
        map_index_template="{{ points }}",
    )
    def sweep_part(examples: str, grid: dict[str, Any]) -> str:
        strengths = (f"{name} {', '.join(map(str, grid[name]))}" for name in ("l1", "l2", "l1_l2") if grid[name])
        get_current_context()["points"] = "; ".join([*(["dense"] if grid["dense"] else []), *strengths])  # type: ignore[typeddict-unknown-key]
        values = {f"sweep.{name}": value for name, value in grid.items()}
        return run_in_task(components.sweep.sweep, values, examples=examples)

    @task(execution_timeout=timedelta(hours=6), trigger_rule="none_failed")
    def sweep(examples: str, parts: list[str]) -> str:
        """Train at the points that are left, let validation choose, and write the report."""
        return run_in_task(components.sweep.sweep, examples=examples, parts=parts)

    # A call of a task yields an XComArg, which becomes the artifact's name when the task runs.
    examples = transform(ingest())  # type: ignore[arg-type]
    parts = sweep_part.partial(examples=examples).expand(grid=split())
    sweep(examples, parts)  # type: ignore[arg-type]


regularization_path()
