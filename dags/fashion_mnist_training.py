"""Train a Fashion-MNIST classifier with L1 and L2 penalties, evaluate it, and serve it if it passes the gate.

Each task runs its step, or reuses an earlier artifact if inputs, parameters and code are the same. The task's log
states which, and why. Tasks pass names of artifacts to each other, never data.

Trigger a run with parameters of your choice: a bad value is refused before any step runs. Runs also start weekly, or
as `RIDGELINE_SCHEDULE` says, and when the asset `fashion_mnist_source` changes. A run in which nothing changed reuses
every artifact and serves no new version.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Asset, Param, dag, get_current_context, task

import components.evaluate
import components.export
import components.ingest
import components.select
import components.statistics
import components.sweep
import components.train
import components.transform
import components.validate
from ridgeline.airflow.form import form
from ridgeline.airflow.notifications import Notifier, deadline
from ridgeline.airflow.pool import TENSORFLOW
from ridgeline.airflow.schedule import schedule
from ridgeline.airflow.task import run_in_task, skip

# To start a run after the raw files were replaced, create an event of this asset in the UI or over REST.
SOURCE = Asset("fashion_mnist_source")
# An event of these assets carries the artifact's name, whether it is new, and its facts.
DATASET = Asset("fashion_mnist_dataset")
EXAMPLES = Asset("fashion_mnist_examples")
MODEL = Asset("fashion_mnist_model")
PUSHED_MODEL = Asset("fashion_mnist_pushed_model")


@dag(
    dag_display_name="Fashion-MNIST training",
    doc_md=__doc__,
    schedule=schedule(SOURCE),
    is_paused_upon_creation=False,
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=24),  # the limits of the tasks add up to 16 hours
    tags=["fashion-mnist", "training"],
    params={
        "penalty_from": Param(
            "form",
            "Train with the penalty on this form, or let a sweep choose it by validation accuracy. The section of the "
            "step sweep sets the strengths.",
            title="Penalty from",
            enum=["form", "regularization_path"],
            values_display={
                "form": "this form",
                "regularization_path": "the regularization path (a sweep)",
            },
        )
    }
    | form(
        components.ingest.ingest,
        components.transform.transform,
        components.statistics.statistics,
        components.validate.validate,
        components.train.train,
        components.sweep.sweep,
        components.select.select,
        components.evaluate.evaluate,
        components.export.export,
        first=(
            "train.penalty.kind",
            "train.penalty.l1",
            "train.penalty.l2",
            "train.solver",
            "train.profile",
            "train.epochs",
            "train.learning_rate",
            "train.seed",
        ),
    ),
    deadline=deadline(),
    on_failure_callback=Notifier("run_failed"),
    default_args={
        "queue": "tensorflow",
        "pool": TENSORFLOW,
        "retries": 1,
        "retry_delay": timedelta(seconds=10),
        "on_failure_callback": Notifier("task_failed"),
    },
)
def fashion_mnist_training() -> None:
    """Wire the steps."""

    @task(execution_timeout=timedelta(hours=1), outlets=[DATASET])
    def ingest() -> str:
        """Prepare the dataset with tfds, from the network or a folder of downloaded files."""
        return run_in_task(components.ingest.ingest)

    @task(execution_timeout=timedelta(minutes=30), outlets=[EXAMPLES])
    def transform(dataset: str) -> str:
        """Split the dataset into training, validation and test arrays; learn the normalization."""
        return run_in_task(components.transform.transform, dataset=dataset)

    @task(execution_timeout=timedelta(minutes=30))
    def statistics(examples: str) -> str:
        """Describe the images of each split, and find those that occur more than once."""
        return run_in_task(components.statistics.statistics, examples=examples)

    @task(execution_timeout=timedelta(minutes=30))
    def validate(examples: str, statistics: str) -> str:
        """Check the examples, also against those of the champion. An error stops the run before training."""
        return run_in_task(components.validate.validate, examples=examples, statistics=statistics)

    @task(execution_timeout=timedelta(hours=6))
    def sweep(examples: str) -> str:
        """Train with each penalty of the grid, if the form selects the sweep."""
        if get_current_context()["params"]["penalty_from"] == "form":
            skip("The run uses the penalty on the form.")
        return run_in_task(components.sweep.sweep, examples=examples)

    @task(execution_timeout=timedelta(minutes=30))
    def select(trials: str) -> str:
        """Choose the penalty by validation accuracy, and draw the regularization path."""
        return run_in_task(components.select.select, trials=[trials])

    @task(execution_timeout=timedelta(hours=6), trigger_rule="none_failed", outlets=[MODEL])
    def train(examples: str, sweep: str | None) -> str:
        """Train the classifier on the training split; monitor it on the validation split."""
        return run_in_task(components.train.train, examples=examples, sweep=sweep)

    @task(execution_timeout=timedelta(minutes=30))
    def evaluate(examples: str, model: str) -> str:
        """Evaluate the model on the test split, compare it with the champion, decide whether it may be served."""
        return run_in_task(components.evaluate.evaluate, examples=examples, model=model)

    @task(execution_timeout=timedelta(minutes=30), outlets=[PUSHED_MODEL])
    def export(examples: str, model: str, evaluation: str) -> str:
        """Export a blessed model, verify its predictions in a fresh process, and make it the champion."""
        return run_in_task(components.export.export, examples=examples, model=model, evaluation=evaluation)

    # A call of a task returns an XComArg, which becomes the artifact's name when the task runs.
    examples = transform(ingest())  # type: ignore[arg-type]
    checked = validate(examples, statistics(examples))  # type: ignore[arg-type]
    trials = sweep(examples)  # type: ignore[arg-type]
    model = train(examples, select(trials))  # type: ignore[arg-type]
    checked >> [trials, model]
    export(examples, model, evaluate(examples, model))  # type: ignore[arg-type]


fashion_mnist_training()
