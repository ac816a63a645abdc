"""Which worker of several this process is: the environment variable ``TF_CONFIG``, as TensorFlow defines it.

Kubeflow's TFJob, Vertex AI and SageMaker set it for each of a training's machines.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, NoReturn

from ridgeline.component import ParameterError, Workers

VARIABLE = "TF_CONFIG"
CHIEF, WORKER = "chief", "worker"
ADDRESS = re.compile(r"[^\s:/]+:[0-9]{1,5}|\[[0-9a-fA-F:.]+\]:[0-9]{1,5}")
EXAMPLE = '{"cluster": {"worker": ["host-0:2222", "host-1:2222"]}, "task": {"type": "worker", "index": 0}}'


def workers_of_environment() -> Workers | None:
    """Return the workers that ``TF_CONFIG`` names; None if it is not set, or names one alone.

    Raises:
        ParameterError: If it can't be used.
    """
    return parse(os.environ.get(VARIABLE, ""))


def parse(text: str) -> Workers | None:
    """Return the workers that a text names; None if it is empty, or names one alone.

    The chief is the task ``chief`` or, without one, worker 0.

    Args:
        text: JSON.

    Raises:
        ParameterError: If it is no JSON, or names no cluster of workers or no task of it.

    Example:
        >>> parse('{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "worker", "index": 0}}')
        Workers(addresses=('a:1', 'b:1'), index=1, key='')
        >>> parse('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}')
    """
    if not text.strip():
        return None
    try:
        config = json.loads(text)
    except ValueError:
        _refuse(f"JSON such as {EXAMPLE}", repr(text[:200]))
    if not isinstance(config, dict) or not config.keys() & {"cluster", "task"}:
        _refuse(f"an object such as {EXAMPLE}", repr(text[:200]))
    cluster, task = config.get("cluster"), config.get("task")
    if not isinstance(cluster, dict) or not cluster:
        _refuse("the addresses of the workers under cluster", repr(cluster))
    if other := sorted(cluster.keys() - {CHIEF, WORKER, "evaluator"}):
        found = ", ".join(map(repr, other))
        _refuse(
            f"a cluster of {CHIEF} and {WORKER}, which exchange gradients among each other",
            found + (", a parameter server" if "ps" in other else ""),
            "Start the training without it.",
        )
    jobs = {name: _addresses(name, cluster.get(name, [])) for name in (CHIEF, WORKER)}
    if len(jobs[CHIEF]) > 1:
        _refuse(f"one {CHIEF}", f"{len(jobs[CHIEF])}")
    addresses = jobs[CHIEF] + jobs[WORKER]
    if len(set(addresses)) < len(addresses):
        _refuse("an address of its own for each worker", ", ".join(addresses))
    if not isinstance(task, dict):
        _refuse("type and index of this worker under task", repr(task))
    kind, index = task.get("type"), task.get("index")
    if kind not in (CHIEF, WORKER):
        _refuse(f"a task of the type {CHIEF} or {WORKER}", repr(kind), "Run Ridgeline only on these.")
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(jobs[kind]):
        _refuse(f"an index of one of the {len(jobs[kind])} addresses of {kind}, from 0", repr(index))
    if len(addresses) == 1:
        return None
    return Workers(addresses, index + (len(jobs[CHIEF]) if kind == WORKER else 0))


def _addresses(job: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        _refuse(f"a list of addresses of {job}", repr(values))
    for value in values:
        port = value.rpartition(":")[2] if isinstance(value, str) and ADDRESS.fullmatch(value) else "0"
        if not 0 < int(port) < 2**16:
            _refuse(f"addresses of {job} such as host-0:2222", repr(value))
    return tuple(values)


def _refuse(expected: str, received: str, advice: str = "") -> NoReturn:
    todo = advice or f"Correct it, or unset {VARIABLE} to use one machine."
    raise ParameterError(f"{VARIABLE}: expected {expected}; received {received}. {todo}")
