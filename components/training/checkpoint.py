"""The checkpoint of a training: one file, replaced whole.

The file holds the SHA-256 of the rest as 64 hexadecimal digits, a line break, and an uncompressed ``.npz``. The
``.npz`` holds the arrays and, under ``facts``, a JSON text as uint8. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

FACTS = "facts"


class CheckpointError(RuntimeError):
    """A checkpoint belongs to another training."""


@dataclass(frozen=True)
class Checkpoint:
    """The file of a training's state, and the identity of the training.

    Attributes:
        path: The file; its folder exists.
        identity: The training's parameters and the digests of its inputs, as JSON values. A file with another
            identity is refused.
    """

    path: Path
    identity: Mapping[str, Any] = field(default_factory=dict)

    def save(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Replace the file by one atomic rename, so that a kill at any moment leaves the old or the new one.

        Args:
            arrays: Arrays of numbers by name.
            facts: JSON values.
        """
        text = json.dumps({"identity": self.identity, "facts": facts})
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **{FACTS: np.frombuffer(text.encode(), np.uint8)}, **arrays)
        unfinished = self.path.with_name(f".{self.path.name}-{uuid.uuid4().hex}")
        try:
            with unfinished.open("wb") as file:
                file.write(hashlib.sha256(content.getbuffer()).hexdigest().encode() + b"\n")
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Return the arrays and facts last saved; None if there are none, or the file is damaged.

        Raises:
            CheckpointError: If the file belongs to another training.
        """
        try:
            digest, _, content = self.path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        received = hashlib.sha256(content).hexdigest()
        if digest != received.encode():
            log.warning(
                "checkpoint refused: expected %s to have the SHA-256 in its first line; received %s. "
                "It is damaged and will be replaced; training starts from the beginning.",
                self.path,
                received,
            )
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        saved = json.loads(arrays.pop(FACTS).tobytes())
        expected = json.loads(json.dumps(self.identity))
        if saved["identity"] != expected:
            raise CheckpointError(
                f"Expected a checkpoint of {_differing(expected, saved['identity'])}; received one of "
                f"{_differing(saved['identity'], expected)} in {self.path}. Train with its parameters and inputs "
                "to resume it, or delete it to start from the beginning."
            )
        return arrays, saved["facts"]


def _differing(value: Any, other: Any) -> Any:
    """Return the part of a nested JSON value that differs from another value."""
    if not (isinstance(value, dict) and isinstance(other, dict)):
        return value
    missing = object()
    return {name: _differing(v, other.get(name)) for name, v in value.items() if other.get(name, missing) != v}
