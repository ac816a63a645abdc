"""What 20,000 execution records and 1,000 versions cost, against 20 and 20; in an object store, 4,000 and 200.

In the folder, the time is that of the processor, which other work on the machine changes least. In the object store, it
is the number of requests: its server lists by going through all names in Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner

from benchmarks.steps import SYNTHETIC, row
from ridgeline import pipeline
from ridgeline.artifacts.base import file_entry
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.cli import app
from ridgeline.decisions import Decision, Decisions
from ridgeline.executor import decide
from ridgeline.gc import collect_garbage
from ridgeline.history import HistoryEntry
from ridgeline.keys import KeyParts, reachable_code
from ridgeline.lineage import lineage
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store

Times = dict[str, tuple[float, int]]  # seconds and requests, by what was done
FEW = 20, 20  # records, versions
MANY = {"In a folder": (20_000, 1_000), "In an object store on this machine": (4_000, 200)}
DAYS = timedelta(days=28)
REPEATS = 15
MANIFEST = {"schema_version": 1, "facts": {}, "files": {}}
SERVER = """
import sys
from datetime import timedelta
from pathlib import Path
from moto.s3.models import s3_backends
from moto.server import main
backend = s3_backends["123456789012"]["aws"]
for folder in sorted(Path(sys.argv[1]).iterdir()):
    backend.create_bucket(folder.name, "us-east-1")
    for path in folder.rglob("*"):
        if path.is_file():
            key = backend.put_object(folder.name, str(path.relative_to(folder)), path.read_bytes())
            key.last_modified -= timedelta(days=2)  # garbage collection keeps what is young
main(["-H", "127.0.0.1", "-p", sys.argv[2]])
"""


def fill(store: Store, num_records: int) -> None:
    """Write the records of the runs of `DAYS`, whose last step is skipped."""
    steps = list(pipeline.load_components().values())
    code = {step.name: reachable_code(step.module) for step in steps}
    start = datetime.now(UTC) - DAYS
    refs: list[str] = []
    with store.lock(), patch("os.fsync", lambda descriptor: None):  # nothing of it must survive a power cut
        for i in range(num_records - num_records % len(steps)):
            run, step = i // len(steps), steps[i % len(steps)]
            refs = refs if i % len(steps) else []
            inputs = {"previous": refs[-1]} if refs else {}
            digest = hashlib.sha256(f"{i}".encode()).hexdigest()
            parts = KeyParts(
                component=step.name,
                inputs={name: ref.rpartition("/")[2] for name, ref in inputs.items()},
                params={"seed": run},
                code=code[step.name][0],
                libraries=code[step.name][1],
            )
            skipped = step is steps[-1]
            refs += [] if skipped else [f"{step.output.__name__}/{digest}"]
            store.record(
                Execution(
                    component=step.name,
                    run_id=f"run {run}",
                    state="skipped" if skipped else "complete",
                    reason="not blessed",
                    key=parts.key(),
                    parts=parts,
                    inputs=inputs,
                    output=None if skipped else refs[-1],
                    started_at=start + i * DAYS / num_records,
                    seconds=1.0,
                )
            )
            if not skipped:
                folder = store.path(refs[-1])
                folder.mkdir(parents=True)
                text = json.dumps({**MANIFEST, "type": step.output.__name__, "digest": digest})
                (folder / "manifest.json").write_text(text)


def add_versions(settings: Settings, model: PushedModel, number: int) -> None:
    """Lengthen a model's history as that many pushes do, which keep ten versions, with a decision about each."""
    name = model.facts.model_name
    folder, decisions = settings.serving_dir() / name, Decisions(settings.open_store())
    last = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])
    del last["sha256"]
    entry = HistoryEntry.model_validate(last)
    start = entry.at - timedelta(days=364)
    lines = []
    with patch("os.fsync", lambda descriptor: None):
        for version in range(1, number):
            at, digest = start + timedelta(hours=8 * version), hashlib.sha256(f"model {version}".encode()).hexdigest()
            changed = {"version": version, "at": at, "model_digest": digest, "artifact": f"PushedModel/{digest}"}
            changed["computes"] = digest
            lines.append(entry.model_copy(update=changed).line())
            title, subject = f"{name}: version {version} was pushed", f"version -{version}"
            decisions.add(Decision(kind="pushed", model=name, subject=subject, title=title, at=at))
    lines.append(entry.model_copy(update={"version": number}).line())
    for file in ("history.jsonl", "history-copy.jsonl"):
        (folder / file).write_text("".join(f"{line}\n" for line in lines))
    (folder / str(entry.version)).rename(folder / str(number))
    pointer = (folder / "champion.json").read_text().replace(f'"version": {entry.version}', f'"version": {number}')
    (folder / "champion.json").write_text(pointer)


