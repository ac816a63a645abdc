from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from ridgeline.airflow.server import Standalone, environment, free_port

ROOT = Path(__file__).resolve().parents[3]


def test_all_of_airflow_s_files_are_in_the_folder(tmp_path: Path) -> None:
    env = environment(tmp_path, "airflow-run", {})
    assert env["AIRFLOW_HOME"] == str(tmp_path / "var" / "airflow-run")
    database = env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].partition("?")[0]
    assert database == f"sqlite:///{tmp_path}/var/airflow-run/airflow.db"
    assert env["AIRFLOW__CORE__DAGS_FOLDER"] == str(tmp_path / "dags")
    assert env["RIDGELINE_STORE"] == str(tmp_path / "var" / "store")


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+aiosqlite"])  # as Airflow opens it for its asynchronous code
def test_a_request_waits_for_another_process_s_write_as_long_as_it_may_take(tmp_path: Path, scheme: str) -> None:
    async def milliseconds() -> Any:
        if scheme == "sqlite":
            with create_engine(url).connect() as connection:
                return connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
        engine = create_async_engine(url)
        async with engine.connect() as connection:
            found = (await connection.exec_driver_sql("PRAGMA busy_timeout")).scalar()
        await engine.dispose()
        return found

    url = environment(tmp_path, ".", {})["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].replace("sqlite", scheme, 1)
    (tmp_path / "var").mkdir()
    assert asyncio.run(milliseconds()) == 60_000


def test_settings_of_another_airflow_are_omitted_and_those_of_ridgeline_kept(tmp_path: Path) -> None:
    outer = {
        "AIRFLOW_CONFIG": "/etc/airflow.cfg",
        "AIRFLOW_CONN_OPS": "apprise://",
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "RIDGELINE_STORE": "s3://b",
    }
    env = environment(tmp_path, "airflow-run", outer)
    assert "AIRFLOW_CONFIG" not in env
    assert env["AIRFLOW_CONN_OPS"] == "apprise://"
    assert "AIRFLOW__CORE__EXECUTOR" not in env
    assert env["RIDGELINE_STORE"] == "s3://b"


def test_another_port_is_set_in_all_three_places(tmp_path: Path) -> None:
    env = environment(tmp_path, "airflow-ui", {}, port=8090)
    assert env["AIRFLOW__API__PORT"] == "8090"
    assert env["AIRFLOW__API__BASE_URL"] == "http://127.0.0.1:8090"
    assert env["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://127.0.0.1:8090/execution/"


# --- behind an HTTP proxy, which does not know this machine's servers


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A user's environment with a proxy that does not respond; this process has it, too."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    outer = {name: f"http://127.0.0.1:{free_port()}" for name in ("http_proxy", "HTTP_PROXY", "https_proxy")}
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    return outer


@pytest.fixture
def health() -> Iterator[int]:
    """The port of a server that responds as a healthy Airflow does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            parts = ("metadatabase", "scheduler", "dag_processor", "triggerer")
            self.wfile.write(json.dumps({part: {"status": "healthy"} for part in parts}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_make_ui_reaches_its_own_airflow_without_the_proxy(tmp_path: Path, proxy: dict[str, str], health: int) -> None:
    assert Standalone(environment(tmp_path, "airflow-ui", proxy, health), tmp_path / "log").is_healthy()


def test_a_task_reaches_its_own_airflow_without_the_proxy(tmp_path: Path, proxy: dict[str, str], health: int) -> None:
    env = environment(tmp_path, "airflow-ui", proxy | {"NO_PROXY": "s3.internal"}, health)
    program = "import httpx, sys; print(httpx.Client().get(sys.argv[1], timeout=5).status_code)"  # as Airflow's SDK
    for host in ("127.0.0.1", "localhost"):
        command = [sys.executable, "-P", "-c", program, f"http://{host}:{health}/"]
        assert subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout == "200\n"


def test_the_health_check_of_the_stack_uses_no_proxy(proxy: dict[str, str], health: int) -> None:
    command = [sys.executable, str(ROOT / "docker" / "health.py"), "scheduler"]
    env = {**os.environ, **proxy, "RIDGELINE_API_SERVER": f"127.0.0.1:{health}"}
    assert subprocess.run(command, env=env, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("outer", "expected"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"no_proxy": "a.org, localhost", "NO_PROXY": "b.org"}, "a.org,localhost,b.org,127.0.0.1"),
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_the_hosts_that_the_user_reaches_directly_are_kept(
    tmp_path: Path, outer: dict[str, str], expected: str
) -> None:
    env = environment(tmp_path, "airflow-ui", outer)
    assert (env["no_proxy"], env["NO_PROXY"]) == (expected, expected)
