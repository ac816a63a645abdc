"""The DAG that predicts for a folder of images with a served model.

A file in this folder calls `inference_dag`; no DAG is defined here, so Airflow does not read this file
(``.airflowignore``).
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Asset, dag, task

import components.infer
from ridgeline.airflow.champions import pushed_model
from ridgeline.airflow.form import form
from ridgeline.airflow.notifications import Notifier, deadline
from ridgeline.airflow.pool import tensorflow_tasks
from ridgeline.airflow.schedule import inference_schedule
from ridgeline.airflow.task import infer_in_task


def inference_dag(
    name: str,
    title: str,
    doc: str,
    *,
    model: str,
    folder: str | None = None,
    new_files_only: bool = False,
    output: str | None = None,
    schedule: str | None = None,
) -> DAG:
    """Return the DAG that predicts the class of each image in a folder with a served version of a model.

    It trains nothing. Each run with an output creates an event of the asset ``<name>_predictions``, which carries the
    artifact's name and its facts.

    Args:
        name: From which the names of the DAG (``<name>_inference``) and of its asset are made.
        title: The DAG is displayed as ``<title> inference``.
        doc: The DAG's documentation, in Markdown: the docstring of the calling file.
        model: The model's name in the registry; it can be changed on the form.
        folder: The folder of the images: an absolute path, or a `universal_pathlib` URL. It can be changed on the form;
            scheduled runs need it here or in ``RIDGELINE_DEFAULTS``.
        new_files_only: The default on the form.
        output: Absolute path of a Parquet file that each run replaces; with new files only, of a folder to which each
            run adds a file. None leaves the predictions in the store.
        schedule: When runs start by themselves: a cron expression or preset, UTC; ``pushed`` for each event of the
            asset ``<model>_pushed_model``, whenever the model has another champion; or ``never``; as
            ``RIDGELINE_INFERENCE_SCHEDULE`` says if None.

    Raises:
        ValueError: If the folder or the output is a relative path, the output is a URL, or the schedule is none of
            these.
        ParameterError: If a value is of the wrong type or out of range.
    """
    if output and "://" in output:
        raise ValueError(
            "Expected an absolute path as the output; received a URL. Name a path in inference_dag(...), and copy the "
            "files from there, for example in a DAG that the asset starts."
        )
    for path in (folder, output):
        if path and not path.startswith("/") and "://" not in path:
            raise ValueError(
                f"Expected an absolute path; received {path!r}. Correct it in inference_dag(...): tasks may have other "
                "working directories."
            )
    own = {"infer.model": model, "infer.folder": folder, "infer.new_files_only": new_files_only}

    @dag(
        dag_id=f"{name}_inference",
        dag_display_name=f"{title} inference",
        doc_md=doc,
        schedule=inference_schedule(pushed_model(model), schedule),
        is_paused_upon_creation=False,
        catchup=False,
        max_active_runs=1,
        dagrun_timeout=timedelta(hours=24),  # the task may wait for the pool
        tags=["inference", model.replace("_", "-")],
        params=form(
            components.infer.infer,
            first=[f"infer.{name}" for name in components.infer.Params.model_fields],
            defaults={parameter: value for parameter, value in own.items() if value},
        ),
        deadline=deadline(),
        on_failure_callback=Notifier("run_failed"),
        default_args=tensorflow_tasks(),
    )
    def inference() -> None:
        """Declare the one task."""

        @task(execution_timeout=timedelta(hours=12), outlets=[Asset(f"{name}_predictions")])
        def infer() -> str:
            """Predict the class of each image, and write a Parquet file. A killed task resumes after its last part."""
            return infer_in_task(components.infer.infer, output)

        infer()

    return inference()
