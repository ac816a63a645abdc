"""``airflow standalone``, after its files and the pool were made: ``python -m ridgeline.airflow.standalone``.

Both use one process, because importing Airflow takes seconds.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from ridgeline.airflow.pool import create_pool


def main() -> None:
    """Create Airflow's configuration, tables and password, and the pool; then run Airflow until it is stopped.

    Only this user can read the files, and the password is in its own file alone: Airflow would print it, too.
    """
    from airflow.__main__ import main as airflow
    from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
    from airflow.configuration import write_default_airflow_configuration_if_needed
    from airflow.utils.db import initdb

    umask = os.umask(0o077)
    write_default_airflow_configuration_if_needed()
    initdb()
    create_pool()
    with redirect_stdout(io.StringIO()):
        SimpleAuthManager().init()  # type: ignore[no-untyped-call]
    os.umask(umask)  # artifacts are made with the user's own
    # An earlier version may have left it readable.
    Path(SimpleAuthManager.get_generated_password_file()).chmod(0o600)
    sys.argv = ["airflow", "standalone"]
    airflow()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
