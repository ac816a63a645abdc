"""The containers' health check: ``python health.py PART``. It imports no Airflow, which would take seconds each time.

The parts are those of Airflow's own health page, and ``worker``, which is asked through the broker.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import urllib.request
from pathlib import Path

SECONDS = 10


def main(*parts: str) -> None:
    """Exit with 0 if all parts are healthy, else with what was found.

    Args:
        *parts: ``metadatabase``, ``scheduler``, ``dag_processor``, ``triggerer`` or ``worker``.
    """
    for part in parts:
        found = _worker() if part == "worker" else _airflow()[part]["status"]
        if found != "healthy":
            sys.exit(f"{part} is {found}")


def _airflow() -> dict[str, dict[str, str]]:
    url = f"http://{os.environ['RIDGELINE_API_SERVER']}/api/v2/monitor/health"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            return json.load(answer)
    except OSError as error:
        sys.exit(f"{url} does not answer: {error}")


def _worker() -> str:
    from celery import Celery

    app = Celery(broker=Path("/secrets/broker_url").read_text())
    answers = app.control.inspect([f"celery@{socket.gethostname()}"], timeout=SECONDS).ping()
    return "healthy" if answers else "silent"


if __name__ == "__main__":
    main(*sys.argv[1:])
