"""The stack, started for real with podman on images made from Debian's packages: takes root, time and disk.

The tests build on one another, in this order, from the first start to a lost worker.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.timeout(3600)
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROJECT = "ridgeline-test"
PORT = 8193
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1000}
NOTIFY = "json://user:hidden-from-all@127.0.0.1:9/x"  # nobody listens
CAPABILITIES = ("CapEff", "CapPrm", "CapBnd")
SERVERS = ["database", "api-server", "scheduler", "dag-processor", "triggerer"]


class Stack:
    """The stack under test: `docker/stack`, podman, and Airflow's REST API."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{PORT}"
        left_out = ("RIDGELINE_", "AIRFLOW_", "AWS_")
        outer = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        self.env = outer | {
            "COMPOSE_PROJECT_NAME": PROJECT,
            "PYTHON_IMAGE": "localhost/python:3.11-bookworm",
            "DEBIAN_IMAGE": "localhost/debian:bookworm",
            "POSTGRES_IMAGE": "localhost/postgres:15-bookworm",
            "REDIS_IMAGE": "localhost/redis:7-bookworm",
            "RIDGELINE_IMAGE": f"localhost/{PROJECT}:latest",
            "OBJECT_STORE_IMAGE": f"localhost/{PROJECT}-object-store:latest",
            "RIDGELINE_PORT": str(PORT),
            "RIDGELINE_URL": self.url,
            "RIDGELINE_NOTIFY": NOTIFY,
            "RIDGELINE_HEARTBEAT_TIMEOUT_SECONDS": "60",
        }
        self.env.setdefault("CONTAINERS_CONF", str(HERE / "containers.conf"))
        self._token = ""

    def command(self, *arguments: str, expected: int | None = 0) -> str:
        """Run a command; return what it printed, errors included."""
        print("$", *arguments, flush=True)
        done = subprocess.run(
            arguments, cwd=ROOT, env=self.env, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=1500,
        )  # fmt: skip
        assert expected is None or done.returncode == expected, (
            f"{arguments} ended with {done.returncode}:\n{done.stdout[-5000:]}"
        )
        return done.stdout

    def stack(self, action: str, expected: int = 0, **variables: str) -> str:
        """Run `docker/stack ACTION`, as make does."""
        settings = [f"{name}={value}" for name, value in variables.items()]
        started = time.monotonic()
        output = self.command("env", *settings, "docker/stack", action, expected=expected)
        print(f"{action}: {time.monotonic() - started:.0f} s", flush=True)
        self._token = ""
        return output

    def compose(self, *arguments: str) -> str:
        """Run podman-compose on the stack's file."""
        return self.command("podman-compose", "--file", "docker/compose.yaml", *arguments)

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's running containers."""
        labels = [f"label=io.podman.compose.project={PROJECT}", f"label=com.docker.compose.service={service}"]
        return self.command("podman", "ps", "-q", *(f"--filter={label}" for label in labels)).split()

    def execute(self, service: str, *arguments: str, expected: int | None = 0) -> str:
        """Run a command in a service's first container."""
        return self.command("podman", "exec", self.containers(service)[0], *arguments, expected=expected)

    def in_worker(self, number: int, *arguments: str, expected: int | None = 0, **variables: str) -> str:
        """Run a command in a worker, with environment variables."""
        settings = [f"--env={name}={value}" for name, value in variables.items()]
        return self.command(
            "podman", "exec", *settings, self.containers("worker")[number], *arguments, expected=expected
        )

    def in_store(self, expression: str) -> Any:
        """Return the value of an expression about the store in the object store, as JSON."""
        code = (
            "import json; from ridgeline import object_store; from ridgeline.settings import Settings; "
            f"store = Settings().open_store(); print(); print(json.dumps({expression}))"
        )
        return json.loads(self.execute("scheduler", "python", "-c", code).strip().splitlines()[-1])

    def model(self, run_id: str) -> str:
        """Return the model of a run whose store is in the object store."""
        return self.in_store(f"[e.output for e in store.executions('train') if e.run_id.endswith({run_id!r})][0]")

    def in_volume(self, volume: str, *arguments: str) -> str:
        """Run a command as root with a volume as /v."""
        image = self.env["POSTGRES_IMAGE"]
        return self.command(
            "podman", "run", "--rm", "-v", f"{PROJECT}_{volume}:/v", "--entrypoint", arguments[0], image, *arguments[1:]
        )

    def api(self, path: str, body: Any = None) -> Any:
        """Call Airflow's REST API as the user admin."""
        self._log_in()
        return json.loads(self._call(f"/api/v2{path}", body))

    def page(self, path: str) -> str:
        """Return a page of the plugin, as the user admin sees it."""
        self._log_in()
        return self._call(f"/ridgeline{path}", None)

    def _log_in(self) -> None:
        if not self._token:
            passwords = json.loads(self.execute("api-server", "cat", "/secrets/passwords.json"))
            answer = self._call("/auth/token", {"username": "admin", "password": passwords["admin"]})
            self._token = json.loads(answer)["access_token"]

    def _call(self, path: str, body: Any) -> str:
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self._token}"} if self._token else {}
        )
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as answer:
            return answer.read().decode()

    def trigger(self, **conf: Any) -> str:
        """Start a run of the training DAG on the synthetic images; return its id."""
        wait_for("the DAG", lambda: self.api("/dags/fashion_mnist_training"), 180)
        body = {"logical_date": None, "conf": {**SYNTHETIC, **conf}}
        return self.api("/dags/fashion_mnist_training/dagRuns", body)["dag_run_id"]

    def state(self, run_id: str) -> str:
        return self.api(f"/dags/fashion_mnist_training/dagRuns/{run_id}")["state"]

    def runs(self) -> dict[str, str]:
        """Return the state of each run."""
        found = self.api("/dags/fashion_mnist_training/dagRuns")["dag_runs"]
        return {run["dag_run_id"]: run["state"] for run in found}

    def tasks(self, run_id: str) -> dict[str, dict[str, Any]]:
        """Return a run's task instances by task."""
        found = self.api(f"/dags/fashion_mnist_training/dagRuns/{run_id}/taskInstances")["task_instances"]
        return {task["task_id"]: task for task in found}

    def log(self, run_id: str, task: str, attempt: int) -> str:
        path = f"/dags/fashion_mnist_training/dagRuns/{run_id}/taskInstances/{task}/logs/{attempt}"
        return json.dumps(self.api(path))

    def wait_for_success(self, run_id: str, seconds: float = 900) -> None:
        """Wait until a run has ended, and fail unless it ended well."""
        wait_for("the run's end", lambda: self.state(run_id) in ("success", "failed"), seconds)
        states = {name: (task["state"], task["try_number"]) for name, task in self.tasks(run_id).items()}
        assert self.state(run_id) == "success", states
        print(states, flush=True)

    def wait_for_training(self, run_id: str) -> dict[str, Any]:
        """Wait until a run's training has left a checkpoint; return the task instance."""
        find = ("find", "/var/lib/ridgeline/store/scratch", "-type", "f", "-name", "*checkpoint*")
        wait_for("a checkpoint", lambda: self.execute("scheduler", *find, expected=None).strip().startswith("/"), 400)
        return self.tasks(run_id)["train"]

    def record(self) -> list[tuple[str, str]]:
        """Print what each container takes of the memory."""
        stats = self.command("podman", "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}} {{.CPUPerc}}")
        print(stats, flush=True)
        return [tuple(line.split(" ", 1)) for line in stats.splitlines()]  # type: ignore[misc]


