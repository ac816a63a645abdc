"""A sweep spread over worker processes that share an object store and nothing else, as Celery workers do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.records import object_store
from benchmarks.steps import ROOT, environment, row
from components.sweep import Params
from ridgeline.pipeline import load_components, run_step
from ridgeline.settings import Settings

TRIALS = {"dense": False, "train": {"epochs": 10}}  # the default grid has 16 strengths
WORKERS = (1, 2, 4)
BUCKET = "bench"

WORKER = """
import json, os, sys, time
index, store, examples, run, *grids = sys.argv[1:]
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(index) % len(os.sched_getaffinity(0))]})
from ridgeline import quiet_tensorflow
from ridgeline.component import STEP_ENVIRONMENT
from ridgeline.pipeline import load_components, run_step
from ridgeline.settings import Settings
os.environ.update(STEP_ENVIRONMENT)
quiet_tensorflow.install()
import keras
settings, sweep, refs = Settings(store=store), load_components()["sweep"], []
settings.open_store().fetch(examples)
print("ready", flush=True)
sys.stdin.readline()
cpu = time.process_time()
for grid in grids:
    result = run_step(settings, sweep, {"examples": examples}, sweep.parse(json.loads(grid)), run)
    assert result.execution.state == "complete", result.execution
    refs.append(result.execution.output)
print(json.dumps({"refs": refs, "cpu": time.process_time() - cpu}))
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print how long the trials take on 1, 2 and 4 workers, and whether the chosen result has the same bytes.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    cores = len(os.sched_getaffinity(0))
    params = Params.model_validate(TRIALS)
    print(f"\nA sweep of {len(params.points)} trials on workers of one core each; this machine has {cores} cores")
    walls, longest, results = {}, {}, set()
    for count in WORKERS:
        with tempfile.TemporaryDirectory() as folder, object_store(_with_a_bucket(Path(folder))):
            url = f"s3://{BUCKET}"
            shutil.copytree(settings.open_store().path(refs["transform"]), published := Path(folder) / "examples")
            remote = Settings(store=url)
            store = remote.open_store()
            with store.stage() as staged:
                shutil.copytree(published, staged, dirs_exist_ok=True)
                examples = store.publish(load_components()["transform"].output.load(staged))
            walls[count], longest[count], trials = _sweep(url, examples, params.split(count), Path(folder))
            select = load_components()["select"]
            inputs = {f"trials.{i}": ref for i, ref in enumerate(trials)}
            results.add(run_step(remote, select, inputs, select.parse({}), "bench").execution.output)
        row(f"{count} workers", f"{walls[count]:.1f} s, longest CPU time {longest[count]:.1f} s")
        if count > 1:
            goal = f"{min(count, cores)}, {count}"
            faster = f"{walls[1] / walls[count]:.2f}, {longest[1] / longest[count]:.2f}"
            row("  times faster: here, by CPU time", faster, goal)
    row("the chosen result has the same bytes", str(len(results) == 1), "True")


def _with_a_bucket(folder: Path) -> Path:
    (buckets := folder / "buckets" / BUCKET).mkdir(parents=True)
    return buckets.parent


def _sweep(url: str, examples: str, grids: list[dict[str, object]], folder: Path) -> tuple[float, float, list[str]]:
    """Run each part of a grid on a worker of its own; return the wall time, the longest CPU time, and the trials."""
    workers = []
    for i, grid in enumerate(grids):
        (home := folder / f"worker {i}").mkdir()  # a local cache of its own
        command = [sys.executable, "-c", WORKER, str(i), url, examples, "bench", json.dumps({**TRIALS, **grid})]
        env = {**environment(), "HOME": str(home)}
        workers.append(
            subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
    for worker in workers:
        assert worker.stdout
        assert worker.stdout.readline() == "ready\n"
    start = time.monotonic()
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("start\n")
        worker.stdin.flush()
    outputs = [worker.communicate()[0] for worker in workers]
    seconds = time.monotonic() - start
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return seconds, max(result["cpu"] for result in found), [ref for result in found for ref in result["refs"]]
