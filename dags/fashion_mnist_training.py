"""Train a Fashion-MNIST classifier with L1 and L2 penalties, judge it, and serve it if it is good enough.

Each task runs its step, or reuses what the step yielded before if inputs, parameters and code are the same;
its log says which, and why. Tasks pass on the name of an artifact in the store, never data.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Param, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

import components.evaluate
import components.export
import components.ingest
import components.sweep
import components.train
import components.transform
from ridgeline.airflow_task import form, run_in_task


@dag(
    doc_md=__doc__,
    schedule=None,
    is_paused_upon_creation=False,
    catchup=False,
    max_active_runs=1,
    tags=["fashion-mnist", "training"],
    params=form(
        components.ingest.ingest,
        components.transform.transform,
        components.train.train,
        components.sweep.sweep,
        components.evaluate.evaluate,
        components.export.export,
    )
    | {
        "penalty_from": Param(
            "form",
            "form: the penalty is train.penalty. regularization_path: a sweep over the strengths below chooses it, on "
            "validation; train.penalty and train.solver are not used.",
            enum=["form", "regularization_path"],
        )
    },
    default_args={"retries": 1, "retry_delay": timedelta(seconds=10), "queue": "tensorflow"},
)
def fashion_mnist_training() -> None:
    """Wire the steps."""

    @task(execution_timeout=timedelta(hours=1))
    def ingest() -> str:
        """Prepare the dataset with tfds, from the network or a folder of downloaded files."""
        return run_in_task(components.ingest.ingest)

    @task(execution_timeout=timedelta(minutes=30))
    def transform(dataset: str) -> str:
        """Split the dataset into training, validation and test arrays; learn the normalization."""
        return run_in_task(components.transform.transform, dataset=dataset)

    @task(execution_timeout=timedelta(hours=6))
    def sweep(examples: str) -> str:
        """Choose the penalty on validation, if the form asks for it."""
        if get_current_context()["params"]["penalty_from"] == "form":
            raise AirflowSkipException("the penalty is that of the form")
        return run_in_task(components.sweep.sweep, examples=examples)

    @task(execution_timeout=timedelta(hours=6), trigger_rule="none_failed")
    def train(examples: str, sweep: str | None) -> str:
        """Train the classifier on the training split; watch it on the validation split."""
        return run_in_task(components.train.train, examples=examples, sweeps=sweep and [sweep])

    @task(execution_timeout=timedelta(minutes=30))
    def evaluate(examples: str, model: str) -> str:
        """Measure the model on the test split, once; decide whether it may be served; write the report."""
        return run_in_task(components.evaluate.evaluate, examples=examples, model=model)

    @task(execution_timeout=timedelta(minutes=30))
    def export(examples: str, model: str, evaluation: str) -> str:
        """Export a blessed model, check what it serves in a fresh process, and make it the champion."""
        return run_in_task(components.export.export, examples=examples, model=model, evaluation=evaluation)

    # A call of a task yields an XComArg, which becomes the artifact's name when the task runs.
    examples = transform(ingest())  # type: ignore[arg-type]
    model = train(examples, sweep(examples))  # type: ignore[arg-type]
    export(examples, model, evaluate(examples, model))  # type: ignore[arg-type]


fashion_mnist_training()
