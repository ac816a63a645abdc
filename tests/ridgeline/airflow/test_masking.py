"""A failing task and the pages: the secrets of the store's URL are in none of their texts, nor in a run's files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ridgeline import masking, pipeline
from ridgeline.component import StepError

ROOT = Path(__file__).resolve().parents[3]
PASSWORD, TOKEN = "hunter22@/x:y", "t0k3n-value"
URL = f"memory://ann:{PASSWORD}@bucket/store?token={TOKEN}"


def assert_hidden(text: str) -> None:
    assert not [secret for secret in (PASSWORD, "hunter22", TOKEN) if secret in text], text


@pytest.fixture
def airflow_modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))  # read at Airflow's first import
        from ridgeline.airflow import form, notifications, task
    monkeypatch.setattr(masking, "_known", set())
    monkeypatch.setenv("RIDGELINE_STORE", URL)
    monkeypatch.setenv("RIDGELINE_SERVING", str(tmp_path_factory.mktemp("serving")))
    return SimpleNamespace(form=form, notifications=notifications, task=task)


@pytest.mark.parametrize("kind", [StepError, OSError])
def test_a_failing_task_shows_no_secret(
    airflow_modules: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    from airflow.sdk._shared.secrets_masker import redact

    task: ModuleType = airflow_modules.task
    steps, xcoms = pipeline.load_components(), dict[str, str]()
    declared = airflow_modules.form.form(*steps.values())
    context: dict[str, Any] = {"dag": SimpleNamespace(params=declared), "run_id": "run-1"}
    context |= {"params": {name: param.value for name, param in declared.items()}}
    context |= {"dag_run": SimpleNamespace(triggering_user_name="ann", conf={})}
    context |= {"ti": SimpleNamespace(xcom_push=lambda key, value: xcoms.update({key: value}))}
    monkeypatch.setattr(task, "get_current_context", lambda: context)

    def fail(*_: Any, **__: Any) -> Any:
        raise kind(f"no login with {PASSWORD} at {URL}")

    monkeypatch.setattr(task, "run_step", fail)
    with caplog.at_level("DEBUG", logger="ridgeline"), pytest.raises(Exception, match="no login") as caught:
        task.run_in_task(steps["ingest"])
    resume = next(message for message in caplog.messages if "To resume" in message)
    assert "RIDGELINE_STORE='memory://***@bucket/store?token=***'" in resume
    assert_hidden(caplog.text)
    assert_hidden(str(redact(str(caught.value))))  # what Airflow writes into the log of the task
    if kind is StepError:
        assert_hidden(str(caught.value))
    context["params"]["train.epochs"] = f"{URL}"
    with pytest.raises(Exception, match="train.epochs"):
        task.run_in_task(steps["ingest"])
    assert "train.epochs" in xcoms["reason"]
    assert_hidden(xcoms["reason"])


def test_a_message_to_people_shows_no_secret(airflow_modules: Any) -> None:
    ti = SimpleNamespace(dag_id="shoes", task_id="train", run_id="run 1", try_number=1, log_url="http://log")
    title, body = airflow_modules.notifications.Notifier("task_failed")._message(
        {"ti": ti, "exception": OSError(f"no login at {URL}")}
    )
    assert "no login at memory://***@bucket/store?token=***" in body
    assert_hidden(title + body)


@pytest.mark.airflow
def test_a_page_that_cannot_be_shown_shows_no_secret(tmp_path: Path) -> None:
    program = """
import sys
from fastapi.testclient import TestClient
from ridgeline.airflow.plugin.app import create
from ridgeline.settings import Settings, SettingsError
from ridgeline.store import Store, StoreError

app = create()
Store(sys.argv[1])
for number, kind in enumerate((StoreError, OSError, SettingsError)):
    def page(kind=kind):
        raise kind(f"no file {sys.argv[1]}/x or {sys.argv[1].partition('://')[2]}/x")
    app.get(f"/{number}")(page)
    response = TestClient(app).get(f"/{number}")
    print(response.status_code, response.text)
"""
    env = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-P", "-c", program, URL], env=env, capture_output=True, text=True)
    assert len(re.findall("^503 ", done.stdout, re.MULTILINE)) == 3, done.stderr
    assert done.stdout.count("memory://***@bucket/store?token=***") == 6  # in the log, and on the page
    assert_hidden(done.stdout + done.stderr)


@pytest.mark.airflow
def test_a_failing_run_leaves_no_secret_on_the_terminal_or_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "dags").symlink_to(ROOT / "dags")
    settings = {"RIDGELINE_STORE": URL, "RIDGELINE_SERVING": str(tmp_path / "serving"), "HOME": str(tmp_path)}
    # TensorFlow's messages name the folder, and the URL with it
    settings |= {"RIDGELINE_MANUAL_DIR": "/nowhere", "RIDGELINE_NOTIFY": f"json://bob:{TOKEN}@127.0.0.1:9/hook"}
    command = [sys.executable, "-P", "-m", "ridgeline.airflow.local", "run", "fashion_mnist_training"]
    env = {**os.environ, **settings}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "ingest failed: Expected a folder that can be read; received /nowhere" in done.stdout
    files = [path for path in (tmp_path / "var").rglob("*") if path.is_file()]
    assert any("memory://***@bucket/store?token=***" in path.read_text(errors="replace") for path in files)
    assert_hidden(done.stdout + done.stderr)
    for path in files:
        assert_hidden(path.read_text(errors="replace"))
