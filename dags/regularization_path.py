"""Train under many strengths of each penalty, choose one by validation accuracy, and show the effect of each.

One task trains the whole grid, or several tasks share it: see `spread_tasks` on the form. The result is the same.
The training DAG can choose its penalty in the same way: see `penalty_from` on its form.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import Param, dag, get_current_context, task

import components.select
import components.sweep
from dags.preparation import PREPARATION, prepare_examples
from ridgeline.airflow.form import form
from ridgeline.airflow.notifications import Notifier, deadline
from ridgeline.airflow.pool import tensorflow_tasks
from ridgeline.airflow.task import params_in_task, run_in_task


@dag(
    doc_md=__doc__,
    dag_display_name="Fashion-MNIST regularization path",
    schedule=None,
    is_paused_upon_creation=False,
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=24),  # the limits of the tasks add up to 9 hours; tasks may wait for the pool
    tags=["fashion-mnist", "regularization"],
    params={
        "spread_tasks": Param(
            1,
            "Number of tasks that share the grid, 1 to 32. The pool tensorflow limits how many run at a time. One task "
            "trains a whole chain of warm starts.",
            title="Spread over tasks",
            type="integer",
            allOf=[{"minimum": 1, "maximum": 32}],  # the form would silently move a value into bounds that it sees
        )
    }
    | form(
        *PREPARATION,
        components.sweep.sweep,
        components.select.select,
        first=(
            *(f"sweep.{name}" for name in components.sweep.SWEPT),
            "sweep.dense",
            "sweep.warm_start",
            "select.tolerance",
            "sweep.train.network",
            "sweep.train.epochs",
            "sweep.train.profile",
        ),
    ),
    deadline=deadline(),
    on_failure_callback=Notifier("run_failed"),
    default_args=tensorflow_tasks(),
)
def regularization_path() -> None:
    """Wire the steps."""

    @task(execution_timeout=timedelta(minutes=5), queue="default", pool="default_pool")
    def split() -> list[dict[str, Any]]:
        """Divide the grid among the tasks that share it."""
        count = get_current_context()["params"]["spread_tasks"]
        return params_in_task(components.sweep.sweep).split(count)

    # Airflow does not show the docstring of a mapped task.
    @task(
        execution_timeout=timedelta(hours=6),
        doc_md="Train with each penalty of the grid, or of one part of it.",
        map_index_template="{{ points }}",
    )
    def sweep(examples: str, grid: dict[str, Any]) -> str:
        values = {f"sweep.{name}": value for name, value in grid.items()}
        points = params_in_task(components.sweep.sweep, values).points
        get_current_context()["points"] = "; ".join(point.label for point in points)  # type: ignore[typeddict-unknown-key]
        return run_in_task(components.sweep.sweep, values, examples=examples)

    @task(execution_timeout=timedelta(minutes=30))
    def select(trials: list[str]) -> str:
        """Choose the best trial by validation accuracy, and draw the regularization path."""
        return run_in_task(components.select.select, trials=trials)

    # A call of a task returns an XComArg, which becomes the artifact's name when the task runs.
    _, examples, checked = prepare_examples()
    trials = sweep.partial(examples=examples).expand(grid=split())
    checked >> trials
    select(trials)  # type: ignore[arg-type]


regularization_path()
