"""One Airflow for all tests here: scheduler and web server, on drawn images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from ridgeline.airflow.server import Standalone, environment, free_port
from ridgeline.pipeline import run_records
from ridgeline.settings import Settings
from ridgeline.store import Execution
from tests.processes import kill

ROOT = Path(__file__).resolve().parents[2]
DAG = "fashion_mnist_training"
RUNNING = ExitStack()  # the Airflow of the fixture `airflow`
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1000}
BAD = {"evaluate.min_accuracy": 1}  # no model reaches it
CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
)
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
SCREENSHOTS = ROOT / "test-output"
PAGE_SECONDS = 180  # on a slow machine; nothing waits longer than it has to


class Airflow(Standalone):
    """A running ``airflow standalone``, with queries for tests."""

    ticks: list[datetime]  # when the training DAG's schedule starts a run
    messages: list[dict[str, Any]]  # what the webhook of RIDGELINE_NOTIFY received
    messages_by_connection: list[dict[str, Any]]  # what the webhook of a connection in Airflow's database received

    @property
    def store(self) -> str:
        """The store's root."""
        return self.env["RIDGELINE_STORE"]

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """Return a DAG's runs, oldest first."""
        return self.call("GET", f"/api/v2/dags/{dag_id}/dagRuns?order_by=run_after")[1]["dag_runs"]

    def records(self, run_id: str) -> dict[str, Execution]:
        """Return the last execution of each step of a run, by step."""
        return run_records(Settings(store=self.store), run_id)

    def states(self, dag_id: str, run_id: str) -> dict[str, str]:
        """Return the states of a run's tasks."""
        found = self.call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances")[1]["task_instances"]
        return {task["task_id"]: task["state"] for task in found}

    def log(self, dag_id: str, run_id: str, task_id: str) -> str:
        """Return the log of a task's last try."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        number = self.call("GET", path)[1]["try_number"]
        return json.dumps(self.call("GET", f"{path}/logs/{number}")[1], ensure_ascii=False)

    def wait(self, what: str, happened: Callable[[], Any], seconds: float = 300) -> Any:
        """Wait until something is true, and return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if result := happened():
                return result
            time.sleep(0.5)
        raise TimeoutError(
            f"Waited {seconds} s for {what}. Airflow's log ends with:\n{self.log_file.read_text()[-5000:]}"
        )


