"""The training DAG of a dataset: every dataset has the same steps, and names, defaults and a schedule of its own.

A file in this folder calls `training_dag`; no DAG is defined here, so Airflow does not read this file
(``.airflowignore``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, Param, dag, get_current_context, task

import components.evaluate
import components.export
import components.label_errors
import components.select
import components.sweep
import components.train
from components.training.penalty import STRENGTHS
from dags.preparation import PREPARATION, prepare_examples
from ridgeline.airflow.champions import CHAMPIONS
from ridgeline.airflow.form import form
from ridgeline.airflow.notifications import Notifier, deadline
from ridgeline.airflow.operators import task_with_approval
from ridgeline.airflow.pool import tensorflow_tasks
from ridgeline.airflow.schedule import schedule as schedule_of
from ridgeline.airflow.task import run_in_task, skip
from ridgeline.airflow.watcher import watched_asset
from ridgeline.settings import Settings

NAME = re.compile(r"[a-z][a-z0-9_]*")


def training_dag(
    name: str,
    title: str,
    doc: str,
    *,
    folder: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    schedule: str | None = None,
) -> DAG:
    """Return the DAG that trains a classifier on one dataset, evaluates it, and serves it if it passes the gate.

    An event of the asset ``<name>_source`` starts a run. Each run creates events of ``<name>_dataset``,
    ``<name>_examples`` and ``<name>_model``, which carry the artifact's name, whether it is new, and its facts; and of
    ``<model>_pushed_model`` if its model becomes the champion.

    Args:
        name: The dataset's name, from which those of the DAG (``<name>_training``) and of its assets are made:
            lower-case letters, digits and ``_``.
        title: The dataset's name as people write it; the DAG is displayed as ``<title> training``.
        doc: The DAG's documentation, in Markdown: the docstring of the calling file.
        folder: The folder of images that is the dataset: an absolute path, or a `universal_pathlib` URL. It is
            watched: each new content starts a run, see `FolderTrigger`. None for a dataset that tfds has.
        defaults: Defaults on this DAG's form, and so of its scheduled runs, by dotted name. They precede those of
            ``RIDGELINE_DEFAULTS``.
        schedule: When runs start by themselves: a cron expression or preset, UTC, or ``never``; as
            ``RIDGELINE_SCHEDULE`` says if None.

    Raises:
        ValueError: If the name has other characters, or the folder is a relative path.
        ParameterError: If a default is unknown, of the wrong type or out of range.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"Expected a name of lower-case letters, digits and _, such as product_photos; received {name!r}. "
            "Correct the name in training_dag(...)."
        )
    if folder is None:
        source, own = Asset(f"{name}_source"), {}
    else:
        if not folder.startswith("/") and "://" not in folder:
            raise ValueError(
                f"Expected the absolute path or the URL of a folder; received {folder!r}. Correct it in "
                "training_dag(...): tasks and the watcher may have other working directories."
            )
        source = watched_asset(f"{name}_source", folder)
        own = {"ingest.dataset": "folder", "ingest.image_dir": folder, "ingest.name": name}

    @dag(
        dag_id=f"{name}_training",
        dag_display_name=f"{title} training",
        doc_md=doc,
        schedule=schedule_of(source, expression=schedule),
        is_paused_upon_creation=False,
        catchup=False,
        max_active_runs=1,
        dagrun_timeout=Settings().longest_run,  # the limits of the tasks add up to 16 hours
        tags=[name.replace("_", "-"), "training"],
        params={"penalty_from": _penalty_from()}
        | form(
            *PREPARATION,
            components.train.train,
            components.sweep.sweep,
            components.select.select,
            components.evaluate.evaluate,
            components.label_errors.label_errors,
            components.export.export,
            first=(
                "train.penalty.kind",
                *(f"train.penalty.{name}" for name in STRENGTHS),
                "train.solver",
                "train.network",
                "train.profile",
                "train.epochs",
                "train.learning_rate",
                "train.seed",
            ),
            defaults={**own, **(defaults or {})},
        ),
        deadline=deadline(),
        on_failure_callback=Notifier("run_failed"),
        default_args=tensorflow_tasks(),
    )
    def training() -> None:
        """Wire the steps."""

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

        @task(execution_timeout=timedelta(hours=6), trigger_rule="none_failed", outlets=[Asset(f"{name}_model")])
        def train(examples: str, sweep: str | None) -> str:
            """Train the classifier on the training split; monitor it on the validation split."""
            return run_in_task(components.train.train, examples=examples, sweep=sweep)

        @task(execution_timeout=timedelta(minutes=30))
        def evaluate(dataset: str, examples: str, model: str) -> str:
            """Evaluate the model on the test split, compare it with the champion, decide whether it may be served."""
            return run_in_task(components.evaluate.evaluate, dataset=dataset, examples=examples, model=model)

        @task(execution_timeout=timedelta(minutes=30))
        def label_errors(dataset: str, examples: str, model: str) -> str:
            """List the training and validation images whose label is probably wrong. They do not stop the run."""
            return run_in_task(components.label_errors.label_errors, dataset=dataset, examples=examples, model=model)

        @task_with_approval(
            execution_timeout=timedelta(minutes=30),
            outlets=[CHAMPIONS],
            retries=3,  # an answer that comes at once costs one, see `AskInAirflow`
        )
        def export(dataset: str, examples: str, model: str, evaluation: str) -> str:
            """Export a blessed model, verify its predictions in a fresh process, and make it the champion."""
            return run_in_task(
                components.export.export, dataset=dataset, examples=examples, model=model, evaluation=evaluation
            )

        # A call of a task returns an XComArg, which becomes the artifact's name when the task runs.
        dataset, examples, checked = prepare_examples(name)
        trials = sweep(examples)
        model = train(examples, select(trials))  # type: ignore[arg-type]
        checked >> [trials, model]
        evaluation = evaluate(dataset, examples, model)  # type: ignore[arg-type]
        label_errors(dataset, examples, model) >> export(dataset, examples, model, evaluation)  # type: ignore[arg-type]

    return training()


def _penalty_from() -> Param:
    return Param(
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
