"""Why tasks were skipped or failed without running a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from ridgeline.airflow import REASON

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def find_reasons(session: Session, dag_id: str, run_id: str) -> dict[str, str]:
    """Return the reasons that the tasks of a run left in Airflow's database, by task.

    Args:
        session: A session of the database.
        dag_id: The DAG.
        run_id: The run.
    """
    from airflow.models.xcom import XComModel
    from sqlalchemy import select

    found = session.execute(
        select(XComModel.task_id, XComModel.value).where(
            XComModel.dag_id == dag_id, XComModel.run_id == run_id, XComModel.key == REASON
        )
    )
    return {task_id: str(XComModel.deserialize_value(SimpleNamespace(value=value))) for task_id, value in found}
