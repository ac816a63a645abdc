"""Texts with HTML in the pages and reports; generated requests and path tricks against Airflow's own API server."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from torture import whole_runs
from torture.report import Options, Row, run_cases, skipped
from torture.toys import MODEL_NAME
from torture.world import World, leave_out_the_serving_check

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</textarea></style></title><b>",
    "{{ 7 * 7 }}{% for x in [] %}",
    "<!--",
    "javascript:alert(1)",
    "&lt;script&gt;",
    "\u202e\u2028<i>",
)
PAGES = "HTML in every text of the pages and reports"
ROUTES = "generated requests to the plugin's routes"
TRICKS = "path tricks on the plugin's routes"
REQUESTS = 600
ENOUGH_SECONDS = 60.0  # for the requests, however long the server took to start
CANARY = "this text lies outside of the store's reports"
TRAINING = "fashion_mnist_training"
MAKE_RUNS = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.utils.db import initdb

initdb()
dag = DagBag().dags[sys.argv[1]]
dag.deadline = None
print("RUN", dag.test(run_conf=json.loads(sys.argv[2])).run_id)
"""
SCHEMA = "import json; from ridgeline.airflow.plugin.app import create; print('SCHEMA', json.dumps(create().openapi()))"


def run(options: Options) -> Iterator[Row]:
    """Yield the rows of the pages, of generated requests and of path tricks."""
    leave_out_the_serving_check()
    yield _pages(options)
    if any(options.wants(test) for test in (ROUTES, TRICKS)):
        yield from _server(options)


# --- HTML in texts