def wait_for(what: str, condition: Callable[[], Any], seconds: float) -> Any:
    """Ask every few seconds until a condition holds; a server that does not answer does not hold it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
            problem = "not yet"
        except (OSError, AssertionError, IndexError) as error:
            problem = str(error)
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {problem}"
        time.sleep(3)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The images, made if they are not there, and no containers or volumes of an earlier run."""
    stack = Stack(tmp_path_factory.mktemp("stack"))
    stack.command("tests/containers/base_images.sh")
    if not os.environ.get("KEEP"):
        stack.stack("down", ARGS="--volumes")
    yield stack
    if not os.environ.get("KEEP"):
        stack.stack("down", ARGS="--volumes")


def files(stack: Stack) -> set[str]:
    """Return what the volume holds: each artifact's manifest, and the champions' pointers."""
    text = stack.in_volume("artifacts", "find", "/v", "-name", "champion.json", "-o", "-name", "manifest.json")
    return {line.removeprefix("/v/") for line in text.splitlines() if line.startswith("/v/")}


def health(stack: Stack, services: list[str]) -> None:
    for service in services:
        for container in stack.containers(service):
            check = functools.partial(stack.command, "podman", "healthcheck", "run", container)
            wait_for(f"{service}'s health check", lambda check=check: check() is not None, 120)  # type: ignore[misc]


