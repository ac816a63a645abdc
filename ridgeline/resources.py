"""What a step needs of the machine that runs it, for executors that start one for each task."""

from __future__ import annotations

import json
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

CORES = re.compile(r"([0-9]+(?:\.[0-9]+)?)m?")
BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)[MGT]i?")  # with a unit: no step does with 8 bytes, nor with 8m, 0.008 of one
EXAMPLE = '{"train": {"cpu": 4, "memory": "8Gi", "gpu": 1}}'


class StepResources(NamedTuple):
    """What the pod of a step gets, in place of what the executor's template says.

    Attributes:
        cpu: CPU cores, as a Kubernetes quantity such as ``2`` or ``500m``.
        memory: Memory, such as ``4Gi``.
        disk: Space for the local copies of artifacts and for temporary files, such as ``20Gi``.
        gpu: Number of GPUs.
    """

    cpu: str
    memory: str
    disk: str = ""
    gpu: int = 0


def parse_resources(value: Any) -> dict[str, StepResources]:
    """Return what each step needs, by its name.

    Args:
        value: A JSON object, as text or parsed, or the path of a file with one.

    Raises:
        ValueError: If it is neither, or names an unknown step, an unknown resource or something that is no quantity.
    """
    text, place = value, ""
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        place = f" in {value}"
        try:
            text = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ValueError(f"a JSON object such as {EXAMPLE}, or a file with one ({reason})") from None
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"a JSON object such as {EXAMPLE}{place}")
    steps = sorted(point.name for point in entry_points(group="ridgeline.components"))
    if unknown := [name for name in found if name not in steps]:
        raise ValueError(f"some of the steps {', '.join(steps)}{place}; received {', '.join(unknown)}")
    return {step: _resources(step, wanted, place) for step, wanted in found.items()}


def _resources(step: str, wanted: Any, place: str) -> StepResources:
    if isinstance(wanted, StepResources):
        return wanted
    names = set(StepResources._fields)
    if not isinstance(wanted, dict) or not {"cpu", "memory"} <= wanted.keys() <= names:
        received = ", ".join(wanted) if isinstance(wanted, dict) else repr(wanted)
        raise ValueError(f"cpu, memory and, if need be, disk and gpu for {step}{place}; received {received or 'none'}")
    found: dict[str, Any] = {}
    for name, amount in wanted.items():
        if name == "gpu":
            if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
                raise ValueError(f"a whole number of GPUs for {step}{place}; received {amount!r}")
            found[name] = amount
            continue
        text = str(amount) if isinstance(amount, int | float | str) and not isinstance(amount, bool) else ""
        match = (CORES if name == "cpu" else BYTES).fullmatch(text)
        if not match or not float(match[1]):
            example = "2 or 500m" if name == "cpu" else "4Gi or 500M"
            raise ValueError(f"a quantity such as {example} for {step}.{name}{place}; received {amount!r}")
        found[name] = text
    return StepResources(**found)