class Tags(HTMLParser):
    """The tags and the names of attributes of a document, in order, and links that run code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.found.append((tag, [name for name, _ in attrs]))
        self.found += ["link to code" for _, value in attrs if (value or "").lower().startswith("javascript:")]

    def handle_comment(self, data: str) -> None:
        """Note a comment."""
        self.found.append("comment")


def _pages(options: Options) -> Row:
    from ridgeline.airflow.plugin import models_page, run_page
    from ridgeline.airflow.plugin.template import render_template

    template = World.template(options.folder / "template")

    def pages(folder: Path, text: str) -> dict[str, str]:
        world = template.copy(folder)
        store, registry = world.settings.open_store(), world.settings.open_registry()
        started_at = datetime.now(UTC)
        record = next(store.executions("seed"))
        run_id = f"run {text}"
        later = started_at + timedelta(seconds=1)
        failed = {"run_id": run_id, "state": "failed", "reason": text, "output": None, "started_at": later}
        store.record(record.model_copy(update=failed))
        registry.rollback(store, MODEL_NAME, None, reason=f"reason {text}", by=f"by {text}", run_id=run_id)
        end = started_at + timedelta(minutes=1)
        tasks = (
            run_page.Task("seed", "failed", started_at, end, f"task {text}"),
            run_page.Task(f"other {text}", "skipped", started_at, end, f"task {text}"),
            run_page.Task("rollback_model", "success", started_at, end),
        )
        run = run_page.Run(
            f"dag {text}", run_id, "failed", started_at, end, f"note {text}",
            {f"name {text}": (f"default {text}", f"value {text}"), "list": ([text], [{text: text}])}, tasks,
        )  # fmt: skip
        found = {
            "run": run_page.render(world.settings, run),
            "models": models_page.render(registry, lambda ids: dict.fromkeys(ids, f"dag {text}")),
            "message": render_template("message", title=text, text=text, synthetic=False),
        }
        shutil.rmtree(world.folder)
        return found

    harmless = {name: Tags(page).found for name, page in pages(options.folder / "harmless", "harmless").items()}

    def hostile(case: int, rng: random.Random) -> list[str]:
        parts = [rng.choice(HOSTILE) for _ in range(1 + case // len(HOSTILE) % 3)]
        text = HOSTILE[case] if case < len(HOSTILE) else "x".join(parts)
        found = pages(options.folder / f"page {case}", text)
        return [
            f"unescaped: {name} with {text!r}" for name, page in found.items() if Tags(page).found != harmless[name]
        ]

    return run_cases(options, PAGES, 60, "nothing unescaped", hostile)


# --- the server


def _server(options: Options) -> Iterator[Row]:
    from ridgeline.airflow.server import environment, free_port

    folder = options.folder / "server"
    root = Path(__file__).resolve().parent.parent
    shutil.copytree(root / "dags", folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    world, problem = whole_runs.make(folder / "world", seconds=300)
    if problem:
        yield Row(ROUTES, 0, problem, "", False, (problem,))
        return
    (folder / "secret.txt").write_text(CANARY)
    (world.folder / "store" / "secret.html").write_text(CANARY)
    env = environment(folder, "airflow", os.environ, free_port()) | {
        "RIDGELINE_STORE": str(world.folder / "store"),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "reader:viewer,stranger:",
    }
    run_id = _output(env, "RUN", MAKE_RUNS, TRAINING, json.dumps(whole_runs.SYNTHETIC))
    schema = json.loads(_output(env, "SCHEMA", SCHEMA))
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "airflow", "api-server"], env=env, stdout=file, stderr=file)
    try:
        url = env["AIRFLOW__API__BASE_URL"]
        _wait_for(url, process, log)
        passwords = json.loads(next(Path(env["AIRFLOW_HOME"]).glob("simple_auth_manager_passwords*")).read_text())
        tokens = {user: _token(url, user, passwords[user]) for user in ("reader", "stranger")}
        options = dataclasses.replace(options, deadline=max(options.deadline, time.monotonic() + ENOUGH_SECONDS))
        yield _generated(options, url, tokens, schema, run_id)
        yield _tricks(options, url, tokens["reader"], run_id)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _generated(options: Options, url: str, tokens: dict[str, str], schema: dict[str, Any], run_id: str) -> Row:
    """Send what schemathesis makes of the routes' schema: as a reader, as a user without a role, without a token."""
    import hypothesis
    import schemathesis

    if not options.wants(ROUTES):
        return skipped(ROUTES, "", "not asked for")
    problems: Counter[str] = Counter()
    examples: dict[str, str] = {}
    statuses: Counter[str] = Counter()
    operations: list[Any] = [result.ok() for result in schemathesis.openapi.from_dict(schema).get_all_operations()]  # type: ignore[union-attr]
    users: list[str | None] = ["reader", "stranger", None]
    for operation in operations:
        route = operation.path

        @hypothesis.seed(options.seed)
        @hypothesis.settings(
            max_examples=max(5, options.count(REQUESTS) // len(operations)),
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(
            operation.as_strategy(), hypothesis.strategies.sampled_from(users), hypothesis.strategies.booleans()
        )
        def request(case: Any, user: str | None, real: bool) -> None:
            if time.monotonic() > options.deadline:
                return
            names = {"dag_id": TRAINING, "run_id": run_id} if real else {}
            given = {**(case.path_parameters or {}), **names}
            path = "/ridgeline" + route  # noqa: B023
            for name, value in given.items():
                path = path.replace(f"{{{name}}}", quote(str(value), safe=""))
            query = {**(case.query or {}), **({"a": "Model", "b": "Model"} if real else {})}
            if query:
                path += "?" + urlencode(query, doseq=True)
            headers = {name: quote(str(value)) for name, value in (case.headers or {}).items()}
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            headers |= {"Authorization": f"Bearer {tokens[user]}"} if user else {}
            status, body = _get(url, path, headers)
            statuses[f"{user or 'nobody'} {status}"] += 1
            if problem := _problem(status, body, user):
                problems[problem] += 1
                examples.setdefault(problem, f"{problem}: {user or 'nobody'} {path}: {status}")

        request()
    measured = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
    found = f"; {dict(problems)}" if problems else ""
    goal = "0 unauthenticated answers, 0 of status 500"
    return Row(
        ROUTES,
        statuses.total(),
        measured + found,
        goal,
        not problems and statuses.total() > 0,
        tuple(examples.values()),
    )


def _problem(status: int, body: str, user: str | None) -> str:
    if status >= 500:
        return "error of the server"
    if user != "reader" and status in (200, 304):
        return "answer without permission"
    if CANARY in body or "root:x:0" in body:
        return "content from outside"
    return ""


def _tricks(options: Options, url: str, token: str, run_id: str) -> Row:
    run = quote(run_id, safe="")
    ups = ("..", "%2e%2e", "%252e%252e", "..%2f..", "..%5c..", "%c0%ae%c0%ae", "....//", "%00", ".%2e")
    targets = ("secret.txt", "secret.html", "etc/passwd", "evaluate/report.html", "manifest.json", "airflow.cfg")
    roots = (f"/ridgeline/dags/{TRAINING}/runs/{run}/reports/", f"/ridgeline/dags/{TRAINING}/runs/", "/ridgeline/dags/",
             "/ridgeline/models/", "/ridgeline/compare?b=Model&a=", "/ridgeline/compare?a=Model&b=",
             "/ridgeline/")  # fmt: skip

    def trick(case: int, rng: random.Random) -> list[str]:
        slash = rng.choice(("/", "%2f", "%2F", "\\", "%5c"))
        path = rng.choice(roots) + slash.join([rng.choice(ups)] * rng.randrange(1, 9) + [rng.choice(targets)])
        status, body = _get(url, path, {"Authorization": f"Bearer {token}"})
        problem = _problem(status, body, "reader")
        if not problem and status == 200 and "<title>Airflow</title>" not in body and "/reports/" in path:
            problem = "a page where none is"
        return [f"{problem}: {path}: {status}"] if problem else []

    return run_cases(options, TRICKS, 300, "nothing escapes its folder", trick)


def _get(url: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Request a path as it is: other clients would normalize it."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.putrequest("GET", path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def _token(url: str, user: str, password: str) -> str:
    body = json.dumps({"username": user, "password": password}).encode()
    request = urllib.request.Request(f"{url}/auth/token", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return str(json.loads(answer.read())["access_token"])


def _output(env: dict[str, str], mark: str, code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    lines = [line.removeprefix(f"{mark} ") for line in done.stdout.splitlines() if line.startswith(f"{mark} ")]
    if done.returncode or not lines:
        raise RuntimeError(f"expected a line {mark}; received {done.stdout[-500:]} {done.stderr[-1000:]}")
    return lines[-1]


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + 120
    while True:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"expected a server at {url}; received {log.read_text()[-1000:]}")
        try:
            opener.open(f"{url}/api/v2/version", timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
