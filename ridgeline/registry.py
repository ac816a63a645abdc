"""The registry: published versions of a model in TF Serving's layout, the champion, the history."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ridgeline.artifacts.base import file_entry
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.store import StoreError, explained

log = logging.getLogger(__name__)

CHECK_SECONDS = 300


class PushError(RuntimeError):
    """A model did not serve what its evaluation saw, so it was not pushed."""


class HistoryEntry(BaseModel):
    """One line of a model's history.

    Attributes:
        schema_version: Version of this entry's layout.
        version: The version that became the champion.
        action: What happened.
        artifact: Store-relative name of the `PushedModel`.
        model_digest: The trained model's digest.
        accuracy: Its accuracy on the test split, in [0, 1].
        run_id: The pipeline run that pushed it.
        at: When, UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    version: int
    action: Literal["push", "rollback"]
    artifact: str
    model_digest: str
    accuracy: float
    run_id: str
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push.

    Attributes:
        path: The served version's folder.
        version: Its number.
        reason: What was done and why, as a sentence.
        new: False if this version served the model already.
    """

    path: Path
    version: int
    reason: str
    new: bool


class Registry:
    """The served models.

    On disk::

        <root>/<model name>/<version>/      SavedModel; integers that only grow, never rewritten
        <root>/<model name>/champion.json   {"version": 3}
        <root>/<model name>/history.jsonl   one `HistoryEntry` a line, append-only
        <root>/<model name>/.push-<id>/     being copied and checked; TF Serving ignores it

    Args:
        root: The serving folder, on a local file system.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def model_names(self) -> list[str]:
        """Return the names of the models that were ever pushed."""
        return sorted(path.parent.name for path in self.root.glob("*/history.jsonl"))

    def history(self, name: str) -> list[HistoryEntry]:
        """Return a model's history, oldest first."""
        path = self.root / name / "history.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            return [HistoryEntry.model_validate_json(line) for line in lines]
        except ValidationError as error:
            raise StoreError(
                f"Expected a history entry in each line of {path}; received: {error}. Restore the file from a backup."
            ) from error

    def champion(self, name: str) -> HistoryEntry | None:
        """Return the entry that made the champion, or None if there is none."""
        path = self.root / name / "champion.json"
        if not path.exists():
            return None
        version = json.loads(path.read_text(encoding="utf-8"))["version"]
        return next((entry for entry in reversed(self.history(name)) if entry.version == version), None)

    def push(self, model: PushedModel, run_id: str) -> Pushed:
        """Serve a model: copy it, check the copy in a fresh process, rename it into place, make it champion.

        Args:
            model: The servable model.
            run_id: The pipeline run that pushes it.

        Returns:
            The version that serves it; the champion's own if that is the same model.

        Raises:
            PushError: If the copy does not serve the evaluation's own predictions.
            StoreError: If the folder can't be written.
        """
        name = model.facts.model_name
        folder = self.root / name
        with explained("write to", self.root):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                for rubbish in folder.glob(".push-*"):  # of a push that was killed: the lock is ours
                    shutil.rmtree(rubbish, ignore_errors=True)
                champion = self.champion(name)
                if champion and champion.artifact == model.ref:
                    served = folder / str(champion.version)
                    if _serves(served, model):
                        reason = f"not pushed: version {champion.version} serves this model already"
                        return Pushed(served, champion.version, reason, new=False)
                version = 1 + max(
                    [entry.version for entry in self.history(name)]
                    + [int(path.name) for path in folder.iterdir() if path.name.isdigit()],
                    default=0,
                )
                staging = folder / f".push-{uuid.uuid4().hex}"
                try:
                    shutil.copytree(model.saved_model, staging)
                    check(staging, model)
                    staging.rename(folder / str(version))
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
                self._crown(
                    name,
                    HistoryEntry(
                        version=version,
                        action="push",
                        artifact=model.ref,
                        model_digest=model.facts.model_digest,
                        accuracy=model.facts.accuracy,
                        run_id=run_id,
                    ),
                )
        served = folder / str(version)
        return Pushed(served, version, f"pushed as version {version}", new=True)

    def _crown(self, name: str, entry: HistoryEntry) -> None:
        folder = self.root / name
        lines = [line.model_dump_json() for line in [*self.history(name), entry]]
        _replace(folder / "history.jsonl", "".join(f"{line}\n" for line in lines))
        _replace(folder / "champion.json", json.dumps({"version": entry.version}) + "\n")


def _replace(path: Path, text: str) -> None:
    """Replace a file's content at once, so that no reader and no kill sees half of it."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


def _serves(folder: Path, model: PushedModel) -> bool:
    """Tell whether a version's folder holds a model's files, byte for byte."""
    prefix = "saved_model/"
    files = {n.removeprefix(prefix): e for n, e in model.manifest.files.items() if n.startswith(prefix)}
    return all((folder / name).is_file() and file_entry(folder / name) == entry for name, entry in files.items())


def check(saved_model: Path, model: PushedModel) -> None:
    """Check a copy of a SavedModel in a fresh process against the evaluation's predictions.

    Args:
        saved_model: The copy's folder.
        model: Holds the images, the expected probabilities and the class names.

    Raises:
        PushError: If it can't be loaded or yields anything else.
    """
    names = json.dumps(model.facts.class_names)
    command = [sys.executable, "-m", "ridgeline.serving_check", str(saved_model), str(model.check), names]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHECK_SECONDS, check=True)
    except subprocess.SubprocessError as error:
        received = str(getattr(error, "stderr", None) or error).strip()[-2000:]
        raise PushError(
            f"Expected {saved_model} to serve the evaluation's predictions; received: {received}. "
            "Nothing was pushed; the champion is unchanged."
        ) from error
