"""``airflow standalone``, after the pool was created: ``python -m ridgeline.airflow.standalone``.

Both use one process, because importing Airflow takes seconds.
"""

from __future__ import annotations

import sys

from ridgeline.airflow.pool import create_pool


def main() -> None:
    """Create Airflow's tables and the pool, then run Airflow until it is stopped."""
    from airflow.__main__ import main as airflow
    from airflow.configuration import write_default_airflow_configuration_if_needed
    from airflow.utils.db import initdb

    write_default_airflow_configuration_if_needed()
    initdb()
    create_pool()
    sys.argv = ["airflow", "standalone"]
    airflow()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
