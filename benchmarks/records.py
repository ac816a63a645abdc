"""What 20,000 execution records cost: a look-up, a lineage, garbage collection, and how long it holds the lock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.steps import row
from ridgeline import pipeline
from ridgeline.executor import decide
from ridgeline.gc import collect_garbage
from ridgeline.keys import KeyParts, reachable_code
from ridgeline.lineage import lineage
from ridgeline.registry import Registry
from ridgeline.settings import Settings
from ridgeline.store import Execution, Store

NUM_RECORDS = 20_000
MANIFEST = {"schema_version": 1, "facts": {}, "files": {}}


def fill(store: Store, num_records: int) -> list[str]:
    """Write the records of many runs, whose last step is skipped; return the outputs of the last run."""
    steps = list(pipeline.load_components().values())
    code = {step.name: reachable_code(step.module) for step in steps}
    start = datetime.now(UTC) - timedelta(days=365)
    refs: list[str] = []
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
                started_at=start + timedelta(minutes=i),
                seconds=1.0,
            )
        )
        if not skipped:
            folder = store.path(refs[-1])
            folder.mkdir(parents=True)
            text = json.dumps({**MANIFEST, "type": step.output.__name__, "digest": digest})
            (folder / "manifest.json").write_text(text)
    return refs


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


def main(_: Settings, __: dict[str, str]) -> None:
    """Print the table. The goals are a tenth of what version 0.2 took, on two busy cores."""
    print(f"\nA store with {NUM_RECORDS:,} execution records")
    with tempfile.TemporaryDirectory() as folder:
        store, registry = Store(Path(folder) / "store"), Registry(Path(folder) / "serving")
        refs = fill(store, NUM_RECORDS)
        unknown: Any = SimpleNamespace(digest="0" * 64)
        components = pipeline.load_components().values()
        with timed("look-up by a run of all steps, none known", "<= 0.4 s"):
            for component in components:
                assert decide(store, component, dict.fromkeys(component.inputs, unknown), component.params()).parts
        with timed("lineage of the last artifact", "<= 0.5 s"):
            assert sum(1 for _ in lineage(store, refs[-1]).walk()) == len(refs)
        with timed("records of one run", "<= 0.5 s"):
            assert len(pipeline.run_records(Settings(store=str(store.root)), "run 7")) == len(components)
        with timed("gc --dry-run that keeps 10 runs", "<= 1.6 s"):
            collect_garbage(store, registry, 10, dry_run=True)
        with timed("gc that keeps 10 runs", ""):
            wait = longest_wait(store, lambda: collect_garbage(store, registry, 10, dry_run=False))
        row("  longest wait for the store's lock meanwhile", f"{wait:.2f} s", "<= 1.6 s")


if __name__ == "__main__":
    main(Settings(), {})
