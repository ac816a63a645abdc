"""The commands behind ``make run`` and ``make ui``: an Airflow with all its files in this folder."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import re
import signal
import socket
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

from ridgeline.access import message
from ridgeline.airflow import RERUN
from ridgeline.airflow.local_data import choose_data, find_official_files
from ridgeline.airflow.reasons import find_reasons
from ridgeline.airflow.server import Standalone, environment, make_private, private_opener
from ridgeline.airflow.settings import AirflowSettings
from ridgeline.approval import Terminal, expect_askable
from ridgeline.component import ParameterError
from ridgeline.masking import mask
from ridgeline.models_cli import user
from ridgeline.pipeline import load_components, parse_assignments, run_records
from ridgeline.run_summary import summary
from ridgeline.settings import SettingsError

DAGS_READ_SECONDS = 60  # after this time, a healthy Airflow has read all DAG files
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run the pipeline on an Airflow with all its files in this folder, under var/.",
)


def _checkout() -> Path:
    folder = Path.cwd()
    if not (folder / "dags").is_dir():
        raise SystemExit(
            f"error: Expected Ridgeline's folder as the working directory; received {folder}, which has no dags/. "
            "Change to the folder that holds dags/."
        )
    return folder


@contextmanager
def _one_message() -> Iterator[None]:
    """Show an error that a user can act on as one message."""
    try:
        yield
    except SettingsError as error:
        raise SystemExit(f"error: {error}") from None
    except PermissionError as error:
        raise SystemExit(f"error: {message(error)}") from None


@app.command()
@_one_message()
def run(
    dag_id: Annotated[str, typer.Argument(metavar="DAG", help="The DAG's id.")],
    values: Annotated[
        list[str], typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the DAG's form.")
    ] = [],  # noqa: B006 - typer's way to declare a repeated option
    rerun: Annotated[list[str], typer.Option(metavar="STEP", help="A step to run even if nothing changed.")] = [],  # noqa: B006
) -> None:
    """Run a DAG once, to the end, without a scheduler."""
    folder = _checkout()
    AirflowSettings()  # a bad variable is refused before anything is written
    os.environ |= (env := environment(folder, "airflow-run", os.environ))
    if (file := folder / "dags" / Path(f"{dag_id}.py").name).is_file():  # Airflow need not read the others
        os.environ["AIRFLOW__CORE__DAGS_FOLDER"] = str(file)
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    home = Path(env["AIRFLOW_HOME"])
    make_private(home)
    try:
        with FileLock(home / ".lock", blocking=False):
            conf = choose_data(dag_id, folder, parse_assignments(values))
            conf |= {RERUN: rerun} if rerun else {}
            raise typer.Exit(_run_dag(dag_id, conf, home / "run.log"))
    except Timeout:
        raise SystemExit(f"error: Cannot start a run: another one is in progress in {home}. Wait for it.") from None
    except (ParameterError, FileNotFoundError) as error:
        raise SystemExit(f"error: {mask(error)}") from None


def _run_dag(dag_id: str, conf: Mapping[str, Any], log_file: Path) -> int:
    print(f"Airflow starts in about 5 s; its log: {log_file}\n")
    start_quickly()
    with _output_to(log_file) as terminal:
        try:
            from airflow.dag_processing.dagbag import DagBag
            from airflow.sdk.listener import get_listener_manager
            from airflow.utils.db import initdb
            from airflow.utils.session import create_session

            from ridgeline.airflow.approval import ask_at

            initdb()
            ask_at(ask := Terminal(user(), terminal))
            bag = DagBag()
            if dag_id not in bag.dags:
                unread = f" Files with errors: {bag.import_errors}." if bag.import_errors else ""
                raise FileNotFoundError(
                    f"Expected one of the DAGs {', '.join(sorted(bag.dags))}; received {dag_id}.{unread} "
                    f"Check the name and the files in {bag.dag_folder}."
                )
            for name in ("ridgeline", "components"):
                _show(logging.getLogger(name), terminal)
            get_listener_manager().add_listener(_failure_listener(terminal))  # type: ignore[no-untyped-call]
            dag = bag.dags[dag_id]
            _expect_askable(dag.params, conf, ask)
            dag.deadline = None  # dag.test fails where a DAG with a deadline succeeds
            dag_run = dag.test(run_conf=dict(conf))
            states = {task.task_id: str(task.state) for task in dag_run.get_task_instances()}
            records = run_records(AirflowSettings(), dag_run.run_id)
            names = [task.task_id for task in dag.topological_sort()]  # type: ignore[no-untyped-call]
            done = {name: record for name, record in records.items() if states.get(name) in ("success", "skipped")}
            with create_session() as session:
                reasons = find_reasons(session, dag_id, dag_run.run_id)
            outcomes = {name: done.get(name) or (states[name], reasons.get(name, "")) for name in names}
            lines = summary(AirflowSettings(), outcomes)
            print("", *lines, sep="\n", file=terminal)
            failed = dag_run.state != "success"
        except KeyboardInterrupt:
            print("\nInterrupted. The next run resumes after the last finished step.", file=terminal)
            return 130
        except Exception as error:
            print(mask(traceback.format_exc()), file=sys.stderr)
            print(f"failed: {message(error)}", file=terminal)
            failed = True
        if failed:
            print(f"\nThe run failed. Airflow's log: {log_file}", file=terminal)
        return int(failed)


def _expect_askable(declared: Mapping[str, Any], conf: Mapping[str, Any], ask: Terminal) -> None:
    """Refuse a run that may have to ask for approval, without a terminal, before its first step."""
    from ridgeline.airflow.form import parse_form

    values = {name: declared.get_param(name).value for name in declared} | dict(conf)  # type: ignore[attr-defined]
    try:
        params = parse_form(declared, values, AirflowSettings(), conf)
    except ParameterError:  # the first step says so
        return
    expect_askable([step for name, step in load_components().items() if name in params], params, ask)


def start_quickly() -> None:
    """Avoid needless work in this process, which halves the time of a run that reuses every step.

    Airflow creates a million objects that live until the end. Python's garbage collector would scan them repeatedly,
    and again at exit. Airflow checks the schemas of all parameters of the DAG before each task, although they do not
    change. If a package for IRIs is installed, jsonschema compiles its grammars; no parameter is an IRI.
    """
    gc.set_threshold(100_000, 50, 100)
    atexit.register(gc.freeze)
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # its import raises ImportError
    from jsonschema import Draft202012Validator

    check, checked = Draft202012Validator.check_schema, set[str]()

    def check_once(schema: Any, **options: Any) -> None:
        if (text := json.dumps(schema, sort_keys=True)) not in checked:
            check(schema, **options)
            checked.add(text)

    Draft202012Validator.check_schema = check_once


@contextmanager
def _output_to(log_file: Path) -> Iterator[TextIO]:
    """Redirect the output of this process and its native libraries to a file; yield the terminal."""
    sys.stdout.flush()
    with (
        os.fdopen(os.dup(1), "w", buffering=1) as terminal,
        open(log_file, "w", opener=private_opener) as log,
    ):
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
    """Formats a line with the seconds since the start, and shortens digests to 12 digits."""

    def format(self, record: logging.LogRecord) -> str:
        message = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", record.getMessage())
        return f"{record.relativeCreated / 1000:6.1f} s  {message}"


def _failure_listener(terminal: TextIO) -> SimpleNamespace:
    """Return a listener that prints why a task failed. Ctrl-C, which Airflow reports as a failure, ends the run."""
    from airflow.listeners import hookimpl

    @hookimpl
    def on_task_instance_failed(task_instance: Any, error: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise error
        print(f"{task_instance.task_id} failed: {mask(error)}", file=terminal)

    return SimpleNamespace(on_task_instance_failed=on_task_instance_failed)


@app.command()
@_one_message()
def ui(port: Annotated[int, typer.Option(help="The web server's port.")] = 8080) -> None:
    """Start Airflow with its web interface; Ctrl-C stops it."""
    folder = _checkout()
    env = environment(folder, "airflow-ui", os.environ, port)
    if found := find_official_files(folder):
        env.setdefault("RIDGELINE_MANUAL_DIR", str(found))
    AirflowSettings()  # a bad variable is refused before anything is written
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            message = f"error: Expected a free port; received {port}: {error.strerror}. Choose another: --port 8081."
            raise SystemExit(message) from None
    home = Path(env["AIRFLOW_HOME"])
    make_private(home)
    try:
        with FileLock(home / ".lock", blocking=False):
            _serve(Standalone(env, home / "standalone.log"))
    except Timeout:
        raise SystemExit(f"error: Cannot start Airflow: another one is running in {home}. Stop it first.") from None


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
        ready_at, shown = None, set[str]()
        while airflow.process.poll() is None and not stopping.wait(1):
            if ready_at is None and airflow.is_healthy():
                ready_at = time.monotonic()
                print("ready:    Ctrl-C stops it", flush=True)
            if ready_at and time.monotonic() - ready_at < DAGS_READ_SECONDS:
                for file, problem in _import_errors(airflow):
                    if file not in shown:
                        shown.add(file)
                        print(f"error: Cannot read {file}: {problem}", file=sys.stderr, flush=True)
    if not stopping.is_set():
        print(f"error: Airflow stopped unexpectedly. Its log: {airflow.log_file}", file=sys.stderr)
    raise typer.Exit(airflow.process.returncode)


def _import_errors(airflow: Standalone) -> Iterator[tuple[str, str]]:
    """Yield each DAG file that Airflow cannot read, and the last line of the error."""
    try:
        found = airflow.call("GET", "/api/v2/importErrors")[1]["import_errors"]
    except (OSError, ValueError, KeyError):  # Airflow is stopping
        return
    for error in found:
        yield error["filename"], error["stack_trace"].strip().splitlines()[-1]


if __name__ == "__main__":
    app()
