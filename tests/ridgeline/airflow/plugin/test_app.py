"""The pages as Airflow's own API server serves them: real runs, real tokens."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ridgeline.airflow.server import environment, free_port
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store

ROOT = Path(__file__).resolve().parents[4]
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1_000}
OTHER_DAG = """
from airflow.sdk import dag, task

@dag(schedule=None)
def other():
    @task
    def evaluate():
        return "Model/1"
    evaluate()

other()
"""
# Who may not read the runs of one DAG: Airflow's own simple manager knows roles alone.
AUTH_MANAGER = """
from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager

class Manager(SimpleAuthManager):
    def is_authorized_dag(self, *, user, details=None, **given):
        hidden = user.username == "outsider" and details is not None and details.id == "fashion_mnist_training"
        return not hidden and super().is_authorized_dag(user=user, details=details, **given)
"""
# A run that is in progress is one that ended, with its last tasks put back by hand.
MAKE_RUNS = """
import json, os, sys
from pathlib import Path
from typing import Any
from ridgeline.airflow.local import start_quickly

start_quickly()
from airflow.dag_processing.dagbag import DagBag
from airflow.utils.db import initdb
from airflow.utils.session import create_session
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance

initdb()
runs = {}
for name, dag_id, conf in json.loads(sys.argv[1]):
    dag = DagBag(f"{os.environ['AIRFLOW__CORE__DAGS_FOLDER']}/{dag_id}.py").dags[dag_id]
    dag.deadline = None  # dag.test fails where a DAG with a deadline succeeds
    runs[name] = [dag_id, dag.test(run_conf=conf).run_id]
with create_session() as session:
    for run in session.query(DagRun).filter_by(run_id=runs["in progress"][1]):
        run.state, run.end_date = "running", None
    for task in session.query(TaskInstance).filter_by(run_id=runs["in progress"][1]):
        if task.task_id in ("train", "evaluate", "label_errors", "export"):
            task.state, task.start_date, task.end_date = ("running" if task.task_id == "train" else None), None, None
