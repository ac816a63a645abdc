"""Clean Airflow's database, in a process of its own: ``python -m ridgeline.airflow.metadata DAG RUN BEFORE``."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

NOT_FOUND = 3  # exit status if the database is not that of the run


def main() -> int:
    """Delete the rows that are older than a time; keep no archive tables.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("dag_id")
    parser.add_argument("run_id")
    parser.add_argument("before", type=datetime.fromisoformat)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if problem := find_problem(arguments.dag_id, arguments.run_id):
        print(problem)
        return NOT_FOUND
    from airflow.utils.db_cleanup import run_cleanup

    run_cleanup(
        clean_before_timestamp=arguments.before,  # run_cleanup converts it
        dry_run=arguments.dry_run,
        confirm=False,
        skip_archive=True,
        error_on_cleanup_failure=True,
    )
    return 0


def find_problem(dag_id: str, run_id: str) -> str:
    """Return why the configured database is not that of a run; empty if it is.

    Args:
        dag_id: The DAG's id.
        run_id: The run's id.
    """
    from airflow.models.dagrun import DagRun
    from airflow.settings import get_engine
    from airflow.utils.session import create_session
    from sqlalchemy import select
    from sqlalchemy.exc import DatabaseError

    url = get_engine().url  # type: ignore[no-untyped-call]
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).is_file():  # would be created
        return f"the configured database {shown} does not exist."
    try:
        with create_session() as session:
            found = session.scalar(select(DagRun.id).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id))
    except DatabaseError as error:
        message = " ".join(str(error.orig).split())
        if "no such table" in message or "does not exist" in message:
            return f"the configured database {shown} is not Airflow's: {message}."
        raise RuntimeError(f"the configured database {shown} does not respond: {message}.") from error
    return "" if found else f"the configured database {shown} does not hold the run {run_id} of {dag_id}."


if __name__ == "__main__":
    sys.exit(main())
