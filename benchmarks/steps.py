"""The overhead of a step: DAG import, reuse, reading, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.artifacts.examples import Examples
from ridgeline.component import STEP_ENVIRONMENT
from ridgeline.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
SYNTHETIC = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1_000}

DAG_IMPORT = """
import json, runpy, sys, time
start = time.perf_counter(); import airflow.sdk; sdk = time.perf_counter() - start
start = time.perf_counter(); runpy.run_path("dags/fashion_mnist_training.py"); dag = time.perf_counter() - start
print(json.dumps({"sdk": sdk, "dag": dag, "tensorflow": "tensorflow" in sys.modules}))
"""
REUSE = """
import json, sys, time
import airflow.sdk
start = time.perf_counter()
from ridgeline.pipeline import load_components, run_step
from ridgeline.settings import Settings
settings, inputs = Settings(store=sys.argv[1]), json.loads(sys.argv[3])
component = load_components()[sys.argv[2]]
params = component.parse(json.loads(sys.argv[4]))
state = run_step(settings, component, inputs, params, "bench").execution.state
print(json.dumps({"seconds": time.perf_counter() - start, "state": state, "tensorflow": "tensorflow" in sys.modules}))
"""
TRAIN = """
import json, re, sys, tempfile
from pathlib import Path
from components.train import train
from ridgeline.artifacts.examples import Examples
import keras, tensorflow
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
start = peak()
with tempfile.TemporaryDirectory() as folder:
    train(examples=Examples.load(Path(sys.argv[1])), params=train.parse({}), output=Path(folder))
print(json.dumps({"import": start, "peak": peak()}))
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    store = settings.open_store()
    print("\nOverhead of a step")
    imported = python(DAG_IMPORT)
    row("import of the DAG file beyond airflow.sdk", f"{imported['dag']:.2f} s", "<= 0.5 s")
    row("  airflow.sdk itself", f"{imported['sdk']:.2f} s")
    row("  TensorFlow imported", str(imported["tensorflow"]), "False")

    start = time.perf_counter()
    split = Examples.load(store.path(refs["transform"])).split("train")
    verified = time.perf_counter() - start
    start = time.perf_counter()
    total = int(np.sum(split.images, dtype=np.int64)) + int(np.sum(split.labels))
    row("reading every byte of the training split", f"{time.perf_counter() - start:.3f} s", "<= 0.2 s")
    row("  verifying all splits' digests before", f"{verified:.3f} s")
    assert total > 0

    for execution in list(store.executions()):
        if execution.run_id != "bench" or execution.state != "complete":
            continue
        params: dict[str, object] = {}
        for name, value in execution.parts.params.items():
            place = params
            *path, leaf = name.split(".")
            for part in path:
                place = place.setdefault(part, {})  # type: ignore[assignment]
            place[leaf] = value
        arguments = (settings.store, execution.component, json.dumps(execution.inputs), json.dumps(params))
        reuse = python(REUSE, *arguments)
        assert reuse["state"] == "cached"
        cost = f"{reuse['seconds']:.2f} s, TensorFlow imported: {reuse['tensorflow']}"
        row(f"reused {execution.component}, beyond airflow.sdk", cost, "<= 1 s, False")

    memory = python(TRAIN, str(store.path(refs["transform"])))
    row("peak memory of a training process", f"{memory['peak']:.0f} MiB", "<= 1 GB = 954 MiB")
    row("  of which importing TensorFlow", f"{memory['import']:.0f} MiB")


def row(name: str, value: str, goal: str = "") -> None:
    """Print one line of the table: what, the measured value, the goal."""
    print(f"{name:<52} {value:>44}   {goal}".rstrip(), flush=True)


def python(program: str, *arguments: str) -> Any:
    """Run a program in a new process; return the JSON value in its last line."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    """Return this process's environment without the variables of steps: the notebook uses TensorFlow's defaults."""
    return {name: value for name, value in os.environ.items() if name not in STEP_ENVIRONMENT}
