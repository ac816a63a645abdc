"""The pool that limits how many tasks use TensorFlow at a time."""

from __future__ import annotations

from ridgeline.airflow.settings import AirflowSettings

TENSORFLOW = "tensorflow"  # the scheduler starts no task of a pool that does not exist


def create_pool() -> None:
    """Create the pool `TENSORFLOW` in Airflow's database. A pool that exists keeps its size."""
    from airflow.models.pool import Pool
    from airflow.utils.session import create_session

    with create_session() as session:
        if Pool.get_pool(TENSORFLOW, session=session) is None:
            description = "Tasks that use TensorFlow. One training needs about 1 GB of memory."
            slots = AirflowSettings().tensorflow_slots
            session.add(Pool(pool=TENSORFLOW, slots=slots, description=description, include_deferred=False))
