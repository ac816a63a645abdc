"""The pool that limits how many tasks use TensorFlow at a time."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from ridgeline.airflow.settings import AirflowSettings

TENSORFLOW = "tensorflow"  # the scheduler starts no task of a pool that does not exist


def tensorflow_tasks() -> dict[str, Any]:
    """Return the ``default_args`` of a DAG whose tasks use TensorFlow: queue, pool, one retry, messages."""
    from ridgeline.airflow.notifications import Notifier

    return {
        "queue": "tensorflow",
        "pool": TENSORFLOW,
        "retries": 1,
        "retry_delay": timedelta(seconds=10),
        "on_failure_callback": Notifier("task_failed"),
    }


def create_pool() -> None:
    """Create the pool `TENSORFLOW` in Airflow's database. A pool that exists keeps its size."""
    from airflow.models.pool import Pool
    from airflow.utils.session import create_session

    with create_session() as session:
        if Pool.get_pool(TENSORFLOW, session=session) is None:
            description = "Tasks that use TensorFlow. One training needs about 1 GB of memory."
            slots = AirflowSettings().tensorflow_slots
            session.add(Pool(pool=TENSORFLOW, slots=slots, description=description, include_deferred=False))
