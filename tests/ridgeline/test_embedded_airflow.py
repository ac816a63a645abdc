from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from ridgeline import embedded_airflow
from ridgeline.embedded_airflow import OFFICIAL_FILES, choose_data, environment, find_official_files
from ridgeline.standalone import free_port

# --- the environment


def test_all_of_airflow_s_files_are_in_the_folder(tmp_path: Path) -> None:
    env = environment(tmp_path, "airflow-run", {})
    assert env["AIRFLOW_HOME"] == str(tmp_path / "var" / "airflow-run")
    assert env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] == f"sqlite:///{tmp_path}/var/airflow-run/airflow.db"
    assert env["AIRFLOW__CORE__DAGS_FOLDER"] == str(tmp_path / "dags")
    assert env["RIDGELINE_STORE"] == str(tmp_path / "var" / "store")


def test_another_airflow_s_settings_do_not_leak_in_but_ridgeline_s_do(tmp_path: Path) -> None:
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


# --- the data


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without data, with an empty store and no manual directory."""
    monkeypatch.setenv("RIDGELINE_MANUAL_DIR", "recorded, so that it is put back after the test")
    monkeypatch.delenv("RIDGELINE_MANUAL_DIR")
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(embedded_airflow, "_host_answers", lambda _: False)
    folder = tmp_path / "checkout"
    folder.mkdir()
    return folder


def put_files(folder: Path, names: tuple[str, ...] = OFFICIAL_FILES) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_the_first_folder_with_all_files_is_used(folder: Path) -> None:
    assert find_official_files(folder) is None
    shared = put_files(folder.parent / "shared/data/fashion-mnist")
    assert find_official_files(folder) == shared
    own = put_files(folder / "data/fashion-mnist", OFFICIAL_FILES[:3])
    assert find_official_files(folder) == shared
    (own / OFFICIAL_FILES[3]).touch()
    assert find_official_files(folder) == own


def test_found_files_are_used_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = put_files(folder / "data/fashion-mnist")
    assert choose_data(folder, {"train.epochs": 3}) == {"train.epochs": 3}
    assert os.environ["RIDGELINE_MANUAL_DIR"] == str(own)
    assert str(own) in capsys.readouterr().out


def test_what_the_user_named_is_never_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_data(folder, {"ingest.dataset": "mnist:3.0.1"}) == {"ingest.dataset": "mnist:3.0.1"}
    monkeypatch.setenv("RIDGELINE_MANUAL_DIR", str(folder / "empty"))
    assert choose_data(folder, {}) == {}
    assert os.environ["RIDGELINE_MANUAL_DIR"] == str(folder / "empty")


def test_tfds_downloads_if_the_host_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(embedded_airflow, "_host_answers", lambda dataset: not asked.append(dataset))
    assert choose_data(folder, {}) == {}
    assert asked == ["fashion_mnist:3.0.1"]


def test_without_data_it_warns_loudly_and_draws_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = choose_data(folder, {"train.epochs": 3, "transform.validation_examples": 500})
    assert values == {
        "ingest.dataset": "synthetic_garments:1.0.0",
        "train.epochs": 3,
        "transform.validation_examples": 500,
    }
    assert "NOT THE REAL DATA" in capsys.readouterr().out


def test_data_that_an_earlier_run_prepared_needs_no_files_and_no_host(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_airflow, "_is_prepared", lambda _: True)
    assert choose_data(folder, {}) == {}


@pytest.mark.parametrize("command", ["run", "ui"])
def test_it_says_where_it_must_be_run(command: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "ridgeline.embedded_airflow", command]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Expected to be run in Ridgeline's folder; received")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "home"), [("run", "airflow-run"), ("ui", "airflow-ui")])
def test_one_at_a_time_in_a_folder(command: str, home: str, tmp_path: Path) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "var" / home).mkdir(parents=True)
    port = ["--port", str(free_port())] if command == "ui" else []
    arguments = [sys.executable, "-m", "ridgeline.embedded_airflow", command, *port]
    with FileLock(tmp_path / "var" / home / ".lock"):
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "at a time in" in done.stderr
