"""A bad setting in the DAG files: Airflow shows an import error whose last line names the variable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.airflow
DAGS = Path(__file__).resolve().parents[2] / "dags"
LOAD = """
import json, os, sys
from airflow.dag_processing.dagbag import DagBag

found = {}
for name, value in json.loads(sys.argv[1]).items():
    os.environ[name] = value
    errors = DagBag().import_errors
    found[name] = {path.rpartition("/")[2]: text.strip().splitlines()[-1] for path, text in errors.items()}
    del os.environ[name]
print("\\n" + json.dumps(found))
"""
BAD = {"RIDGELINE_KEEP_VERSIONS": "abc", "RIDGELINE_DEFAULTS": "[1", "RIDGELINE_DEADLINE_MINUTES": "inf"}
BAD |= {"RIDGELINE_SCHEDULE": "weekly", "RIDGELINE_MAINTENANCE_SCHEDULE": "0 0 30 2 *", "RIDGELINE_NOTIFY": "foo://x"}


def test_every_dag_file_names_the_variable(load_dags: Any) -> None:
    for name, errors in load_dags(LOAD, BAD).items():
        assert errors.keys() == {path.name for path in DAGS.glob("*.py")} - {
            "__init__.py",
            "inference.py",
            "preparation.py",
            "training.py",
        }, name
        for line in errors.values():
            assert line.startswith(f"ridgeline.settings.SettingsError: Setting {name}: expected "), line