def check_capabilities(stack: Stack, service: str) -> None:
    """Check that a service's processes have no capabilities and can get only those of the compose file."""
    names = ("CHOWN", "DAC_OVERRIDE", "", "FOWNER", "", "", "SETGID", "SETUID")  # by their numbers
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    allowed = sum(1 << names.index(name) for name in compose[service].get("cap_add", []))
    for container in stack.containers(service):
        status = stack.command(
            "podman", "exec", "--user=50000", container, "sh", "-c", "cat /proc/[0-9]*/status || true"
        )
        found = {
            kind: [int(value, 16) for value in re.findall(rf"^{kind}:\s*(\w+)", status, re.M)] for kind in CAPABILITIES
        }
        assert found["CapEff"]
        assert not any(found["CapEff"] + found["CapPrm"]), service
        assert set(found["CapBnd"]) == {allowed}, service


def test_a_port_in_use_is_refused_before_anything_starts(stack: Stack) -> None:
    with socket.create_server(("127.0.0.1", PORT)):
        output = stack.stack("up", expected=1)
    assert f"Cannot listen on port {PORT} of 127.0.0.1: it is in use." in output
    assert stack.containers("database") == []


def test_the_first_start_makes_a_healthy_stack(stack: Stack) -> None:
    output = stack.stack("up")
    assert f"Ridgeline: http://127.0.0.1:{PORT}" in output
    health(stack, SERVERS)
    stack.record()


def test_no_secret_is_in_an_image_a_command_or_an_environment(stack: Stack) -> None:
    secrets = json.loads(stack.execute("api-server", "cat", "/secrets/passwords.json"))["admin"]
    password = stack.execute("database", "cat", "/service-secrets/database_password").strip()
    shown = stack.command("podman", "inspect", *(c for service in SERVERS for c in stack.containers(service)))
    shown += "".join(stack.command("podman", "logs", c) for service in SERVERS for c in stack.containers(service))
    assert len(password) > 30
    assert password not in shown
    assert secrets not in shown
    assert NOTIFY not in shown
    assert stack.execute("triggerer", "cat", "/secrets/notify") == NOTIFY


def test_containers_run_unprivileged_on_a_read_only_root(stack: Stack) -> None:
    assert stack.execute("scheduler", "id", "-u").strip() == "50000"
    for service in SERVERS:
        check_capabilities(stack, service)
    for path in ("/app", "/secrets"):
        assert "Read-only file system" in stack.execute("scheduler", "touch", f"{path}/x", expected=1)
    stack.execute("scheduler", "sh", "-c", "touch /var/lib/ridgeline/x && rm /var/lib/ridgeline/x")
    for service in ("api-server", "dag-processor", "triggerer"):
        assert "Read-only file system" in stack.execute(service, "touch", "/var/lib/ridgeline/x", expected=1)
    assert stack.execute("scheduler", "sh", "-c", "ls /usr/bin/gcc /uv /root/.cache 2>/dev/null || true") == ""


def test_the_image_lists_its_packages(stack: Stack) -> None:
    listed = json.loads(stack.execute("scheduler", "cat", "/app/sbom.json"))
    assert listed["bomFormat"] == "CycloneDX"
    assert {"apache-airflow", "tensorflow"} < {component["name"] for component in listed["components"]}


def test_a_run_trains_and_serves_under_the_local_executor(stack: Stack) -> None:
    run_id = stack.trigger()
    stack.wait_for_success(run_id)
    stack.record()
    found = files(stack)
    for kind in ("Dataset", "Examples", "Model", "ModelEvaluation", "PushedModel"):
        assert any(f"artifacts/{kind}/" in name for name in found), kind
    assert any(name.endswith("serving/synthetic_garments/champion.json") for name in found)
    assert stack.in_volume("artifacts", "sh", "-c", "ls /v/store/artifacts/ModelEvaluation/*/report.html").strip()
    assert stack.in_volume("artifacts", "sh", "-c", "ls /v/serving/synthetic_garments/1/saved_model.pb").strip()
    config = stack.in_volume("artifacts", "cat", "/v/serving/models.config")
    assert 'name: "synthetic_garments"' in config
    assert "versions: 1 " in config
    assert "parameters of train: " in stack.log(run_id, "train", 1)
    assert list(stack.runs()) == [run_id]  # the weekly schedule waits for its next tick


