"""An Airflow in this folder, and nothing global: ``python -m ridgeline.embedded_airflow run`` or ``ui``."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TextIO

import typer
from filelock import FileLock, Timeout

from ridgeline.component import ParameterError
from ridgeline.pipeline import explain, load_components, parse_assignments, parse_params, run_records, summary
from ridgeline.settings import Settings
from ridgeline.standalone import Standalone

DAG_ID = "fashion_mnist_training"
DAGS_READ_SECONDS = 60  # after it is healthy, Airflow has read all DAG files
DATA_FOLDERS = ("data/fashion-mnist", "../shared/data/fashion-mnist")
OFFICIAL_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1000}
HOST_CHECK = """
import sys, urllib.request
import tensorflow_datasets as tfds
url = next(iter(tfds.builder(sys.argv[1], try_gcs=False).url_infos))
urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5)
"""
WARNING = """
********************************************************************************
*  NOT THE REAL DATA. This run trains on images that the project draws itself. *
*  Its figures say nothing about Fashion-MNIST.                                *
*                                                                              *
*  The official files are in none of these folders, and their host does not    *
*  answer. Put the four *-ubyte.gz files into data/fashion-mnist, or name      *
*  their folder in RIDGELINE_MANUAL_DIR, and run again.                        *
********************************************************************************
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run the pipeline on an Airflow that lives in this folder, under var/.",
)


