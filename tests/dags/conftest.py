"""DAG files as Airflow loads them, in a process and an AIRFLOW_HOME of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ridgeline.airflow.server import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def load_dags(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run a program that gets a value as JSON and prints its result as the last line; environment by name."""

    def load(program: str, value: Any, **settings: str) -> Any:
        env = environment(tmp_path_factory.mktemp("dags"), "airflow", os.environ)
        env |= {"AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags")} | settings
        command = [sys.executable, "-c", f"import gc; gc.disable()\n{program}", json.dumps(value)]  # it ends soon
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return load
