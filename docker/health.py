"""The health check of the containers: ``python health.py PART``.

The parts are those of Airflow's health page, and ``worker``, which is queried through the broker. The check does not
import Airflow, which would take seconds each time.
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
    """Exit with 0 if all parts are healthy, otherwise with the status of the first that is not.

    Args:
        *parts: ``metadatabase``, ``scheduler``, ``dag_processor``, ``triggerer`` or ``worker``.
    """
    for part in parts:
        found = _worker() if part == "worker" else _airflow()[part]["status"]
        if found != "healthy":
            sys.exit(f"{part} is {found}")


def _airflow() -> dict[str, dict[str, str]]:
    url = f"http://{os.environ['RIDGELINE_API_SERVER']}/api/v2/monitor/health"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the stack's own services need no proxy
    try:
        with direct.open(url, timeout=SECONDS) as response:
            return json.load(response)
    except OSError as error:
        sys.exit(f"Cannot reach {url}: {error}")


def _worker() -> str:
    from celery import Celery

    app = Celery(broker=Path("/secrets/broker_url").read_text())
    responses = app.control.inspect([f"celery@{socket.gethostname()}"], timeout=SECONDS).ping()
    return "healthy" if responses else "not responding"


if __name__ == "__main__":
    main(*sys.argv[1:])