Path(sys.argv[2]).write_text(json.dumps(runs))
"""


COMPARISON = "/ridgeline/compare?a=synthetic_garments/1&b=Model"

pytestmark = pytest.mark.airflow
CARD = "/ridgeline/models/synthetic_garments/1/card"


@dataclass(frozen=True)
class Server:
    """An API server with some runs."""

    url: str
    passwords: dict[str, str]
    runs: dict[str, tuple[str, str]]

    def client(self, user: str | None) -> httpx.Client:
        if user is None:
            return httpx.Client(base_url=self.url, trust_env=False)
        answer = httpx.post(
            f"{self.url}/auth/token", json={"username": user, "password": self.passwords[user]}, trust_env=False
        )
        headers = {"Authorization": f"Bearer {answer.json()['access_token']}"}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=60)

    def path(self, run: str) -> str:
        dag_id, run_id = self.runs[run]
        return f"/ridgeline/dags/{dag_id}/runs/{run_id.replace('+', '%2B')}"

    def get(self, path: str, user: str | None = "reader") -> httpx.Response:
        with self.client(user) as client:
            return client.get(path)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(synthetic: tuple[Settings, list[Execution]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(synthetic[0].store, folder / "store")
    shutil.copytree(ROOT / "dags", folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "dags" / "other.py").write_text(OTHER_DAG)
    (folder / "code").mkdir()
    (folder / "code" / "partial_access.py").write_text(AUTH_MANAGER)
    port = free_port()
    env = environment(folder, "airflow", os.environ, port) | {
        "RIDGELINE_STORE": str(folder / "store"),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "reader:viewer,stranger:,outsider:viewer",
        "AIRFLOW__CORE__AUTH_MANAGER": "partial_access.Manager",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "code"), os.environ.get("PYTHONPATH")])),
    }
    for name in ("RIDGELINE_MANUAL_DIR", "RIDGELINE_SERVING"):
        env.pop(name, None)
    training = "fashion_mnist_training"
    wanted = [
        ("reused", training, SYNTHETIC),
        ("not blessed", training, {**SYNTHETIC, "evaluate.min_accuracy": 1}),
        ("failed", training, {**SYNTHETIC, "trian.epochs": 3}),
        ("in progress", training, SYNTHETIC),
        ("other", "other", {}),
    ]
    report = folder / "runs.json"
    done = subprocess.run(
        [sys.executable, "-c", MAKE_RUNS, json.dumps(wanted), str(report)],
        env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    home = Path(env["AIRFLOW_HOME"])
    with (
        (home / "server.log").open("w") as log,
        subprocess.Popen([sys.executable, "-m", "airflow", "api-server"], env=env, stdout=log, stderr=log) as process,
    ):
        try:
            url = env["AIRFLOW__API__BASE_URL"]

            def is_up() -> bool:
                assert process.poll() is None, (home / "server.log").read_text()[-5000:]
                try:
                    return httpx.get(f"{url}/api/v2/version", trust_env=False).is_success
                except httpx.TransportError:
                    return False

            wait_for(is_up, 120)
            runs = {name: tuple(run) for name, run in json.loads(report.read_text()).items()}
            yield Server(url, json.loads(next(home.glob("simple_auth_manager_passwords*")).read_text()), runs)
        finally:
            process.send_signal(signal.SIGINT)


# --- who may read


def paths(server: Server) -> list[str]:
    report = f"{server.path('reused')}/reports/evaluate"
    return [server.path("reused"), report, "/ridgeline/models", COMPARISON, CARD]


def test_no_page_without_a_token(server: Server) -> None:
    assert [server.get(path, user=None).status_code for path in paths(server)] == [401] * 5


def test_no_page_with_a_bad_token(server: Server) -> None:
    headers = {"Authorization": "Bearer nonsense"}
    found = [httpx.get(server.url + path, headers=headers, trust_env=False).status_code for path in paths(server)]
    assert found == [403] * 5


def test_no_page_for_a_user_without_a_role(server: Server) -> None:
    assert [server.get(path, user="stranger").status_code for path in paths(server)] == [403] * 5


def test_a_reader_reads_all_pages(server: Server) -> None:
    assert [server.get(path).status_code for path in paths(server)] == [200] * 5


@pytest.mark.parametrize(
    ("dag_id", "conf"),
    [
        ("rollback_model", {"model": "synthetic_garments", "reason": "a viewer wants it"}),
        ("canary_model", {"model": "synthetic_garments", "action": "abort", "reason": "a viewer wants it"}),
        ("fashion_mnist_training", {**SYNTHETIC, "evaluate.force_reason": "a viewer wants it"}),
        ("maintenance", {}),
    ],
)
def test_a_viewer_starts_no_run_and_clears_no_task(server: Server, dag_id: str, conf: dict[str, Any]) -> None:
    with server.client("reader") as client:
        assert client.get(f"/api/v2/dags/{dag_id}").status_code == 200
        body = {"logical_date": None, "conf": conf}
        assert client.post(f"/api/v2/dags/{dag_id}/dagRuns", json=body).status_code == 403
        assert client.post(f"/api/v2/dags/{dag_id}/clearTaskInstances", json={"dry_run": False}).status_code == 403


def test_there_is_no_page_but_these(server: Server) -> None:
    for path in ("/ridgeline/docs", "/ridgeline/openapi.json", "/ridgeline/models/1", "/ridgeline/dags"):
        assert server.get(path).status_code == 404


def test_every_answer_has_a_strict_policy(server: Server) -> None:
    for path in [*paths(server), "/ridgeline/none"]:
        headers = server.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "frame-ancestors 'self'" in policy
        assert "script" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    assert server.get("/ridgeline/models").headers["cache-control"] == "no-store"


# --- what they read


def outcomes(page: str) -> dict[str, str]:
    return dict(re.findall(r'<tr><th scope="row">(\w+)</th>\s*<td><span class="outcome[^>]*>([^<]*)<', page))


def test_a_reused_run(server: Server) -> None:
    page = server.get(server.path("reused")).text
    assert "<h2>Nothing changed</h2>" in page
    steps = ("ingest", "transform", "statistics", "schema", "validate", "train", "evaluate", "label_errors", "export")
    reused = dict.fromkeys(steps, "reused")
    assert outcomes(page) == reused | {"sweep": "skipped", "select": "skipped"}
    assert "The run uses the penalty on the form." in page
    assert "Skipped because sweep was skipped." in page
    assert "Nothing was pushed: version 1 of synthetic_garments holds this model. It is the champion." in page
    assert "synthetic_garments:1.0.0" in page[page.index("<h2>Parameters</h2>") :]


def test_a_run_that_was_not_blessed(server: Server) -> None:
    page = server.get(server.path("not blessed")).text
    assert "Not blessed</h2>" in page
    assert "(min_accuracy)" in page
    assert outcomes(page)["export"] == "skipped"
    assert "Not served" in page


def test_a_failed_run(server: Server) -> None:
    page = server.get(server.path("failed")).text
    assert "Failed: ingest</h2>" in page
    assert "Expected parameters of the DAG&#39;s trigger form; received trian.epochs." in page
    assert outcomes(page)["export"] == "not run"


def test_the_page_of_a_run_in_progress_refreshes(server: Server) -> None:
    answer = server.get(server.path("in progress"))
    assert "Running: train." in answer.text
    assert int(answer.headers["refresh"]) > 0
    assert outcomes(answer.text) == {
        "ingest": "reused",
        "transform": "reused",
        "statistics": "reused",
        "schema": "reused",
        "validate": "reused",
        "sweep": "skipped",
        "select": "skipped",
        "train": "running",
        "evaluate": "waiting",
        "label_errors": "waiting",
        "export": "waiting",
    }


def test_a_run_of_another_dag(server: Server) -> None:
    answer = server.get(server.path("other"))
    assert answer.status_code == 200
    assert "Nothing to show" in answer.text


def test_no_such_run(server: Server) -> None:
    for path in (f"{server.path('reused')}x", server.path("reused").replace("fashion_mnist_training", "other")):
        answer = server.get(path)
        assert answer.status_code == 404
        assert "No such run" in answer.text
        assert server.get(f"{path}/reports/evaluate").status_code == 404


def test_the_model_card_of_a_version(server: Server, synthetic_store: Store, refs: dict[str, str]) -> None:
    card = synthetic_store.open(refs["export"], PushedModel).card
    assert card
    assert server.get(CARD).text == card.read_text(encoding="utf-8")
    assert '<a href="models/synthetic_garments/1/card">Model card</a>' in server.get("/ridgeline/models").text
    for name, version in (("synthetic_garments", 99), ("nobody", 1), ("..", 1), ("%2e%2e%2fartifacts", 1)):
        assert server.get(f"/ridgeline/models/{name}/{version}/card").status_code == 404
    assert server.get("/ridgeline/models/synthetic_garments/one/card").status_code == 422


def test_the_report_of_a_step(server: Server, synthetic_store: Store, refs: dict[str, str]) -> None:
    artifact = synthetic_store.open(refs["evaluate"], ModelEvaluation)
    path = f"{server.path('reused')}/reports/evaluate"
    answer = server.get(path)
    assert answer.text == artifact.report.read_text(encoding="utf-8")
    with server.client("reader") as client:
        again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.text) == (304, "")
    for task in ("train", "export", "sweep", "nothing", "%2e%2e%2fevaluate", "*"):
        assert server.get(f"{server.path('reused')}/reports/{task}").status_code == 404


def test_the_models(server: Server) -> None:
    page = server.get("/ridgeline/models").text
    assert "<h2>synthetic_garments</h2>" in page
    assert "<td>pushed version 1</td>" in page


def test_a_run_is_compared_with_a_version(server: Server) -> None:
    run_id = server.runs["not blessed"][1]
    with server.client("reader") as client:
        page = client.get("/ridgeline/compare", params={"a": "synthetic_garments/1", "b": run_id}).text
    assert "<code>evaluate.min_accuracy</code></th><td>0.75</td><td>1.0</td>" in page
    assert "The models are the same, byte for byte." in page
    assert f'<a href="dags/fashion_mnist_training/runs/{run_id.replace(":", "%3A").replace("+", "%2B")}">' in page


def test_a_user_sees_no_comparison_of_runs_that_the_user_may_not_read(server: Server) -> None:
    run_id = server.runs["not blessed"][1]
    with server.client("outsider") as client:
        found = [
            client.get("/ridgeline/compare", params={"a": a, "b": run_id}) for a in ("synthetic_garments/1", run_id)
        ]
        assert client.get("/ridgeline/models").status_code == 200
    assert [(answer.status_code, "Not allowed" in answer.text) for answer in found] == [(403, True)] * 2
    assert "evaluate.min_accuracy" not in found[0].text
    assert server.get(server.path("reused"), "outsider").status_code == 403


@pytest.mark.parametrize("b", ["", "nowhere", "synthetic_garments/9", "..%2F..%2Fsecrets", "Dataset", "*"])
def test_what_can_t_be_compared_is_said(server: Server, b: str) -> None:
    answer = server.get(f"/ridgeline/compare?a=synthetic_garments/1&b={b}")
    assert (answer.status_code, "Cannot compare" in answer.text) == (404, True)
    assert server.get("/ridgeline/compare").status_code == 404


# --- how Airflow shows them


def test_airflow_knows_the_tab_and_the_page(server: Server) -> None:
    plugins = server.get("/api/v2/plugins").json()["plugins"]
    views = [view for plugin in plugins for view in plugin["external_views"]]
    assert {(view["name"], view["destination"]) for view in views} >= {("Report", "dag_run"), ("Models", "nav")}


@pytest.mark.parametrize(("run", "task"), [("reused", "evaluate"), ("not blessed", "export"), ("reused", "export")])
def test_tasks_with_something_to_show_link_to_the_report(server: Server, run: str, task: str) -> None:
    dag_id, run_id = server.runs[run]
    links = server.get(f"/api/v2/dags/{dag_id}/dagRuns/{run_id.replace('+', '%2B')}/taskInstances/{task}/links").json()
    assert links["extra_links"]["Report"].startswith(f"/dags/{dag_id}/runs/manual__")
    assert links["extra_links"]["Report"].endswith("/plugin/ridgeline-report")


@pytest.mark.parametrize(("run", "task"), [("reused", "train"), ("reused", "sweep"), ("other", "evaluate")])
def test_other_tasks_have_no_link(server: Server, run: str, task: str) -> None:
    dag_id, run_id = server.runs[run]
    links = server.get(f"/api/v2/dags/{dag_id}/dagRuns/{run_id.replace('+', '%2B')}/taskInstances/{task}/links").json()
    assert links["extra_links"] == {"Report": None}


def test_a_mapped_task_has_the_worst_state_of_its_instances(tmp_path: Path) -> None:
    cases = {
        ("success", "failed", "success"): "failed",
        ("success", "running"): "running",
        ("success", None): "none",
        ("success", "skipped"): "success",
        ("skipped",): "skipped",
    }
    code = """