def test_the_plugin_shows_the_run_and_its_model(stack: Stack) -> None:
    run_id = next(iter(stack.runs()))
    report = f"/dags/fashion_mnist_training/runs/{urllib.parse.quote(run_id)}"
    assert run_id in stack.page(report)
    assert stack.page(f"{report}/reports/evaluate").startswith("<!doctype html>")
    assert run_id in stack.page("/models")


def test_a_run_survives_a_restart_of_the_database(stack: Stack) -> None:
    run_id = stack.trigger(**{"train.epochs": 400, "train.seed": 1})
    stack.wait_for_training(run_id)
    stack.record()
    stack.command("podman", "restart", stack.containers("database")[0])
    states = wait_for("the database", lambda: stack.tasks(run_id), 120)
    assert states["train"]["state"] == "running"
    stack.wait_for_success(run_id)
    assert set(stack.runs().values()) == {"success"}


def test_what_was_backed_up_is_restored_on_an_empty_machine(stack: Stack) -> None:
    before, runs = files(stack), stack.runs()
    folder = str(stack.folder / "backup")
    assert "It contains passwords" in stack.stack("backup", BACKUP=folder)
    assert "Expected empty volumes" in stack.stack("restore", expected=1, BACKUP=folder)
    assert {path.stat().st_mode & 0o777 for path in Path(folder).iterdir()} == {0o600}
    stack.stack("down", ARGS="--volumes")
    assert PROJECT not in stack.command("podman", "volume", "ls", "-q")
    stack.stack("restore", BACKUP=folder)
    assert files(stack) == before
    stack.stack("up", PROFILES="celery")
    assert stack.runs() == runs


# --- workers that share nothing but an object store

COPY = "[name for name in object_store.sizes(store.root / 'scratch') if name.endswith('/checkpoint')]"
TRAIN = ("ridgeline", "run", "train", *(f"--set={name}={value}" for name, value in SYNTHETIC.items()))


def test_workers_share_no_folder_that_they_write_to(stack: Stack) -> None:
    stack.stack("up", PROFILES="celery")
    workers = stack.containers("worker")
    assert len(workers) == 2
    health(stack, [*SERVERS, "broker", "object-store", "worker"])
    for service in ("broker", "object-store", "worker"):
        check_capabilities(stack, service)
    mounts = [json.loads(stack.command("podman", "inspect", worker))[0]["Mounts"] for worker in workers]
    written = [{mount["Source"] for mount in of_worker if mount["RW"]} for of_worker in mounts]
    assert all(len(sources) == 2 for sources in written)
    assert not written[0] & written[1]
    key = stack.execute("database", "cat", "/service-secrets/object_store").split()[1]
    shown = stack.command(
        "podman", "inspect", *(c for s in (*SERVERS, "worker", "object-store") for c in stack.containers(s))
    )
    shown += "".join(
        stack.command("podman", "logs", c) for s in ("worker", "object-store") for c in stack.containers(s)
    )
    assert len(key) == 40
    assert key not in shown


def test_a_run_succeeds_on_workers_that_share_nothing(stack: Stack) -> None:
    started = time.monotonic()
    run_id = stack.trigger()
    stack.wait_for_success(run_id)
    print(f"run: {time.monotonic() - started:.0f} s", flush=True)
    stack.record()
    tasks = stack.tasks(run_id)
    assert {task["queue"] for task in tasks.values()} == {"tensorflow"}
    print({name: task["hostname"] for name, task in tasks.items()}, flush=True)
    assert "parameters of train: " in stack.log(run_id, "train", 1)
    report = f"/dags/fashion_mnist_training/runs/{urllib.parse.quote(run_id)}"
    assert stack.page(f"{report}/reports/evaluate").startswith("<!doctype html>")
    assert run_id in stack.page("/models")
    stack.in_worker(0, "ridgeline", "models", "sync", "/tmp/serving")
    assert "versions: 1 " in stack.in_worker(0, "cat", "/tmp/serving/models.config")


