from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # apprise imports it
FAILED = {
    "ti": SimpleNamespace(dag_id="shoes", task_id="train", run_id="run 1", try_number=2, log_url="http://log"),
    "exception": ValueError("no data"),
}
LATE = {"dag_run": {"dag_id": "shoes", "dag_run_id": "run 1"}, "deadline": {"deadline_time": "noon"}}


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))  # read at Airflow's first import
        from ridgeline.airflow import notifications
    return notifications


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A webhook that RIDGELINE_NOTIFY names: the messages that it received, and the status that it responds with."""
    monkeypatch.setattr("ridgeline.messages.time.sleep", lambda seconds: None)  # between two tries
    hook = SimpleNamespace(received=[], status=200)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(hook.status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RIDGELINE_NOTIFY", f"json://127.0.0.1:{server.server_port}/hook")
        yield hook
        server.shutdown()


@pytest.mark.parametrize("status", [200, 500])
def test_a_failure_is_sent_and_a_refused_message_is_logged(
    module: ModuleType,
    webhook: SimpleNamespace,
    status: int,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    webhook.status = status
    module.Notifier("task_failed").notify(FAILED)
    log = capsys.readouterr().out
    assert webhook.received[0]["title"] == "shoes failed at train"
    assert "Run run 1, try 2: no data" in webhook.received[0]["message"]
    assert "shoes failed at train" in log
    assert ("Cannot deliver the message" in caplog.text) == (status == 500)


def test_the_link_to_the_log_is_whole_and_a_secret_in_the_error_is_hidden(
    module: ModuleType, webhook: SimpleNamespace
) -> None:
    link = "http://host/dags/shoes/runs/run 1/tasks/train?try_number=2"
    task = SimpleNamespace(**{**vars(FAILED["ti"]), "log_url": link})
    module.Notifier("task_failed").notify({"ti": task, "exception": ValueError("s3://ann:secret@bucket")})
    assert webhook.received[0]["message"] == f"Run run 1, try 2: s3://***@bucket\nLog: {link}"


@pytest.mark.parametrize("status", [200, 500])
def test_a_late_run_is_sent_and_a_refused_message_is_logged(
    module: ModuleType,
    webhook: SimpleNamespace,
    status: int,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    webhook.status = status
    asyncio.run(module.Notifier("late").async_notify(LATE))
    assert webhook.received[0]["title"] == "shoes is late"
    assert "Run run 1 has not succeeded by its deadline, noon." in webhook.received[0]["message"]
    assert ("Cannot deliver the message" in caplog.text) == (status == 500)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("timed_out", "Run run 1 exceeded its time limit, 6:00:00."),
        ("all_tasks_deadlocked", "Run run 1 failed: all_tasks_deadlocked."),
        ("task_failure", None),  # the task has sent a message
    ],
)
def test_a_failed_run_is_sent_unless_one_of_its_tasks_was(
    module: ModuleType, webhook: SimpleNamespace, reason: str, message: str | None
) -> None:
    from airflow.sdk import DAG

    dag = DAG("shoes", schedule=None, dagrun_timeout=timedelta(hours=6))
    module.Notifier("run_failed")({"dag": dag, "run_id": "run 1", "reason": reason})
    assert [(sent["title"], sent["message"]) for sent in webhook.received] == (
        [("shoes failed", message)] if message else []
    )


def test_without_recipients_the_message_is_logged_alone(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RIDGELINE_NOTIFY", raising=False)
    module.Notifier("task_failed").notify(FAILED)
    log = capsys.readouterr().out
    assert "shoes failed at train" in log
    assert "Cannot deliver" not in log