def environment(folder: Path, name: str, outer: Mapping[str, str], port: int = 8080) -> dict[str, str]:
    """Return the environment of an Airflow whose files are all in one folder.

    Args:
        folder: Holds ``dags/``; receives ``var/``.
        name: The Airflow's own folder inside ``var/``.
        outer: The user's environment; its Airflow variables are left out.
        port: The port of the web server.
    """
    home = folder / "var" / name
    return {
        "RIDGELINE_STORE": str(folder / "var" / "store"),
        **{key: value for key, value in outer.items() if not key.startswith("AIRFLOW_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{outer.get('PATH', os.defpath)}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "10",
        # Another port takes all three: without the last two, tasks can't connect.
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
    }


def find_official_files(folder: Path) -> Path | None:
    """Return the first of `DATA_FOLDERS` that holds all of the official files, or None.

    Args:
        folder: What the folders are relative to.
    """
    places = (folder / place for place in DATA_FOLDERS)
    return next((p.resolve() for p in places if all((p / name).is_file() for name in OFFICIAL_FILES)), None)


def choose_data(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Decide what to run on, and say so; only here is other data ever put in the place of the real.

    What the user named, in RIDGELINE_MANUAL_DIR or as ``ingest.dataset``, is never replaced.

    Args:
        folder: Where to look for the official files; names them in RIDGELINE_MANUAL_DIR if they are found.
        values: The user's parameter values by dotted name.

    Returns:
        The values to run with.
    """
    if "RIDGELINE_MANUAL_DIR" in os.environ:
        print(f"data: files in {os.environ['RIDGELINE_MANUAL_DIR']} (RIDGELINE_MANUAL_DIR)")
    elif "ingest.dataset" in values:
        print(f"data: {values['ingest.dataset']}")
    elif found := find_official_files(folder):
        os.environ["RIDGELINE_MANUAL_DIR"] = str(found)
        print(f"data: official files in {found}")
    elif _is_prepared(values):
        print("data: prepared by an earlier run")
    elif _host_answers(load_components()["ingest"].params().dataset):  # type: ignore[attr-defined]
        print("data: to be downloaded by tfds")
    else:
        print(WARNING)
        return {**SYNTHETIC, **values}
    return dict(values)


def _is_prepared(values: Mapping[str, Any]) -> bool:
    settings, ingest = Settings(), load_components()["ingest"]
    params = parse_params([ingest], {n: v for n, v in values.items() if n.startswith("ingest.")}, settings)
    return all(sentence.startswith("reused") for _, sentence in explain(settings, [ingest], params))


def _host_answers(dataset: str) -> bool:
    print("data: no official files here; asking whether their host answers ...")
    try:
        command = [sys.executable, "-c", HOST_CHECK, dataset]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _checkout() -> Path:
    folder = Path.cwd()
    if not (folder / "dags").is_dir():
        raise SystemExit(f"error: Expected to be run in Ridgeline's folder; received {folder}, which has no dags/.")
    return folder


@app.command()
def run(
    values: Annotated[
        list[str], typer.Option("--set", metavar="NAME=VALUE", help="A parameter, such as train.epochs=3.")
    ] = [],  # noqa: B006 - typer's way to declare a repeated option
) -> None:
    """Run the pipeline once, to the end, without a scheduler."""
    folder = _checkout()
    os.environ |= (env := environment(folder, "airflow-run", os.environ))
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    home = Path(env["AIRFLOW_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / ".lock", blocking=False):
            conf = choose_data(folder, parse_assignments(values))
            raise typer.Exit(_run_dag(conf, home / "run.log"))
    except Timeout:
        raise SystemExit(f"error: Expected one run at a time in {home}; another one is going on.") from None
    except (ParameterError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


def _run_dag(conf: Mapping[str, Any], log_file: Path) -> int:
    print(f"Airflow starts in about 10 s; its log: {log_file}\n")
    with _output_to(log_file) as terminal:
        try:
            from airflow.dag_processing.dagbag import DagBag
            from airflow.sdk.listener import get_listener_manager
            from airflow.utils.db import initdb

            initdb()
            bag = DagBag()
            if DAG_ID not in bag.dags:
                raise FileNotFoundError(
                    f"Expected the DAG {DAG_ID} in {bag.dag_folder}; received {bag.import_errors or 'none'}."
                )
            for name in ("ridgeline", "components"):
                _show(logging.getLogger(name), terminal)
            get_listener_manager().add_listener(_failure_listener(terminal))
            dag = bag.dags[DAG_ID]
            dag.deadline = None  # Airflow's dag.test fails where a DAG with one succeeds
            dag_run = dag.test(run_conf=dict(conf))
            states = {task.task_id: str(task.state) for task in dag_run.get_task_instances()}
            records = run_records(Settings(), dag_run.run_id)
            names = [task.task_id for task in dag.topological_sort()]
            done = {name: record for name, record in records.items() if states.get(name) in ("success", "skipped")}
            lines = summary(Settings(), {name: done.get(name, states[name]) for name in names})
            print("", *lines, sep="\n", file=terminal)
            failed = dag_run.state != "success"
        except KeyboardInterrupt:
            print("\nInterrupted. The next run continues from the last finished step.", file=terminal)
            return 130
        except Exception as error:
            traceback.print_exc()
            print(f"failed: {error}", file=terminal)
            failed = True
        if failed:
            print(f"\nThe run failed. Airflow's log: {log_file}", file=terminal)
        return int(failed)


@contextmanager
def _output_to(log_file: Path) -> Iterator[TextIO]:
    """Send what this process and its native libraries print to a file; yield the terminal."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", buffering=1) as terminal, log_file.open("w") as log:
        saved = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _show(logger: logging.Logger, terminal: TextIO) -> None:
    handler = logging.StreamHandler(terminal)
    handler.setFormatter(_Elapsed())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class _Elapsed(logging.Formatter):
    """A line with the seconds since the start; digests are shortened to their first 12 digits."""

    def format(self, record: logging.LogRecord) -> str:
        message = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", record.getMessage())
        return f"{record.relativeCreated / 1000:6.1f} s  {message}"


def _failure_listener(terminal: TextIO) -> SimpleNamespace:
    """Return a listener that shows why a task failed; Ctrl-C, which Airflow takes for a failure, ends the run."""
    from airflow.listeners import hookimpl

    @hookimpl
    def on_task_instance_failed(task_instance: Any, error: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise error
        print(f"{task_instance.task_id} failed: {error}", file=terminal)

    return SimpleNamespace(on_task_instance_failed=on_task_instance_failed)


@app.command()
def ui(port: Annotated[int, typer.Option(help="The web server's port.")] = 8080) -> None:
    """Start Airflow with its web interface; Ctrl-C stops it."""
    folder = _checkout()
    env = environment(folder, "airflow-ui", os.environ, port)
    if found := find_official_files(folder):
        env.setdefault("RIDGELINE_MANUAL_DIR", str(found))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            message = f"error: Expected a free port; received {port}: {error.strerror}. Name another: --port 8081."
            raise SystemExit(message) from None
    home = Path(env["AIRFLOW_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / ".lock", blocking=False):
            _serve(Standalone(env, home / "standalone.log"))
    except Timeout:
        raise SystemExit(f"error: Expected one Airflow at a time in {home}; another one is running there.") from None


def _serve(airflow: Standalone) -> None:
    env = airflow.env
    print(f"data:     {env.get('RIDGELINE_MANUAL_DIR', 'to be downloaded by tfds')}")
    print(f"log:      {airflow.log_file}")
    print(f"user:     admin, password in {airflow.password_file}")
    print(f"web:      {airflow.url} in about half a minute ...", flush=True)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stopping.set())
    with airflow:
        ready_at, told = None, set[str]()
        while airflow.process.poll() is None and not stopping.wait(1):
            if ready_at is None and airflow.is_healthy():
                ready_at = time.monotonic()
                print("ready:    Ctrl-C stops it", flush=True)
            if ready_at and time.monotonic() - ready_at < DAGS_READ_SECONDS:
                for file, problem in _import_errors(airflow):
                    if file not in told:
                        told.add(file)
                        print(f"error: {file} can't be read: {problem}", file=sys.stderr, flush=True)
    if not stopping.is_set():
        print(f"error: Airflow ended by itself; its log: {airflow.log_file}", file=sys.stderr)
    raise typer.Exit(airflow.process.returncode)


def _import_errors(airflow: Standalone) -> Iterator[tuple[str, str]]:
    """Yield each DAG file that Airflow can't read, as with a bad RIDGELINE_DEFAULTS, and the error's last line."""
    try:
        found = airflow.call("GET", "/api/v2/importErrors")[1]["import_errors"]
    except (OSError, ValueError, KeyError):  # it is ending
        return
    for error in found:
        yield error["filename"], error["stack_trace"].strip().splitlines()[-1]


if __name__ == "__main__":
    app()