def test_a_worker_killed_in_the_middle_of_training_costs_nothing(stack: Stack) -> None:
    changed = {"train.epochs": 800, "train.seed": 2}
    run_id = stack.trigger(**changed)
    wait_for("a copy of the checkpoint", lambda: stack.in_store(COPY), 400)
    train = stack.tasks(run_id)["train"]
    stack.record()
    assert train["hostname"] in [worker[:12] for worker in stack.containers("worker")]
    stack.command("podman", "kill", train["hostname"])
    killed = time.monotonic()
    stack.wait_for_success(run_id)
    print(f"success {time.monotonic() - killed:.0f} s after the kill", flush=True)
    tasks = stack.tasks(run_id)
    assert tasks["train"]["try_number"] == 2
    assert tasks["train"]["hostname"] != train["hostname"]
    log = stack.log(run_id, "train", 2)
    print(re.findall(r"resuming from epoch \d+", log), flush=True)
    assert "fetched the unfinished work" in log
    assert "resuming from epoch" in log
    assert stack.in_store("[*object_store.ages(store.root / 'scratch'), *object_store.ages(store.root / 'keys')]") == []
    resumed = stack.model(run_id)

    stack.stack("up", PROFILES="celery")  # the killed worker is started again
    undisturbed = stack.trigger(**changed, rerun=["train"])
    stack.wait_for_success(undisturbed)
    assert "resuming" not in stack.log(undisturbed, "train", 1)
    assert stack.model(undisturbed) == resumed
    assert set(stack.runs().values()) == {"success"}


def test_of_two_workers_with_one_key_one_trains_and_the_other_reuses(stack: Stack) -> None:
    train = (*TRAIN, "--set=train.epochs=300", "--set=train.seed=3")
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(lambda number: stack.in_worker(number, *train), range(2)))
    print(*logs, sep="\n---\n", flush=True)
    assert sum("waits: " in log for log in logs) == 1
    states = stack.in_store("[e.state for e in list(store.executions('train'))[:2]]")
    assert sorted(states) == ["cached", "complete"]


@pytest.mark.parametrize("seed", [11, 12])
def test_faults_of_the_network_cost_time_only(stack: Stack, seed: int) -> None:
    train = (*TRAIN, "--set=train.epochs=3", f"--set=train.seed={seed}")
    with proxied(stack, seed, rate=0.05) as endpoint:
        log = stack.in_worker(0, *train, AWS_ENDPOINT_URL=endpoint)
    assert stack.in_store("next(store.executions('train')).state") == "complete", log
    stack.in_worker(1, *train, "--rerun=train")
    outputs = stack.in_store("[e.output for e in list(store.executions('train'))[:2]]")
    assert outputs[0] == outputs[1]


@contextmanager
def proxied(stack: Stack, seed: int, rate: float) -> Iterator[str]:
    """Start a proxy that injects faults in the first worker, and yield its address there; it prints its counts."""
    worker, program = stack.containers("worker")[0], (ROOT / "tests" / "faulty_proxy.py").read_text()
    place = ["sh", "-c", "cat >/tmp/faulty_proxy.py"]
    subprocess.run(["podman", "exec", "-i", worker, *place], env=stack.env, input=program, text=True, check=True)
    command = ["podman", "exec", "-i", worker, "python", "/tmp/faulty_proxy.py", "http://object-store:7480", "9100"]
    command += [str(seed), str(rate)]
    with subprocess.Popen(command, env=stack.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout
        assert proxy.stdout.readline() == "ready\n"
        yield "http://127.0.0.1:9100"
        print(proxy.communicate("")[0], flush=True)


def test_an_object_store_that_workers_cannot_share_is_refused(stack: Stack) -> None:
    check = ("python", "/app/first_start.py", "store")
    wrong = {"AWS_ACCESS_KEY_ID": "wrong", "AWS_SECRET_ACCESS_KEY": "wrong"}
    for variables, expected in (
        (wrong, "Correct the credentials"),
        ({"RIDGELINE_STORE": "s3://missing/store"}, "Create the bucket, or correct its name"),
        ({"RIDGELINE_STORE": "/srv/store"}, "Expected an s3:// URL as RIDGELINE_STORE for the profile celery"),
    ):
        assert expected in stack.in_worker(0, *check, expected=1, **variables)
        assert "Traceback" not in (found := stack.in_worker(0, *TRAIN, expected=1, **variables)), found
    settings = {"RIDGELINE_STORE": "s3://ridgeline/store", "AWS_ENDPOINT_URL": "http://object-store:7480"}
    refused = stack.stack("up", expected=1, PROFILES="celery", **settings, **wrong)
    assert "Cannot use the store s3://ridgeline/store: " in refused
    stack.stack("up", PROFILES="celery")


def test_who_may_not_delete_is_refused_before_work(stack: Stack) -> None:
    admin = ("radosgw-admin", "-c", "/data/ceph.conf", "user", "create", "--uid=limited", "--display-name=limited")
    stack.execute("object-store", *admin, "--access-key=limited", "--secret-key=limited")
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"AWS": ["arn:aws:iam:::user/limited"]},
                "Action": ["s3:ListBucket", "s3:GetObject", "s3:PutObject"],
                "Resource": ["arn:aws:s3:::limited", "arn:aws:s3:::limited/*"],
            }
        ],
    }
    call = "str(store.root.fs.call_s3"
    stack.in_store(f"{call}('create_bucket', Bucket='limited'))")
    stack.in_store(f"{call}('put_bucket_policy', Bucket='limited', Policy={json.dumps(policy)!r}))")
    limited = {
        "RIDGELINE_STORE": "s3://limited/store",
        "AWS_ACCESS_KEY_ID": "limited",
        "AWS_SECRET_ACCESS_KEY": "limited",
    }
    refused = stack.in_worker(0, "python", "/app/first_start.py", "store", expected=1, **limited)
    assert "grant them the rights to list, read, write and delete, then run `make up`" in refused
    refused = stack.in_worker(0, *TRAIN, "--set=train.seed=4", expected=1, **limited)
    assert "error: Cannot write to s3://limited/store: AccessDenied. Correct the credentials, or grant" in refused