@contextlib.contextmanager
def timed(name: str, goal: str) -> Iterator[None]:
    """Print how long the body takes."""
    start = time.monotonic()
    yield
    row(name, f"{time.monotonic() - start:.2f} s", goal)


def longest_wait(store: Store, work: Callable[[], object]) -> float:
    """Return the longest time that another user of the store's lock waits while something works, in seconds."""
    waits, done = [0.0], threading.Event()

    def wait_for_lock() -> None:
        while not done.is_set():
            start = time.monotonic()
            with Store(store.local).lock():
                waits.append(time.monotonic() - start)
            time.sleep(0.01)

    thread = threading.Thread(target=wait_for_lock)
    thread.start()
    time.sleep(0.1)
    work()
    done.set()
    thread.join()
    return max(waits)


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[None]:
    """Serve each folder in a folder as a bucket of the S3 protocol, 1,000 names a listing; s3fs finds the server."""
    import s3fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-c", SERVER, str(folder), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(3_000):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.1)
            access = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
            with patch.dict(os.environ, {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **access}):
                s3fs.S3FileSystem.clear_instance_cache()  # it would keep the address
                yield
        finally:
            server.terminate()


class Requests:
    """Counts the requests to an object store."""

    def __init__(self) -> None:
        import s3fs

        self.number = 0
        self._fs: Any = s3fs.S3FileSystem
        self._work = s3fs.S3FileSystem._call_s3, s3fs.S3FileSystem.call_s3

    def __enter__(self) -> Requests:
        from fsspec.asyn import sync_wrapper

        work, _ = self._work

        def call(fs: Any, *args: Any, **kwargs: Any) -> Any:
            self.number += 1
            return work(fs, *args, **kwargs)

        self._fs._call_s3, self._fs.call_s3 = call, sync_wrapper(call)
        return self

    def __exit__(self, *_: object) -> None:
        self._fs._call_s3, self._fs.call_s3 = self._work


@contextlib.contextmanager
def take(found: Times, name: str) -> Iterator[None]:
    """Note the seconds that the body took, if it was faster than before, and its requests."""
    start = time.process_time()
    with Requests() as requests:
        yield
    seconds = time.process_time() - start
    best, _ = found.get(name, (seconds, 0))
    found[name] = min(best, seconds), requests.number


def page_of(settings: Settings, records: dict[str, Execution]) -> Callable[[], object]:
    """Return what draws the page of a run."""
    from ridgeline.airflow.plugin.run_page import Run, Task, render  # Airflow sets up the log of the process

    tasks = []
    for name, record in records.items():
        start = record.started_at - timedelta(milliseconds=1)
        tasks.append(Task(name, "success", start, record.started_at + timedelta(seconds=record.seconds)))
    last = next(iter(records.values()))
    run = Run("bench", last.run_id, "success", tasks[0].started_at, tasks[-1].ended_at, "", {}, tuple(tasks))
    return lambda: render(settings, run)


def measure(stores: Iterable[Settings], params: dict[str, Any], repeats: int) -> list[Times]:
    """Return the seconds, the fastest of several, and the requests of each thing to do, by its name, for each store.

    The stores take turns, so that other work on the machine slows all of them.
    """
    plan = [component for component in pipeline.plan("export") if component.name in params]
    measured: list[tuple[Settings, Times]] = [(settings, {}) for settings in stores]
    for repeat in range(repeats):
        for settings, found in measured:
            run_id = f"again {repeat} {time.time()}"
            with take(found, "all steps, reused"):
                steps = pipeline.run(settings, plan, params, run_id)
                for component in plan:
                    with take(found, f"reused {component.name}"):
                        execution = next(steps).execution
                    assert repeat == 0 or execution.state == "cached", execution
                next(steps, None)
            if repeat < 3:
                records = pipeline.run_records(settings, run_id)
                ordered = {step.name: records[step.name] for step in plan}
                for name, work in uses(settings, run_id, ordered).items():
                    with take(found, name):
                        work()
    for settings, found in measured:
        with take(found, "gc --dry-run that keeps 10 runs"):
            collect_garbage(settings.open_store(), settings.open_registry(), 10, dry_run=True)
    return [found for _, found in measured]


