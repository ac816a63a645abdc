from __future__ import annotations

from pathlib import Path

from ridgeline.airflow.server import environment


def test_all_of_airflow_s_files_are_in_the_folder(tmp_path: Path) -> None:
    env = environment(tmp_path, "airflow-run", {})
    assert env["AIRFLOW_HOME"] == str(tmp_path / "var" / "airflow-run")
    assert env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] == f"sqlite:///{tmp_path}/var/airflow-run/airflow.db"
    assert env["AIRFLOW__CORE__DAGS_FOLDER"] == str(tmp_path / "dags")
    assert env["RIDGELINE_STORE"] == str(tmp_path / "var" / "store")


def test_settings_of_another_airflow_are_omitted_and_those_of_ridgeline_kept(tmp_path: Path) -> None:
    outer = {
        "AIRFLOW_CONFIG": "/etc/airflow.cfg",
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "RIDGELINE_STORE": "s3://b",
    }
    env = environment(tmp_path, "airflow-run", outer)
    assert "AIRFLOW_CONFIG" not in env
    assert "AIRFLOW__CORE__EXECUTOR" not in env
    assert env["RIDGELINE_STORE"] == "s3://b"


def test_another_port_is_set_in_all_three_places(tmp_path: Path) -> None:
    env = environment(tmp_path, "airflow-ui", {}, port=8090)
    assert env["AIRFLOW__API__PORT"] == "8090"
    assert env["AIRFLOW__API__BASE_URL"] == "http://127.0.0.1:8090"
    assert env["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://127.0.0.1:8090/execution/"
