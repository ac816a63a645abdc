"""The tasks that every training DAG begins with: bring in the examples, and check them.

No DAG is defined here, so Airflow does not read this file (``.airflowignore``).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, task

import components.ingest
import components.schema
import components.statistics
import components.transform
import components.validate
from ridgeline.airflow.task import run_in_task

PREPARATION = (
    components.ingest.ingest,
    components.transform.transform,
    components.statistics.statistics,
    components.schema.schema,
    components.validate.validate,
)


def prepare_examples(name: str | None = None) -> tuple[Any, Any, Any]:
    """Add the tasks of `PREPARATION` to the DAG that is being defined.

    Args:
        name: The dataset's name, if the DAG creates events of ``<name>_dataset`` and ``<name>_examples``.

    Returns:
        The dataset and the examples, for other tasks to take, and the last task, for others to run after it.
    """

    def outlets(kind: str) -> list[Asset]:
        return [Asset(f"{name}_{kind}")] if name else []

    @task(execution_timeout=timedelta(hours=1), outlets=outlets("dataset"))
    def ingest() -> str:
        """Prepare a dataset of tfds, or a folder of images, as arrays."""
        return run_in_task(components.ingest.ingest)

    @task(execution_timeout=timedelta(minutes=30), outlets=outlets("examples"))
    def transform(dataset: str) -> str:
        """Split the dataset into training, validation and test arrays; learn the normalization."""
        return run_in_task(components.transform.transform, dataset=dataset)

    @task(execution_timeout=timedelta(minutes=30))
    def statistics(examples: str) -> str:
        """Describe the images of each split, and find those that occur more than once."""
        return run_in_task(components.statistics.statistics, examples=examples)

    @task(execution_timeout=timedelta(minutes=30))
    def schema(statistics: str) -> str:
        """Read the schema file, keep the schema of the champion's examples, or infer one from these examples."""
        return run_in_task(components.schema.schema, statistics=statistics)

    @task(execution_timeout=timedelta(minutes=30))
    def validate(dataset: str, examples: str, statistics: str, schema: str) -> str:
        """Check the examples against the schema and the champion's. An error stops the run before training."""
        return run_in_task(
            components.validate.validate, dataset=dataset, examples=examples, statistics=statistics, schema=schema
        )

    # A call of a task returns an XComArg, which becomes the artifact's name when the task runs.
    dataset: Any = ingest()
    examples: Any = transform(dataset)
    described: Any = statistics(examples)
    expected: Any = schema(described)
    return dataset, examples, validate(dataset, examples, described, expected)