def uses(settings: Settings, run_id: str, records: dict[str, Execution]) -> dict[str, Callable[[], object]]:
    """Return what is measured besides the steps, by its name."""
    store, last = settings.open_store(), records["export"].output or ""

    def list_models() -> None:
        with patch.dict(os.environ, {"RIDGELINE_STORE": settings.store}):
            assert CliRunner().invoke(app, ["models", "list"]).exit_code == 0

    return {
        "a look-up of all steps, not found": lambda: look_up(store),
        "records of a run": lambda: pipeline.run_records(settings, run_id),
        "lineage of a model": lambda: lineage(store, last),
        "the page of a run": page_of(settings, records),
        "ridgeline models list": list_models,
    }


def look_up(store: Store) -> None:
    """Look up each step with inputs that no record has."""
    unknown: Any = SimpleNamespace(digest="0" * 64)
    for component in pipeline.load_components().values():
        assert decide(store, component, dict.fromkeys(component.inputs, unknown), component.params(), sources={}).parts


def compare(kind: str, few: Times, many: Times) -> None:
    """Print what was measured with few and with many records: seconds in a folder, requests in an object store."""
    records, versions = MANY[kind]
    print(f"\n{kind}: {FEW[0]} → {records:,} execution records, {FEW[1]} → {versions:,} versions")
    ratios = []
    for name, (seconds, requests) in few.items():
        more, more_requests = many[name]
        if requests:
            row(name, f"{requests} → {more_requests} requests")
            continue
        is_step = "reused" in name
        ratios += [more / seconds] if is_step else []
        row(name, f"{1e3 * seconds:.1f} → {1e3 * more:.1f} ms, {more / seconds:.2f}", "<= 1.3" if is_step else "")
    if ratios:
        row("  of the steps: median, highest", f"{statistics.median(ratios):.2f}, {max(ratios):.2f}", "<= 1.3")


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the tables.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    params = pipeline.parse_params(pipeline.plan("export"), {} if settings.manual_dir else SYNTHETIC, settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_folder, in_object_store = MANY

        def stores(kind: str) -> dict[str, Settings]:
            """Return a store with few and one with many records and versions, by the names of their buckets."""
            found = {}
            for bucket, (records, versions) in (("few", FEW), ("many", MANY[kind])):
                place = folder / kind / bucket / "store"
                own = found[bucket] = settings.model_copy(update={"store": str(place)})
                fill(own.open_store(), records)
                shutil.copytree(settings.store, place, dirs_exist_ok=True)  # after them, so that they keep their times
                add_versions(own, own.open_store().open(refs["export"], PushedModel), versions)
            return found

        local = stores(in_folder)
        compare(in_folder, *measure(local.values(), params, REPEATS))
        store, registry = local["many"].open_store(), local["many"].open_registry()
        with timed("gc in the folder, which keeps 10 runs", ""):
            wait = longest_wait(store, lambda: collect_garbage(store, registry, 10, dry_run=False))
        row("  longest wait for the store's lock meanwhile", f"{wait:.2f} s", "<= 1.6 s")

        remote = {}
        for bucket, own in stores(in_object_store).items():
            for version in own.serving_dir().glob("*/*/"):  # what an object store has beside each version
                found = {path.relative_to(version).as_posix(): path for path in version.rglob("*") if path.is_file()}
                manifest = {"files": {name: file_entry(path).model_dump() for name, path in found.items()}}
                version.with_name(f"{version.name}.json").write_text(json.dumps(manifest))
            remote[bucket] = own.model_copy(update={"store": f"s3://{bucket}/store"})
        with object_store(folder / in_object_store), patch.dict(os.environ, {"HOME": str(folder / "home")}):
            compare(in_object_store, *measure(remote.values(), params, repeats=2))  # the first fills the mirrors
            store, registry = remote["many"].open_store(), remote["many"].open_registry()
            with timed("gc in the object store, which keeps 10 runs", ""), Requests() as requests:
                collect_garbage(store, registry, 10, dry_run=False)
            row("  requests", f"{requests.number:,}", "")
