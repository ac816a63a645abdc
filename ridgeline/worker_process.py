"""Runs a step that several workers share in a process of its own.

TensorFlow connects the workers of a process before its first operation, and for as long as the process lives. So the
process of a run or a task, in which other steps use TensorFlow before and after, can't be one of them; and when a
worker is lost, all that hangs or crashes in TensorFlow ends with this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from ridgeline import quiet_tensorflow
from ridgeline.artifacts.base import Artifact
from ridgeline.component import STEP_ENVIRONMENT, Champion, Component, Params, StepError, TransientStepError, Workers
from ridgeline.workers import VARIABLE


def run_in_process(
    component: Component,
    workers: Workers,
    *,
    params: Params,
    output: Path,
    scratch: Path | None = None,
    **inputs: Artifact[Any] | Champion[Any],
) -> Artifact[Any]:
    """Run a step as one of several workers, as `Component.__call__` does for one; what it prints is shown.

    Args:
        component: A step that distributes. It declares no sources, and does not continue.
        workers: The workers, and which of them this is.
        params: The step's parameters.
        output: An empty directory to write into.
        scratch: The folder with an earlier attempt's state; None if it has none.
        **inputs: The input artifacts by name.

    Returns:
        The sealed output artifact.

    Raises:
        TransientStepError: If the process ended without an outcome: it was killed, TensorFlow crashed, or the step
            ended it with `signal.SIGALRM` because another worker did not start in time.
        Exception: Any exception of the component.
    """
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder, "outcome.json")
        locations = {name: getattr(params, name) for name, field in type(params).model_fields.items() if field.exclude}
        request = {
            "step": f"{component.module}:{component.name}",
            "workers": dataclasses.asdict(workers),
            "params": params.model_dump(mode="json") | locations,
            "output": str(output),
            "scratch": str(scratch) if scratch else None,
            "inputs": {name: _described(value) for name, value in inputs.items()},
            "outcome": str(outcome),
        }
        env = {name: value for name, value in os.environ.items() if name != VARIABLE}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ridgeline.worker_process"],
            env={**env, **STEP_ENVIRONMENT, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended already
                process.stdin.write(f"{json.dumps(request, default=str)}\n")
                process.stdin.flush()  # it stays open: its end ends the process
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
        if not outcome.exists():
            if status == -signal.SIGALRM:
                others = ", ".join(address for i, address in enumerate(workers.addresses) if i != workers.index)
                raise TransientStepError(
                    f"Expected {workers.count} workers to start in time; missing one of {others}. Start all workers "
                    "again."
                )
            raise TransientStepError(
                f"The process of {component.name} on worker {workers.index} of {workers.count} ended with status "
                f"{status} and no result: it was killed, or TensorFlow ended it. Start all workers again."
            )
        error = json.loads(outcome.read_text(encoding="utf-8"))
    if error:
        module, _, name = error["type"].partition(":")
        raise getattr(importlib.import_module(module), name)(error["message"])
    return component.output.load(output)


def _described(value: Artifact[Any] | Champion[Any]) -> dict[str, Any]:
    if isinstance(value, Champion):
        artifact = None if value.artifact is None else _described(value.artifact)
        return {"champion": value.artifact_digest, "problem": value.problem, "artifact": artifact}
    return {"kind": f"{type(value).__module__}:{type(value).__name__}", "path": str(value.path)}


def _opened(described: dict[str, Any]) -> Artifact[Any] | Champion[Any]:
    if "champion" in described:
        artifact = described["artifact"] and _opened(described["artifact"])
        return Champion(described["champion"], artifact, described["problem"])
    artifact = _named(described["kind"]).load(Path(described["path"]))
    assert isinstance(artifact, Artifact)
    return artifact


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


# --- in the other process


def serve() -> None:
    """Run the step that a line of JSON on the standard input describes, and write the error, or null, into a file."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for library in ("absl", "tensorflow"):
        logging.getLogger(library).setLevel(logging.WARNING)
    quiet_tensorflow.install()
    component: Component = _named(request["step"])
    inputs: dict[str, Any] = {name: _opened(value) for name, value in request["inputs"].items()}
    error = None
    try:
        component(
            params=component.parse(request["params"]),
            output=Path(request["output"]),
            scratch=Path(request["scratch"]) if request["scratch"] else None,
            workers=Workers(**{**request["workers"], "addresses": tuple(request["workers"]["addresses"])}),
            **inputs,
        )
    except Exception as raised:
        if not isinstance(raised, StepError | FloatingPointError):
            traceback.print_exc()
        error = _as_json(raised)
    unfinished = Path(f"{request['outcome']}.new")
    unfinished.write_text(json.dumps(error), encoding="utf-8")
    unfinished.rename(request["outcome"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # TensorFlow's end waits for the other workers


def _as_json(error: Exception) -> dict[str, str]:
    """Return an error's type and message; of one that takes more than a message, those of a `RuntimeError`."""
    kind = type(error)
    try:
        same = str(kind(str(error))) == str(error) and "<" not in kind.__qualname__ and "." not in kind.__qualname__
    except Exception:
        same = False
    if not same:
        return {"type": "builtins:RuntimeError", "message": f"{kind.__name__}: {error}"}
    return {"type": f"{kind.__module__}:{kind.__name__}", "message": str(error)}


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    serve()
