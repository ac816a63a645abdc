"""The registry: published versions of a model in TF Serving's layout, the champion, the history."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from ridgeline.artifacts.base import file_entry
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.serving_check import ServingError, check
from ridgeline.store import Store, StoreError, translate_os_errors

log = logging.getLogger(__name__)

MODEL_CONFIG = """\
  config {{
    name: {name}
    base_path: {base_path}
    model_platform: "tensorflow"
    model_version_policy {{ specific {{ versions: {version} }} }}
  }}
"""


class RegistryError(RuntimeError):
    """A version is missing or serves other predictions than its evaluation, or a request is refused."""


class HistoryEntry(BaseModel):
    """One line of a model's history.

    Attributes:
        schema_version: Version of this entry's layout.
        version: The version that became the champion.
        action: What happened.
        artifact: Store-relative name of the `PushedModel`.
        model_digest: The trained model's digest.
        accuracy: Its accuracy on the test split, in [0, 1].
        run_id: The pipeline run that pushed it, or the run that rolled back.
        at: When, UTC.
        reason: Why it was rolled back, or the reason that a person gave for serving it by force; else empty.
        by: The user who asked for it; empty for a scheduled run, or if the user is not known.
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
    reason: str = ""
    by: str = ""


@dataclass(frozen=True)
class PushDecision:
    """Whether a model is to be pushed.

    Attributes:
        push: True if it is.
        reason: Why it is not, as a sentence; empty if it is.
    """

    push: bool
    reason: str = ""


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push.

    Attributes:
        path: The folder of the version that is served now.
        version: Its number.
        reason: What was done and why, as a sentence.
        new: False if nothing was pushed.
    """

    path: Path
    version: int
    reason: str
    new: bool


class Registry:
    """The served models.

    On disk::

        <root>/models.config                TF Serving's own configuration: every model, its champion alone
        <root>/<model name>/<version>/      SavedModel; integers that only grow, never rewritten
        <root>/<model name>/history.jsonl   one `HistoryEntry` a line, append-only; the last one made the champion
        <root>/<model name>/champion.json   {"version": 3}: the same, for other readers
        <root>/<model name>/.push-<id>/     being copied and checked; TF Serving ignores it
        <root>/<model name>/.pruned-<id>/   being deleted

    The last line of the history decides. The two files for other readers follow it, with the next push at the latest.

    Args:
        root: The serving folder, on a local file system.
        keep_versions: How many of the newest versions of a model a push keeps. The champion and the version that it
            would be rolled back to are also kept.
        base_path: The serving folder as TF Serving sees it; `root` if None.
    """

    def __init__(self, root: Path, keep_versions: int = 10, base_path: str | None = None) -> None:
        self.root = root
        self.keep_versions = keep_versions
        self.base_path = base_path or str(root.absolute())

    # --- queries

    def model_names(self) -> list[str]:
        """Return the names of the models that were ever pushed."""
        return sorted(path.parent.name for path in self.root.glob("*/history.jsonl"))

    def history(self, name: str) -> list[HistoryEntry]:
        """Return a model's history, oldest first; empty if it was never pushed.

        Raises:
            StoreError: If it is damaged.
        """
        path = self.root / name / "history.jsonl"
        try:
            entries = [HistoryEntry.model_validate_json(line) for line in self._lines(name)]
            if path.exists() and not entries:
                raise ValueError("an empty file")
        except ValueError as error:  # an invalid entry, or not UTF-8
            raise StoreError(
                f"Expected a history entry in each line of {path}; received: {error}. Restore the file from a backup."
            ) from error
        return entries

    def known_history(self, name: str) -> list[HistoryEntry]:
        """Return the history of a model that was pushed.

        Raises:
            RegistryError: If there is no such model.
        """
        if name not in self.model_names():
            known = ", ".join(self.model_names()) or "none yet"
            raise RegistryError(f"Expected the name of a served model: {known}; received {name!r}.")
        return self.history(name)

    def versions(self, name: str) -> list[int]:
        """Return the versions that were not deleted, oldest first."""
        folders = (path for path in (self.root / name).glob("*") if path.is_dir())
        return sorted(int(path.name) for path in folders if path.name.isdecimal())

    def champion(self, name: str) -> HistoryEntry | None:
        """Return the entry that made the champion, or None if there is none."""
        return next(_succession(self.history(name)), None)

    def baseline(self, name: str, model_digest: str) -> HistoryEntry | None:
        """Return the champion that a model is to be compared with, or None.

        It is the present champion. If the model is the champion itself, it is the champion that the model replaced.
        So an unchanged run makes the same comparison as the run before, and is reused.

        Args:
            name: The model's name.
            model_digest: Digest of the model that is compared.
        """
        return next((e for e in _succession(self.history(name)) if e.model_digest != model_digest), None)

    def previous(self, name: str) -> HistoryEntry | None:
        """Return the entry of the default rollback: that of the last other model that the champion replaced.

        Versions that were rolled back from are left out.
        """
        history, present = self.history(name), self.versions(name)
        others = (e for e in _succession(history) if e.model_digest != history[-1].model_digest)
        return next((e for e in others if e.version in present), None)

    def verify(self, store: Store, name: str, version: int | None = None) -> HistoryEntry:
        """Check a version's bytes against the pushed artifact, and its responses in a fresh process.

        Args:
            store: Holds the artifact.
            name: The model's name.
            version: The version; the champion if None.

        Returns:
            The entry of its push.

        Raises:
            RegistryError: If there is no such version, or its files or responses differ.
            ArtifactError: If the artifact is missing or damaged.
        """
        entry = self._entry(name, version)
        folder = self.root / name / str(entry.version)
        model = store.open(entry.artifact, PushedModel)
        if not _serves(folder, model):
            raise RegistryError(
                f"Expected {folder} to hold the files of {entry.artifact}, byte for byte; they were changed. "
                "Roll back to another version; the next run of the pipeline pushes a damaged champion again."
            )
        _check(folder, model)
        return entry

    def decide_push(self, model: PushedModel, by: str = "") -> PushDecision:
        """Decide whether a model is to be pushed.

        The first rule that holds decides. A model is identified by its digest, however often it was evaluated.

        =====================================================  ===================================================
        a person gave a reason by which it was never pushed    pushed: a reason counts once for a model
        it is the champion's model                             not pushed, unless other files are served
        it was judged against another model than the champion  not pushed: the champion may be better
        it was champion until somebody rolled back from it     not pushed: that would undo the rollback
        it was champion, was replaced, and nobody asks         not pushed: that would undo what a person pushed
        else                                                   pushed
        =====================================================  ===================================================

        Args:
            model: The servable model.
            by: The user who asks for the push; empty for a scheduled run.
        """
        name, facts = model.facts.model_name, model.facts
        history = self.history(name)
        own = [i for i, entry in enumerate(history) if entry.model_digest == facts.model_digest]
        used = {history[i].reason for i in own if history[i].action == "push"}
        if not history or (facts.forced and facts.forced not in used):
            return PushDecision(True)
        champion = history[-1]
        if champion.model_digest == facts.model_digest:
            if not _serves(self.root / name / str(champion.version), model):
                return PushDecision(True)
            return PushDecision(False, f"version {champion.version} serves this model already")
        if champion.model_digest != facts.champion:
            judged = f"against model {facts.champion[:12]}" if facts.champion else "without a champion"
            return PushDecision(
                False,
                f"this model was judged {judged}, but the champion is model {champion.model_digest[:12]}, "
                f"version {champion.version}; judge it again",
            )
        if not own:
            return PushDecision(True)
        left, successor = history[own[-1]], history[own[-1] + 1]
        if successor.action == "rollback":
            end = f"was rolled back from on {successor.at:%Y-%m-%d}: {successor.reason}"
        elif not by:
            end = f"was replaced by version {successor.version} on {successor.at:%Y-%m-%d}, and this run is scheduled"
        else:
            return PushDecision(True)
        if left.version in self.versions(name):
            advice = f"`ridgeline models rollback {name} {left.version} --reason ...` serves it again"
        else:
            advice = "a run that forces it with a new reason pushes it again"
        return PushDecision(False, f"version {left.version} served this model and {end}; {advice}")

    # --- changes

    def push(self, model: PushedModel, run_id: str, by: str = "") -> Pushed:
        """Serve a model: copy it, check the copy in a fresh process, rename it into place, make it champion.

        Nothing is done if `decide_push` refuses. After a push, old versions are deleted.

        Args:
            model: The servable model.
            run_id: The pipeline run that pushes it.
            by: The user who asked for it, if one did.

        Returns:
            The version that is served now: a new one, or the champion if nothing was pushed.

        Raises:
            RegistryError: If the copy does not serve the evaluation's own predictions.
            StoreError: If the folder can't be written.
        """
        name = model.facts.model_name
        with self._locked(name) as folder:
            history = self.history(name)
            decision = self.decide_push(model, by)
            if not decision.push:
                self._publish(name)
                version = history[-1].version
                return Pushed(folder / str(version), version, f"not pushed: {decision.reason}", new=False)
            version = 1 + max([*(entry.version for entry in history), *self.versions(name)], default=0)
            staging = folder / f".push-{uuid.uuid4().hex}"
            try:
                shutil.copytree(model.saved_model, staging)
                _check(staging, model)
                staging.rename(folder / str(version))
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            self._make_champion(
                name,
                HistoryEntry(
                    version=version,
                    action="push",
                    artifact=model.ref,
                    model_digest=model.facts.model_digest,
                    accuracy=model.facts.accuracy,
                    run_id=run_id,
                    reason=model.facts.forced or "",
                    by=by,
                ),
            )
            self._prune(name)
        return Pushed(folder / str(version), version, f"pushed as version {version}", new=True)

    def rollback(
        self, store: Store, name: str, version: int | None, *, reason: str, by: str, run_id: str
    ) -> HistoryEntry:
        """Make an earlier version the champion again, once it is verified. Nothing is copied or deleted.

        A run rolls back only once: if it is repeated, the entry that it made is returned.

        Args:
            store: Holds the artifact that the version is verified against.
            name: The model's name.
            version: The version; None for `previous`.
            reason: Why; it is recorded in the history.
            by: The user who asked for it.
            run_id: The run that does it.

        Returns:
            The run's entry of the history, its last.

        Raises:
            RegistryError: If no reason is given, or the version does not exist, is the champion already, or has
                files or responses that differ from what was pushed.
            ArtifactError: If the artifact is missing or damaged.
            StoreError: If the folder can't be written.
        """
        if not reason.strip():
            raise RegistryError("Expected a reason for the rollback; received none. Give one for the history.")
        self.known_history(name)
        with self._locked(name):
            champion = self.known_history(name)[-1]
            if (champion.action, champion.run_id) == ("rollback", run_id):
                return champion
            target = self.previous(name) if version is None else self._entry(name, version)
            if target is None:
                raise RegistryError(
                    f"Expected another model of {name} that was champion before version {champion.version}; received "
                    f"none. There {self._present(name)}. Name the version to roll back to."
                )
            if target.version == champion.version:
                raise RegistryError(
                    f"Expected a version of {name} other than the champion; received {target.version}, which is the "
                    f"champion. There {self._present(name)}."
                )
            self.verify(store, name, target.version)
            now = {"action": "rollback", "at": datetime.now(UTC), "reason": reason.strip(), "by": by, "run_id": run_id}
            entry = target.model_copy(update=now)
            self._make_champion(name, entry)
        return entry

    # --- internals

    def _lines(self, name: str) -> list[str]:
        path = self.root / name / "history.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [line for line in text.split("\n") if line]  # not splitlines: a reason may hold other separators

    def _entry(self, name: str, version: int | None) -> HistoryEntry:
        """Return the entry of the push of a version that is still there; the champion's if None."""
        history = self.known_history(name)
        wanted = history[-1].version if version is None else version
        entry = next((entry for entry in history if entry.version == wanted), None)
        if entry is None or wanted not in self.versions(name):
            what = "does not exist" if entry is None else "was deleted"
            raise RegistryError(
                f"Expected a version of {name}; received {wanted}, which {what}. There {self._present(name)}."
            )
        return entry

    def _present(self, name: str) -> str:
        versions = self.versions(name)
        return f"{'is version' if len(versions) == 1 else 'are versions'} {', '.join(map(str, versions)) or 'none'}"

    @contextmanager
    def _locked(self, name: str) -> Iterator[Path]:
        """Yield a model's folder, for this process alone to change."""
        folder = self.root / name
        with translate_os_errors("write to", self.root):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                for leftovers in [*folder.glob(".push-*"), *folder.glob(".pruned-*")]:  # of a killed process
                    shutil.rmtree(leftovers, ignore_errors=True)
                yield folder

    def _make_champion(self, name: str, entry: HistoryEntry) -> None:
        lines = [*self._lines(name), entry.model_dump_json()]
        _replace(self.root / name / "history.jsonl", "".join(f"{line}\n" for line in lines))
        self._publish(name)

    def _publish(self, name: str) -> None:
        """Write the files for other readers from the history."""
        _replace(self.root / name / "champion.json", json.dumps({"version": self.history(name)[-1].version}) + "\n")
        with FileLock(self.root / ".lock"):
            configs = []
            for model in self.model_names():
                try:
                    version = self.history(model)[-1].version
                except StoreError as error:  # TF Serving keeps the version that it served last
                    log.error("%s", error)
                    pointer = self.root / model / "champion.json"
                    try:
                        version = int(json.loads(pointer.read_text(encoding="utf-8"))["version"])
                    except (OSError, ValueError, KeyError, TypeError):
                        log.error(
                            "models.config leaves out %s until its history is restored: its champion is unknown", model
                        )
                        continue
                base_path = f"{self.base_path.rstrip('/')}/{model}"
                configs.append(
                    MODEL_CONFIG.format(name=json.dumps(model), base_path=json.dumps(base_path), version=version)
                )
            _replace(self.root / "models.config", f"model_config_list {{\n{''.join(configs)}}}\n")

    def _prune(self, name: str) -> None:
        """Delete old versions; each is first hidden by one rename."""
        needed = {entry.version for entry in (self.champion(name), self.previous(name)) if entry}
        for version in self.versions(name)[: -self.keep_versions]:
            if version not in needed:
                hidden = self.root / name / f".pruned-{uuid.uuid4().hex}"
                (self.root / name / str(version)).rename(hidden)
                shutil.rmtree(hidden, ignore_errors=True)
                log.info("%s: deleted version %d; the newest %d are kept", name, version, self.keep_versions)


def _succession(history: list[HistoryEntry]) -> Iterator[HistoryEntry]:
    """Yield the champion, the champion that it replaced when its version was pushed, and so on."""
    while history:
        yield history[-1]
        pushed = next(i for i, entry in enumerate(history) if entry.version == history[-1].version)
        history = history[:pushed]


def _replace(path: Path, text: str) -> None:
    """Replace a file by one rename, so that no reader sees half of it, even after a kill."""
    if path.exists() and path.read_bytes() == text.encode():
        return  # on a full disk, an unchanged file needs no space
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


def _serves(folder: Path, model: PushedModel) -> bool:
    """Return whether a version's folder holds a model's files and no others, byte for byte."""
    prefix = "saved_model/"
    files = {n.removeprefix(prefix): e for n, e in model.manifest.files.items() if n.startswith(prefix)}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found == files.keys() and all(file_entry(folder / name) == entry for name, entry in files.items())


def _check(folder: Path, model: PushedModel) -> None:
    """Check in a fresh process that a folder serves the evaluation's own predictions."""
    try:
        check(folder, model.check, model.facts.class_names)
    except ServingError as error:
        raise RegistryError(f"{error} Nothing was changed; the champion is unchanged.") from error