def test_the_object_store_is_backed_up_and_restored(stack: Stack) -> None:
    before, folder = stack.in_store("store.refs()"), str(stack.folder / "shared")
    stack.stack("backup", BACKUP=folder)
    stack.stack("down", ARGS="--volumes")
    assert PROJECT not in stack.command("podman", "volume", "ls", "-q")
    stack.stack("restore", BACKUP=folder)
    stack.stack("up", PROFILES="celery")
    assert stack.in_store("store.refs()") == before
    run_id = stack.trigger()
    stack.wait_for_success(run_id)
    assert stack.in_store(
        f"{{e.state for e in store.executions('train') if e.run_id.endswith({run_id!r})}} == {{'cached'}}"
    )


# --- bad input: a message, and nothing that starts again for ever


def test_a_newer_database_is_refused(stack: Stack) -> None:
    query = ("psql", "-U", "airflow", "-At", "-c")
    head = stack.execute("database", *query, "select version_num from alembic_version").strip()
    stack.execute("database", *query, "update alembic_version set version_num = 'ffffffffffff'")
    stack.stack("down")
    assert "of a newer Airflow. Start" in stack.stack("up", expected=1)
    assert stack.containers("api-server") == stack.containers("scheduler") == []
    stack.execute("database", *query, f"update alembic_version set version_num = '{head}'")


def test_an_older_database_is_refused_until_its_migration_is_asked_for(stack: Stack) -> None:
    downgrade = ("airflow", "db", "downgrade", "--to-version", "3.2.0", "--yes")
    stack.compose("run", "--rm", "--no-deps", "database-tables", *downgrade)
    output = stack.stack("up", expected=1)
    assert "received one of 3.2.0" in output
    assert "make up MIGRATE=1" in output
    stack.stack("up", MIGRATE="1")
    assert set(stack.runs().values()) == {"success"}


@pytest.mark.parametrize(
    ("volume", "damage", "repair", "expected"),
    [
        ("logs", "chown 0 /v && chmod 0755 /v", "chown 50000 /v", "Cannot write to the volume 'logs'"),
        (
            "secrets",
            "cp -a /v/database_url /v/kept && sed s/airflow:/airflow:x/ /v/kept >/v/database_url",
            "mv -f /v/kept /v/database_url",
            "password authentication failed. The volumes 'database', 'secrets' and 'service-secrets' belong together",
        ),
        (
            "database",
            "echo 13 >/v/PG_VERSION",
            "echo 15 >/v/PG_VERSION",
            "Expected database files of PostgreSQL 15, the version of this image; received those of 13",
        ),
    ],
)
def test_a_damaged_volume_is_refused_with_advice(
    stack: Stack, volume: str, damage: str, repair: str, expected: str
) -> None:
    stack.stack("down")
    stack.in_volume(volume, "sh", "-c", damage)
    assert expected in stack.stack("up", expected=1)
    assert stack.containers("api-server") == []
    stack.in_volume(volume, "sh", "-c", repair)