import json, sys
from types import SimpleNamespace
from ridgeline.airflow.plugin.app import _merge
for states in json.loads(sys.argv[1]):
    print(_merge("part", [SimpleNamespace(state=s, start_date=None, end_date=None) for s in states]).state)
"""
    command, env = [sys.executable, "-c", code, json.dumps(list(cases))], {**os.environ, "AIRFLOW_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-len(cases) :] == list(cases.values())


# --- who else could read


def test_no_answer_may_be_kept_by_a_cache_that_people_share(server: Server) -> None:
    report = f"{server.path('reused')}/reports/evaluate"
    for path in [*paths(server), "/ridgeline/none"]:
        rules = set(server.get(path).headers["cache-control"].split(", "))
        assert rules == ({"private", "no-cache"} if path == report else {"no-store"}), path
    with server.client("reader") as client:
        tag = client.get(report).headers["etag"]
        again = client.get(report, headers={"If-None-Match": tag})
    assert set(again.headers["cache-control"].split(", ")) == {"private", "no-cache"}
    with server.client("stranger") as client:  # who knows the tag, but may not read, learns nothing from it
        assert client.get(report, headers={"If-None-Match": tag}).status_code == 403


def test_the_server_listens_on_this_machine_s_first_address_alone(server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):  # all of 127.0.0.0/8 reaches a server on all interfaces
        socket.create_connection(("127.0.0.2", port), timeout=5)