@contextmanager
def start_airflow(folder: Path, **settings: str) -> Iterator[Airflow]:
    """Run an Airflow with the project's DAGs, and a store in the folder.

    Args:
        folder: Receives all files.
        **settings: More environment variables.
    """
    outer = {name: value for name, value in os.environ.items() if not name.startswith("RIDGELINE_")}
    env = environment(folder, "airflow", outer, free_port()) | {"AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags")}
    env |= {"AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "120"}  # the files do not change
    with Airflow(env | settings, folder / "standalone.log") as running:
        running.wait("Airflow to be healthy", running.is_healthy)
        running.wait("the password", running.password_file.exists)
        ignored = (ROOT / "dags" / ".airflowignore").read_text().split()
        num_dags = len({file.name for file in (ROOT / "dags").glob("[!_]*.py")} - {*ignored})
        running.wait("the DAGs", lambda: running.call("GET", "/api/v2/dags")[1]["total_entries"] == num_dags)
        yield running


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run a webhook; yield its address for Apprise, and what it receives."""
    received: list[dict[str, Any]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"json://127.0.0.1:{server.server_port}/hook", received
        server.shutdown()


@pytest.fixture(scope="session")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    """The Airflow that all tests here share.

    Its training DAG runs by itself in a few minutes of the hour only, so that other tests have it for themselves: the
    first is over when Airflow has started, and the second while the first run works. The last one is for a machine on
    which Airflow takes minutes to start.
    `make screenshots` names the official files' folder in SCREENSHOT_DATA: then nothing runs by itself.
    """
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    ticks = [now + timedelta(minutes=number) for number in (0, 2, 5)]
    settings = {"RIDGELINE_DEADLINE_MINUTES": "0.05", "RIDGELINE_APPROVERS": "admin"}
    settings |= {"AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin,other:admin"}
    if files := os.environ.get("SCREENSHOT_DATA"):
        settings |= {"RIDGELINE_SCHEDULE": "never", "RIDGELINE_MANUAL_DIR": files}
    else:
        minutes = ",".join(str(tick.minute) for tick in ticks)
        settings |= {"RIDGELINE_SCHEDULE": f"{minutes} * * * *", "RIDGELINE_DEFAULTS": json.dumps(SYNTHETIC)}
    with RUNNING:
        address, messages = RUNNING.enter_context(webhook())
        other_address, others = RUNNING.enter_context(webhook())
        settings["RIDGELINE_NOTIFY"] = "airflow://environment airflow://database"
        connection = {"conn_type": "apprise", "extra": json.dumps({"config": {"path": address}})}
        settings["AIRFLOW_CONN_ENVIRONMENT"] = json.dumps(connection)
        running = RUNNING.enter_context(start_airflow(tmp_path_factory.mktemp("airflow"), **settings))
        RUNNING.callback(kill, running.process)  # its orderly end takes 9 s; test_watcher.py has one
        connection |= {"connection_id": "database", "extra": json.dumps({"config": {"path": other_address}})}
        assert running.call("POST", "/api/v2/connections", connection)[0] == 201
        running.ticks, running.messages, running.messages_by_connection = ticks, messages, others
        yield running


@pytest.fixture(scope="session")
def run_dags() -> Callable[[Path, str, Any], Any]:
    """Run a program on the project's DAGs. It gets a value as JSON and writes its result as JSON into a file."""

    def run(folder: Path, program: str, value: Any) -> Any:
        env = environment(folder, "airflow", os.environ)
        env |= {"AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"), "RIDGELINE_STORE": str(folder / "store")}
        for name in ("RIDGELINE_MANUAL_DIR", "RIDGELINE_SERVING"):
            env.pop(name, None)
        report = folder / "results.json"
        command = [sys.executable, "-c", program, json.dumps(value), str(report)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return json.loads(report.read_text())

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """Stop Airflow after its last test: it would take a fifth of a core from the other tests."""
    try:
        yield
    finally:
        if "airflow" not in getattr(nextitem, "fixturenames", ()):
            RUNNING.close()


@pytest.fixture(scope="session")
def not_blessed(airflow: Airflow) -> str:
    """The id of a run whose model the gate refuses."""
    run_id = airflow.trigger(DAG, BAD)
    assert airflow.wait_for_run(DAG, run_id, 300) == "success"
    return run_id


@pytest.fixture(scope="module")
def chromium() -> Path:
    if not CHROMIUM.exists():
        missing = f"Expected Debian's Chromium at {CHROMIUM}; received none. Install it: apt-get install -y chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    return CHROMIUM


@pytest.fixture(scope="module")
def tab(chromium: Path, airflow: Airflow) -> Iterator[Page]:
    """A tab in which the user ``admin`` has logged in. It is empty: a page of Airflow takes half a core."""
    SCREENSHOTS.mkdir(exist_ok=True)
    password = json.loads(airflow.password_file.read_text())["admin"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*OPTIONS.split(), NO_NETWORK])
        page = browser.new_page(viewport={"width": 1280, "height": 960}, base_url=airflow.url)
        page.set_default_timeout(1000 * PAGE_SECONDS)
        expect.set_options(timeout=1000 * PAGE_SECONDS)
        page.goto("/")
        page.fill("input[name=username]", "admin")
        page.fill("input[name=password]", password)
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name="Dags").first).to_be_visible()
        page.goto("about:blank")
        yield page
        browser.close()


@pytest.fixture
def page(tab: Page) -> Iterator[Page]:
    """The tab, for one test."""
    yield tab
    tab.goto("about:blank")
