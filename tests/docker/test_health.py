"""The health check of the containers, against a server that responds as Airflow's does, and a broker in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("metadatabase", "scheduler", "dag_processor", "triggerer")


@pytest.fixture
def api_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """An API server that reports `states`, and responds with `status`."""
    server = SimpleNamespace(states={part: "healthy" for part in PARTS}, status=200, paths=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.paths.append(self.path)
            self.send_response(server.status)
            self.end_headers()
            body = {part: {"status": state, "latest_heartbeat": None} for part, state in server.states.items()}
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=[0.05], daemon=True).start()
        monkeypatch.setenv("RIDGELINE_API_SERVER", f"127.0.0.1:{listening.server_port}")
        yield server
        listening.shutdown()


def test_healthy_parts_pass(health: ModuleType, api_server: SimpleNamespace) -> None:
    health.main(*PARTS)
    assert set(api_server.paths) == {"/api/v2/monitor/health"}


@pytest.mark.parametrize("state", ["unhealthy", None, "degraded"])
@pytest.mark.parametrize("part", PARTS)
def test_any_part_that_is_not_healthy_fails_with_its_name(
    health: ModuleType, api_server: SimpleNamespace, part: str, state: str | None
) -> None:
    api_server.states[part] = state
    for parts in ([part], PARTS):
        with pytest.raises(SystemExit) as exit:
            health.main(*parts)
        assert exit.value.code == f"{part} is {state}"  # a text: the exit status is 1
    health.main(*[other for other in PARTS if other != part])


def test_an_api_server_that_does_not_respond_fails(
    health: ModuleType, api_server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    api_server.status = 500
    with pytest.raises(SystemExit, match="Cannot reach http://127.0.0.1:.*500"):
        health.main("scheduler")
    monkeypatch.setenv("RIDGELINE_API_SERVER", "127.0.0.1:9")
    with pytest.raises(SystemExit, match="Cannot reach http://127.0.0.1:9/"):
        health.main("scheduler")


@pytest.fixture
def broker(health: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A broker in this process, named by the file of the secret, and a short wait for its workers."""
    (tmp_path / "broker_url").write_text("memory://")
    named: Callable[[str], Path] = lambda path: tmp_path / Path(path).name  # noqa: E731
    monkeypatch.setattr(health, "Path", named)
    monkeypatch.setattr(health, "SECONDS", 0.2)


def test_a_worker_that_does_not_respond_fails(health: ModuleType, broker: None) -> None:
    with pytest.raises(SystemExit, match="worker is not responding"):
        health.main("worker")


def test_a_worker_that_responds_passes_and_another_one_is_not_asked(
    health: ModuleType, broker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from celery.app.control import Inspect

    asked: list[Any] = []

    def ping(self: Any) -> dict[str, Any]:
        asked.append(self.destination)
        return {"celery@here": {"ok": "pong"}}

    monkeypatch.setattr(Inspect, "ping", ping)
    monkeypatch.setattr(health.socket, "gethostname", lambda: "here")
    health.main("worker")
    assert asked == [["celery@here"]]
