"""The registry: published versions of a model in TF Serving's layout, the champion, the history."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from ridgeline import files
from ridgeline.artifacts.base import ArtifactError, FileEntry, different_files, digest_of, file_entry, is_os_file
from ridgeline.artifacts.dataset import same_dataset
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.pushed_model import (
    CARD_HTML,
    CARD_MARKDOWN,
    EXTRA,
    IMAGES,
    PushedModel,
    PushedModelFacts,
    read_form,
)
from ridgeline.component import StepError
from ridgeline.decisions import Decision
from ridgeline.history import (
    CHAMPION,
    COPY,
    DONE,
    HISTORY,
    Action,
    HistoryEntry,
    Lines,
    Serving,
    canary,
    champion,
    champions,
    joined,
    merge,
    parse,
    pointed,
    rebuild,
    serving,
    split_lines,
)
from ridgeline.model_function import function_digest
from ridgeline.serving_check import ServingError, check
from ridgeline.store import Store, StoreError, translate_os_errors

log = logging.getLogger(__name__)

# A version is not deleted while a server may still load it: for this long after it was the champion.
STILL_LOADED = timedelta(minutes=10)
PUSH_ATTEMPTS = 10  # while other hosts push, too

MODEL_CONFIG = """\
  config {{
    name: {name}
    base_path: {base_path}
    model_platform: "tensorflow"
    model_version_policy {{ specific {{ {versions} }} }}
{labels}  }}
"""
LABEL = '    version_labels {{ key: "{label}" value: {version} }}\n'
STABLE, CANARY = "stable", "canary"


class RegistryError(RuntimeError):
    """A version is missing or serves other predictions than its evaluation, or a request is refused."""


class HistoryChangedError(RegistryError):
    """Another host changed a model's history meanwhile. Nothing was changed."""


class OtherDatasetError(RegistryError, StepError):
    """A model of one dataset was to be pushed under a name that serves another."""


@dataclass(frozen=True)
class PushDecision:
    """Whether a model is to be pushed.

    Attributes:
        push: True if it is.
        repair: True if it is because other files of the champion are served.
        reason: Why it is not, as a sentence; empty if it is.
        unchanged: True if it is not, because it is served already.
    """

    push: bool
    reason: str = ""
    unchanged: bool = False
    repair: bool = False


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push.

    Attributes:
        place: The folder, or the URL, of the version that is served now.
        version: Its number.
        reason: What was done and why, as a sentence.
        new: False if nothing was pushed.
        unchanged: True if nothing was pushed because the model is served already.
        share: The share of the requests that it answers as a canary; 0 if it is the champion.
    """

    place: str
    version: int
    reason: str
    new: bool
    unchanged: bool = False
    share: float = 0.0


class Registry:
    """The served models.

    On disk::

        <root>/models.config                TF Serving's own configuration: each model's champion, and its canary
        <root>/<model name>/<version>/      SavedModel and model card; integers that only grow, never rewritten
        <root>/<model name>/history.jsonl   one `HistoryEntry` a line, append-only; see `ridgeline.history`
        <root>/<model name>/history-copy.jsonl   the same lines, from which a damaged history is repaired
        <root>/<model name>/champion.json   {"version": 3}, with a canary {"version": 3, "canary": {"version": 4,
                                            "share": 0.1}}: the same, for servers
        <root>/<model name>/.push-<version>/   being copied and checked; TF Serving ignores it
        <root>/<model name>/.pruned-<id>/   being deleted

    The history decides: with its new line, a push or a rollback is done. All else follows from it, the name of the
    pushed folder, too. If a process is killed before, the next one that may write undoes or completes what it began.

    Attributes:
        root: The serving folder.
        place: What people know it by.

    Args:
        root: The serving folder, on a local file system.
        keep_versions: How many of the newest versions of a model a push keeps. The champion and the version that it
            would be rolled back to are also kept.
        base_path: The serving folder as TF Serving sees it; `root` if None.
        store: Its artifacts tell what a model computes, and its records what a damaged history held. Without it, a
            model is recognized by its digest alone.
    """

    def __init__(
        self, root: Path, keep_versions: int = 10, base_path: str | None = None, store: Store | None = None
    ) -> None:
        self.root = root
        self.place = str(root)
        self.keep_versions = keep_versions
        self.base_path = base_path or str(root.absolute())
        self.store = store
        self._functions: dict[str, str] = {}

    # --- queries

    def model_names(self) -> list[str]:
        """Return the names of the models that were ever pushed."""
        found = {path.parent.name for name in (HISTORY, COPY, CHAMPION) for path in self.root.glob(f"*/{name}")}
        return sorted(found)

    def history(self, name: str) -> list[HistoryEntry]:
        """Return a model's history, oldest first; empty if it was never pushed.

        Damaged and missing lines are filled in, see `recover`.

        Raises:
            StoreError: If nothing tells what it was.
        """
        return [parse(line) for line in self._lines(name)[0]]

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

    def serving(self, name: str) -> Serving | None:
        """Return what of a model is served; None if the model was never pushed.

        A change counts once its folder is in place, a moment after the history has it.

        Args:
            name: The model's name.

        Raises:
            StoreError: If nothing tells it.
        """
        if found := pointed(self.root / name):
            return found
        found = serving(self.history(name))
        return found if found and found.champion in self.versions(name) else None  # the first push is not done yet

    def folder(self, name: str, version: int) -> Path:
        """Return the local folder of a version's files, whether or not it exists.

        Args:
            name: The model's name.
            version: The version.
        """
        return self.root / name / str(version)

    def place_of(self, name: str, version: int) -> str:
        """Return the folder of a version as people know it.

        Args:
            name: The model's name.
            version: The version.
        """
        return f"{self.place}/{name}/{version}"

    def expect_whole(self, name: str, version: int) -> None:
        """Check that a version's folder holds the files that were pushed, as far as the history or the store tells it.

        Args:
            name: The model's name.
            version: The version.

        Raises:
            RegistryError: If there is no such version, or its files differ.
        """
        try:
            entry = self.entry(name, version)
        except StoreError:  # the history is lost, or of a later release
            return
        if not self._was_pushed(self.folder(name, version), entry):
            place = self.place_of(name, version)
            raise RegistryError(f"Expected {place} to hold the files that were pushed; received others.")

    def champion(self, name: str) -> HistoryEntry | None:
        """Return the entry that made the champion, or None if there is none."""
        return champion(self.history(name))

    def baseline(self, name: str, model_digest: str) -> HistoryEntry | None:
        """Return the champion that a model is to be compared with, or None.

        It is the present champion. If the model is the champion itself, it is the champion that the model replaced.
        So an unchanged run makes the same comparison as the run before, and is reused.

        Args:
            name: The model's name.
            model_digest: Digest of the model that is compared.
        """
        history = self.history(name)
        own = self._twins(history, model_digest)
        return next((e for e in _succession(history) if e.model_digest not in own), None)

    def champions(self, name: str) -> Iterator[HistoryEntry]:
        """Yield the champion, the champion that it replaced when its version was pushed, and so on.

        Args:
            name: The model's name.
        """
        return _succession(self.history(name))

    def entries_of(self, name: str, model_digest: str) -> list[HistoryEntry]:
        """Return the entries of the history that are about a model, or about one that computes the same.

        Args:
            name: The model's name.
            model_digest: Digest of the model.
        """
        history = self.history(name)
        own = self._twins(history, model_digest)
        return [entry for entry in history if entry.model_digest in own]

    def previous(self, name: str) -> HistoryEntry | None:
        """Return the entry of the default rollback: that of the last other model that the champion replaced.

        Versions that were rolled back from are left out.
        """
        history, present = self.history(name), self.versions(name)
        own = self._twins(history, champions(history)[-1].model_digest) if history else set()
        others = (e for e in _succession(history) if e.model_digest not in own)
        return next((e for e in others if e.version in present), None)

    def entry(self, name: str, version: int | None) -> HistoryEntry:
        """Return the entry of the push of a version.

        Args:
            name: The model's name.
            version: The version; the champion if None.

        Raises:
            RegistryError: If there is no such model or version, or the version was deleted.
        """
        history = self.known_history(name)
        wanted = champions(history)[-1].version if version is None else version
        entry = next((entry for entry in history if entry.version == wanted), None)
        if entry is None or wanted not in self.versions(name):
            what = "does not exist" if entry is None else "was deleted"
            raise RegistryError(
                f"Expected a version of {name}; received {wanted}, which {what}. There {self._present(name)}."
            )
        return entry

    def facts(self, entry: HistoryEntry) -> PushedModelFacts | None:
        """Return what is known of the model of an entry, such as its size; None if its artifact can't be read.

        Args:
            entry: An entry of a history.
        """
        if self.store is None:
            return None
        try:
            return PushedModelFacts.model_validate(self.store.manifest(entry.artifact).facts)
        except (ArtifactError, ValidationError):
            return None

    def open_version(self, store: Store, name: str, version: int | None = None) -> tuple[HistoryEntry, PushedModel]:
        """Return the entry of a version's push, and its artifact, whose files the version's folder holds.

        Args:
            store: Holds the artifact.
            name: The model's name.
            version: The version; the champion if None.

        Raises:
            RegistryError: If there is no such version, or its files differ.
            ArtifactError: If the artifact is missing or damaged.
        """
        entry = self.entry(name, version)
        model = store.open(entry.artifact, PushedModel)
        if different := _different(self.folder(name, entry.version), model):
            place = self.place_of(name, entry.version)
            raise RegistryError(
                f"Expected {place} to hold the files of {entry.artifact}, byte for byte; they were changed: "
                f"{', '.join(different)}. Roll back to another version; the next run of the pipeline "
                "pushes a damaged champion again."
            )
        return entry, model

    def card(self, name: str, version: int) -> Path | None:
        """Return the model card of a version, in HTML; None if it has none, as versions of earlier releases.

        Args:
            name: The name of a model that was pushed.
            version: The version.
        """
        if version not in self.versions(name):
            return None
        card = self.folder(name, version) / EXTRA / CARD_HTML
        return card if card.exists() else None

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
        entry, model = self.open_version(store, name, version)
        _check(self.folder(name, entry.version), model)
        return entry

    def decide_push(self, model: PushedModel, by: str = "") -> PushDecision:
        """Decide whether a model is to be pushed.

        The first rule that holds decides. A model is recognized by what it computes, however often it was trained and
        evaluated.

        =====================================================  ===================================================
        a person gave a reason by which it was never pushed    pushed: a reason counts once for a model
        it is the champion's model                             not pushed, unless other files are served or a file is
                                                               damaged; another model card alone is no reason,
                                                               another preparation of images is one
        a canary was neither promoted nor aborted yet          not pushed
        it was judged against another model than the champion  not pushed: the champion may be better
        it was champion until somebody rolled back from it     not pushed: that would undo the rollback
        it was a canary until somebody aborted it              not pushed: that would undo the abort
        it was a canary until somebody rolled back             not pushed: that would undo the rollback
        it was champion, was replaced; the run is scheduled     not pushed: that would undo what a person pushed
        else                                                   pushed
        =====================================================  ===================================================

        Args:
            model: The servable model.
            by: The user who asks for the push; empty for a scheduled run.
        """
        name, facts = model.facts.model_name, model.facts
        history = self.history(name)
        twins = self._twins(history, facts.model_digest)
        own = [i for i, entry in enumerate(history) if entry.model_digest in twins]
        used = {history[i].reason for i in own if history[i].action in ("push", "canary")}
        if not history or (facts.forced and facts.forced not in used):
            return PushDecision(True)
        champion, pending = champions(history)[-1], canary(history)
        if champion.model_digest in twins:
            folder = self.folder(name, champion.version)
            different = _different(folder, model)
            if different and not (
                _same_but_for_the_card(folder, model, different) and self._was_pushed(folder, champion)
            ):
                return PushDecision(True, repair=True)
            return PushDecision(False, f"version {champion.version} serves this model already", unchanged=True)
        if pending:
            unchanged = pending.model_digest in twins
            whose = "this model already" if unchanged else f"another model since {pending.at:%Y-%m-%d}"
            advice = f"`ridgeline models promote {name} {pending.version} --reason ...` or `abort` decides about it"
            return PushDecision(
                False, f"version {pending.version} is a canary of {whose}; {advice}", unchanged=unchanged
            )
        if facts.champion not in self._twins(history, champion.model_digest):
            judged = f"against model {facts.champion[:12]}" if facts.champion else "without a champion"
            return PushDecision(
                False,
                f"this model was judged {judged}, but the champion is model {champion.model_digest[:12]}, "
                f"version {champion.version}; judge it again",
            )
        if not own:
            return PushDecision(True)
        left, later = history[own[-1]], history[own[-1] + 1 :]
        successor = next((e for e in later if e.makes_champion), left)
        if left.action == "abort":
            end = f"was aborted as a canary on {left.at:%Y-%m-%d}: {left.reason}"
        elif successor.action == "rollback":
            what = "ended as a canary by a rollback" if left.action == "canary" else "rolled back from"
            end = f"was {what} on {successor.at:%Y-%m-%d}: {successor.reason}"
        elif not by:
            end = f"was replaced by version {successor.version} on {successor.at:%Y-%m-%d}, and this run is scheduled"
        else:
            return PushDecision(True)
        if left.version in self.versions(name):
            advice = f"`ridgeline models rollback {name} {left.version} --reason ...` serves it again"
        else:
            advice = "a run that forces it with another reason pushes it again"
        return PushDecision(False, f"version {left.version} served this model and {end}; {advice}")

    # --- changes

    def push(
        self,
        model: PushedModel,
        run_id: str,
        by: str = "",
        canary_share: float = 0.0,
        approval: Decision | None = None,
    ) -> Pushed:
        """Serve a model: copy it, check the copy in a fresh process, append to the history, rename it into place.

        Nothing is done if `decide_push` refuses. It becomes the champion, or a canary if a share is given and there is
        a champion. A canary continues if the push repairs the champion, and ends otherwise. After a push, old versions
        are deleted.

        Args:
            model: The servable model.
            run_id: The pipeline run that pushes it.
            by: The user who asked for it, if one did.
            canary_share: The share of the requests that it answers as a canary, 0 to below 1; 0 for a champion.
            approval: Who approved the push and why, for the history; None if it needed no approval.

        Returns:
            The version that is served now: a new one, or the champion if nothing was pushed.

        Raises:
            OtherDatasetError: If the name serves models of another dataset.
            RegistryError: If the copy does not serve the evaluation's own predictions.
            StoreError: If the folder can't be written.
        """
        for _ in range(PUSH_ATTEMPTS - 1):
            try:
                return self._push(model, run_id, by, canary_share, approval)
            except HistoryChangedError as error:
                log.info("%s", error)
        return self._push(model, run_id, by, canary_share, approval)

    def _push(self, model: PushedModel, run_id: str, by: str, canary_share: float, approval: Decision | None) -> Pushed:
        name = model.facts.model_name
        with self._locked(name) as folder:
            history = self.history(name)
            self._expect_same_dataset(model, history)
            decision = self.decide_push(model, by)
            if not decision.push:
                version = champions(history)[-1].version
                place = self.place_of(name, version)
                reason = f"not pushed: {decision.reason}"
                return Pushed(place, version, reason, new=False, unchanged=decision.unchanged)
            version = self._new_version(name, history)
            staging = folder / f".push-{version}"
            try:
                shutil.copytree(model.saved_model, staging, ignore=lambda _, names: list(filter(is_os_file, names)))
                _check(staging, model)
                self._keep(name, version, staging)
            except BaseException:
                self._discard(name, version, staging)
                raise
            share = canary_share if history and not decision.repair else 0.0
            action: Action = "canary" if share else "push"
            entry = self._push_entry(model, version, run_id)
            approved_by, why = (approval.answered_by, "; ".join(approval.reasons)) if approval else ("", "")
            who = {"by": by, "run_id": run_id}
            entry = entry.again(action, reason=entry.reason, share=share, approved_by=approved_by, approval=why, **who)
            entries = [entry]
            if decision.repair and (pending := canary(history)):
                reason = (
                    f"it continues: version {version} repairs the champion, version {champions(history)[-1].version}"
                )
                entries.append(pending.again("canary", reason=reason, share=pending.share, **who))
            try:
                self._append(name, *entries)
            except HistoryChangedError:
                self._discard(name, version, staging)
                raise
            self._prune(name)
        what = f"pushed as version {version}{f', a canary for {share:.3g} of the requests' if share else ''}"
        return Pushed(self.place_of(name, version), version, what, new=True, share=share)

    def rollback(
        self, store: Store, name: str, version: int | None, *, reason: str, by: str, run_id: str
    ) -> HistoryEntry:
        """Make an earlier version the champion again, once it is verified. Nothing is copied or deleted.

        A run rolls back only once: if it is repeated, the entry that it made is returned, or the repetition is refused
        because another version was made champion since.

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
            RegistryError: If no reason is given, the run rolled back before the last change, or the version does not
                exist, is the champion already, or has files or responses that differ from what was pushed.
            ArtifactError: If the artifact is missing or damaged.
            StoreError: If the folder can't be written.
        """
        with self._change(name, "rollback", reason, run_id) as (history, done):
            if done:
                return done
            champion = champions(history)[-1]
            target = self.previous(name) if version is None else self.entry(name, version)
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
            entry = target.again("rollback", reason=reason.strip(), by=by, run_id=run_id)
            self._append(name, entry)
        return entry

    def start_canary(
        self, store: Store, name: str, version: int | None, share: float, *, reason: str, by: str, run_id: str
    ) -> HistoryEntry:
        """Let a version answer a share of the requests beside the champion, or change the share of the canary.

        Servers that know the share send it that part of the requests that name neither a version nor a label. It ends
        with any further change: `promote`, `abort`, a rollback, or a push that a person forces.

        Args:
            store: Holds the artifact that the version is verified against.
            name: The model's name.
            version: The version; None for the present canary.
            share: Of the requests, above 0, below 1.
            reason: Why; it is recorded in the history.
            by: The user who asked for it.
            run_id: The run that does it; it does so once.

        Returns:
            The run's entry of the history, its last.

        Raises:
            RegistryError: If no reason is given, the share is out of its range, the version does not exist, is the
                champion, or has files or responses that differ from what was pushed, or another version is a canary.
            ArtifactError: If the artifact is missing or damaged.
            StoreError: If the folder can't be written.
        """
        if not 0 < share < 1:
            raise RegistryError(f"Expected a share above 0 and below 1; received {share}. Give one such as 0.1.")
        with self._change(name, "canary", reason, run_id) as (history, done):
            if done:
                return done
            pending, champion = canary(history), champions(history)[-1]
            if version is None and pending is None:
                raise RegistryError(
                    f"Expected a version, since {name} has no canary; received none. There {self._present(name)}."
                )
            target = self.entry(name, pending.version if version is None and pending else version)
            if pending and target.version != pending.version:
                raise RegistryError(
                    f"Expected no other canary of {name} than version {pending.version}; received {target.version}. "
                    f"Promote or abort version {pending.version} first."
                )
            if target.version == champion.version:
                raise RegistryError(
                    f"Expected a version of {name} other than the champion; received {target.version}, which is the "
                    f"champion. There {self._present(name)}."
                )
            self.verify(store, name, target.version)
            entry = target.again("canary", reason=reason.strip(), by=by, run_id=run_id, share=share)
            self._append(name, entry)
        return entry

    def promote(
        self, store: Store, name: str, version: int | None = None, *, reason: str, by: str, run_id: str
    ) -> HistoryEntry:
        """Make the canary the champion, once it is verified.

        Args:
            store: Holds the artifact that the version is verified against.
            name: The model's name.
            version: The version, which must be the present canary; None for whatever version that is.
            reason: Why; it is recorded in the history.
            by: The user who asked for it.
            run_id: The run that does it; it does so once.

        Returns:
            The run's entry of the history, its last.

        Raises:
            RegistryError: If no reason is given, there is no canary, another version is, or its files or responses
                differ from what was pushed.
            ArtifactError: If the artifact is missing or damaged.
            StoreError: If the folder can't be written.
        """
        return self._end_canary("promote", name, version, reason, by, run_id, store)

    def abort(self, name: str, version: int | None = None, *, reason: str, by: str, run_id: str) -> HistoryEntry:
        """End the canary: the champion answers all requests again. The version stays.

        Args:
            name: The model's name.
            version: The version, which must be the present canary; None for whatever version that is.
            reason: Why; it is recorded in the history.
            by: The user who asked for it.
            run_id: The run that does it; it does so once.

        Returns:
            The run's entry of the history, its last.

        Raises:
            RegistryError: If no reason is given, there is no canary, or another version is.
            StoreError: If the folder can't be written.
        """
        return self._end_canary("abort", name, version, reason, by, run_id)

    def _end_canary(
        self,
        action: Action,
        name: str,
        version: int | None,
        reason: str,
        by: str,
        run_id: str,
        store: Store | None = None,
    ) -> HistoryEntry:
        """End the canary, once it is verified if a store is given."""
        with self._change(name, action, reason, run_id) as (history, done):
            if done:
                return done
            pending = canary(history)
            if pending is None:
                raise RegistryError(
                    f"Expected a canary of {name} to {action}; there is none: version "
                    f"{champions(history)[-1].version} answers all requests."
                )
            if version not in (None, pending.version):
                raise RegistryError(
                    f"Expected the present canary of {name}, version {pending.version}; received {version}. Name "
                    f"version {pending.version} to {action} it."
                )
            if store:
                self.verify(store, name, pending.version)
            entry = pending.again(action, reason=reason.strip(), by=by, run_id=run_id)
            self._append(name, entry)
        return entry

    # --- internals

    @contextmanager
    def _change(
        self, name: str, action: Action, reason: str, run_id: str
    ) -> Iterator[tuple[list[HistoryEntry], HistoryEntry | None]]:
        """Yield a model's history, for this process alone to change, and the run's entry if the run was repeated.

        Raises:
            RegistryError: If no reason is given, or the run did this before the last change.
        """
        if not reason.strip():
            raise RegistryError("Expected a reason; received none. Give one for the history.")
        if reason != reason.encode(errors="replace").decode():
            raise RegistryError(f"Expected a reason in UTF-8; received {reason!r}. Type it again.")
        self.known_history(name)
        with suppress(StoreError):  # a store that can't be written can still be read
            if self.store:
                self.store.clear_leftovers()
        with self._locked(name):
            history = self.known_history(name)
            done = next((entry for entry in history if (entry.action, entry.run_id) == (action, run_id)), None)
            if done and done != history[-1]:
                raise RegistryError(
                    f"Expected a run that did not change {name} yet; received {run_id}, which {DONE[action]} version "
                    f"{done.version} on {done.at:%Y-%m-%d}; version {history[-1].version} was changed since. Start a "
                    "new run."
                )
            yield history, done

    def _lines(self, name: str) -> tuple[list[str], str]:
        """Return the lines of a model's history, and what had to be repaired; empty if nothing.

        A damaged or missing line comes from the copy. What the copy lacks, too, comes from the version folders, the
        records of the runs that pushed them, and the pointer to the champion.

        Raises:
            StoreError: If nothing is left of a history.
        """
        folder = self.root / name
        own, copy, exists = self._read_lines(name)
        if own is copy and own.lines and not own.damaged:
            return own.valid, ""
        # the copy may hold another text of the same entry
        texts = {(entry.at, entry.version): line for line in own.valid for entry in [parse(line)]}
        copied = [(parse(line), line) for line in copy.valid]
        lines = merge(own.valid, [texts.get((entry.at, entry.version), line) for entry, line in copied])
        lost = not own.valid and exists
        if not own.damaged and not lost and lines == own.valid:
            return lines, ""
        total = max(len(own.lines), len(copy.lines))
        if len(lines) < total or not lines:  # the copy does not have them all
            known = {parse(line): line for line in lines}
            left = own.lines if lines == own.valid else [*lines, *[None] * (total - len(lines))]
            entries = rebuild(
                [parse(line) if line else None for line in left],
                self.versions(name),
                pointed(folder),
                lambda version: self._recorded_push(name, version),
            )
            lines = [known.get(entry) or entry.line() for entry in entries]
        if not lines:
            raise StoreError(
                f"Expected a history entry in each line of {folder / HISTORY}; received none that can be read, and "
                f"neither {COPY} nor the records of runs tell what it held. Restore the file from a backup."
            )
        noun = "line" if len(own.damaged) == 1 else "lines"
        number = f"{noun} {', '.join(map(str, own.damaged))} damaged" if own.damaged else "lines missing"
        missing = total - len(lines)
        gone = f"; {missing} could not be restored" if missing > 0 else ""
        return lines, f"{number}, {len(lines) - len(own.valid)} restored{gone}"

    def _read_lines(self, name: str) -> tuple[Lines, Lines, bool]:
        """Return what a model's history and its copy hold, and whether the model was ever pushed."""
        folder = self.root / name
        content = _content(folder / HISTORY)
        own = split_lines(content, folder / HISTORY)
        with suppress(FileNotFoundError):  # whole lines of this length miss nothing; `recover` compares the bytes
            if content and not own.damaged and (folder / COPY).stat().st_size == len(content):
                return own, own, True
        copied = _content(folder / COPY)
        copy = own if copied == content else split_lines(copied, folder / COPY)
        return own, copy, bool(own.lines) or (folder / HISTORY).exists() or (folder / CHAMPION).exists()

    def _recorded_push(self, name: str, version: int) -> HistoryEntry | None:
        """Return the entry of a version's push as the record of the run tells it that made the version's files."""
        if self.store is None:
            return None
        for execution in self.store.executions():
            ref = execution.output or ""
            if execution.state == "complete" and ref.startswith(f"{PushedModel.__name__}/"):
                try:
                    model = self.store.open(ref, PushedModel)
                except ArtifactError:
                    continue
                if model.facts.model_name == name and not _different(self.folder(name, version), model):
                    at = execution.started_at + timedelta(seconds=execution.seconds)
                    return self._push_entry(model, version, execution.run_id).model_copy(update={"at": at})
        return None

    def _push_entry(self, model: PushedModel, version: int, run_id: str) -> HistoryEntry:
        return HistoryEntry(
            version=version,
            action="push",
            artifact=model.ref,
            model_digest=model.facts.model_digest,
            accuracy=model.facts.accuracy,
            run_id=run_id,
            reason=model.facts.forced or "",
            computes=self._function(model.facts.model_digest),
            files=_files_digest(_saved_model_files(model)),
            dataset=model.facts.dataset,
        )

    def _expect_same_dataset(self, model: PushedModel, history: list[HistoryEntry]) -> None:
        """Refuse a model of another dataset than the champion's, as far as both are known."""
        served = history and (history[-1].dataset or self._dataset(history[-1].model_digest))
        own = model.facts.dataset or self._dataset(model.facts.model_digest)
        if served and own and not same_dataset(served, own):
            raise OtherDatasetError(
                f"Expected a model of the dataset {served}, which is served as {model.facts.model_name}; received one "
                f"of {own}. Give this dataset a name of its own: it gets its own champion and history."
            )

    def _dataset(self, model_digest: str) -> str:
        """Return the name of the dataset that a model of the store was trained on; empty if it can't be read."""
        try:
            return self.store.open(f"{Model.__name__}/{model_digest}", Model).facts.dataset if self.store else ""
        except (ArtifactError, OSError):
            return ""

    def _function(self, model_digest: str) -> str:
        """Return the digest of what a model of the store computes; empty if it can't be read."""
        if self.store is None:
            return ""
        if model_digest not in self._functions:
            try:
                model = self.store.open(f"{Model.__name__}/{model_digest}", Model)
                self._functions[model_digest] = function_digest(model)
            except (ArtifactError, OSError):
                self._functions[model_digest] = ""
        return self._functions[model_digest]

    def _twins(self, history: list[HistoryEntry], model_digest: str) -> set[str]:
        """Return the digests of the models in a history that compute the same as a model, with its own."""
        recorded = {entry.model_digest: entry.computes for entry in history if entry.computes}
        if not (function := recorded.get(model_digest) or self._function(model_digest)):
            return {model_digest}
        others = {entry.model_digest for entry in history}
        return {model_digest} | {d for d in others if (recorded.get(d) or self._function(d)) == function}

    def _present(self, name: str) -> str:
        versions = self.versions(name)
        return f"{'is version' if len(versions) == 1 else 'are versions'} {', '.join(map(str, versions)) or 'none'}"

    @contextmanager
    def _locked(self, name: str, timeout: float = -1) -> Iterator[Path]:
        """Yield a model's folder, for this process alone to change, after what killed processes left is put right."""
        folder = self.root / name
        with translate_os_errors("write to", self.root):
            files.make_folder(folder)
            with FileLock(folder / ".lock", timeout=timeout):
                self._repair(name)
                yield folder

    def recover(self) -> None:
        """Put right what killed processes, power cuts and damage left, as far as this process may write.

        A push or rollback that was killed is undone or completed, damaged lines of a history are restored, and the
        damaged file is kept beside it. A model that another process changes meanwhile is left to that process.
        """
        for lock_file in self.root.glob("*/.lock"):  # also where the first push was killed
            try:
                with suppress(Timeout), self._locked(lock_file.parent.name, timeout=0):
                    pass
            except (StoreError, OSError) as error:
                log.warning("%s", error)

    def adopt(self, name: str, lines: list[str]) -> None:
        """Take over the history of a model from another registry; the caller holds the lock of the model's folder.

        Args:
            name: The model's name, whose versions' folders are in place.
            lines: The lines of its history.
        """
        _update(self.root / name / HISTORY, joined(lines))
        self._follow(name)

    def _repair(self, name: str) -> None:
        """Make all files of a model follow its history; the caller holds the model's lock."""
        folder = self.root / name
        lines, problem = self._lines(name)
        if problem:
            if (folder / HISTORY).exists():
                kept = folder / f"{HISTORY}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
                shutil.copyfile(folder / HISTORY, kept)
                files.flush(kept)
                problem += f"; the damaged file is {kept.name}"
            files.write(folder / HISTORY, joined(lines))
            log.warning("repaired the history of %s: %s", name, problem)
        for leftover in [*folder.glob(".pruned-*"), *(folder / f".{file}" for file in (HISTORY, COPY, CHAMPION))]:
            files.remove(leftover)
        self._follow(name, lines)

    def _new_version(self, name: str, history: list[HistoryEntry]) -> int:
        """Return the number of a version that is going to be pushed."""
        return 1 + max([*(entry.version for entry in history), *self.versions(name)], default=0)

    def _keep(self, name: str, version: int, staging: Path) -> None:
        """Make a version that was copied and checked survive; it is not served before the history has it."""
        files.flush_tree(staging)
        files.flush(staging.parent)

    def _discard(self, name: str, version: int, staging: Path) -> None:
        """Delete a version that is not pushed after all."""
        files.remove(staging)

    def _append(self, name: str, *entries: HistoryEntry) -> None:
        files.write(self.root / name / HISTORY, joined([*self._lines(name)[0], *(entry.line() for entry in entries)]))
        self._follow(name)

    def _follow(self, name: str, lines: list[str] | None = None) -> None:
        """Rename or delete what a push prepared, and write the files that repeat the history; it is read if None."""
        folder = self.root / name
        lines = self._lines(name)[0] if lines is None else lines
        history = [parse(line) for line in lines]
        for staging in folder.glob(".push-*"):
            version = staging.name.removeprefix(".push-")
            if any(str(entry.version) == version for entry in history) and not (folder / version).exists():
                files.move(staging, folder / version)
            else:
                files.remove(staging)
        if history:
            _update(folder / COPY, joined(lines))
            served = serving(history)
            assert served  # a push made a champion, or `rebuild` did
            pointer: dict[str, Any] = {"version": served.champion}
            if served.canary:
                pointer["canary"] = {"version": served.canary, "share": served.share}
            _update(folder / CHAMPION, json.dumps(pointer) + "\n")
            self._write_models_config({name: served})

    def _write_models_config(self, known: Mapping[str, Serving]) -> None:
        """Write what TF Serving reads; what is served of models that are not known is read from their histories."""
        with FileLock(self.root / ".lock"):
            files.remove(self.root / ".models.config")  # of a killed process
            configs = []
            for model in self.model_names():
                try:
                    served = known.get(model) or serving(self.history(model))
                except StoreError as error:  # TF Serving keeps the version that it served last
                    log.error("%s", error)
                    served = pointed(self.root / model)
                if served is None:
                    log.error(
                        "models.config leaves out %s until its history is restored: its champion is unknown", model
                    )
                    continue
                base_path = f"{self.base_path.rstrip('/')}/{model}"
                labels = {STABLE: served.champion, CANARY: served.canary} if served.canary else {}
                numbers = labels.values() or [served.champion]
                configs.append(
                    MODEL_CONFIG.format(
                        name=json.dumps(model),
                        base_path=json.dumps(base_path),
                        versions=" ".join(f"versions: {number}" for number in numbers),
                        labels="".join(LABEL.format(label=k, version=v) for k, v in labels.items()),
                    )
                )
            _update(self.root / "models.config", f"model_config_list {{\n{''.join(configs)}}}\n")

    def _prune(self, name: str) -> None:
        """Delete old versions; each is first hidden by one rename.

        The champion, the canary, the version that would be rolled back to, versions that a server may still load, and
        what was not pushed are left.
        """
        needed = self._needed(name)
        pushes = {entry.version: entry for entry in reversed(self.history(name))}
        for version in [v for v in self.versions(name) if v in pushes][: -self.keep_versions]:
            if version not in needed and self._delete(name, version, pushes[version]):
                log.info("%s: deleted version %d; the newest %d are kept", name, version, self.keep_versions)

    def _needed(self, name: str) -> set[int]:
        """Return the versions that are served, may still be loaded, or would be rolled back to."""
        history = self.history(name)
        needed = {entry.version for entry in (champions(history)[-1], canary(history), self.previous(name)) if entry}
        for entry, successor in [*pairwise(history), *pairwise(champions(history))]:
            if successor.at > datetime.now(UTC) - STILL_LOADED:
                needed.add(entry.version)
        return needed

    def _delete(self, name: str, version: int, pushed: HistoryEntry) -> bool:
        """Delete a version, unless its files are not those that were pushed; return whether it was deleted."""
        folder = self.root / name / str(version)
        if not self._was_pushed(self.folder(name, version), pushed):
            log.warning("%s holds other files than were pushed: it is not deleted. Move it elsewhere.", folder)
            return False
        hidden = self.root / name / f".pruned-{uuid.uuid4().hex}"
        folder.rename(hidden)
        files.flush(self.root / name)
        files.remove(hidden)
        return True

    def _was_pushed(self, folder: Path, entry: HistoryEntry) -> bool:
        """Return whether a version's folder holds what was pushed, as far as that is known."""
        expected = entry.files
        if not expected and self.store:
            with suppress(ArtifactError):
                expected = _files_digest(_saved_model_files(self.store.open(entry.artifact, PushedModel)))
        return not expected or expected == digest_of_folder(folder)


def _succession(history: list[HistoryEntry]) -> Iterator[HistoryEntry]:
    """Yield the champion, the champion that it replaced when its version was pushed, and so on."""
    history = champions(history)
    pushed: dict[int, int] = {}  # the place of each version's first entry
    for place, entry in enumerate(history):
        pushed.setdefault(entry.version, place)
    end = len(history)
    while end:
        yield history[end - 1]
        end = pushed[history[end - 1].version]


def _content(path: Path) -> bytes:
    """Return the content of a file; empty if it is missing."""
    return path.read_bytes() if path.exists() else b""


def _update(path: Path, text: str) -> None:
    """Write a file if its content is another."""
    if not path.exists() or path.read_bytes() != text.encode():
        files.write(path, text)


def _saved_model_files(model: PushedModel) -> dict[str, FileEntry]:
    """Return the files of a model's version, by name."""
    prefix = "saved_model/"
    return {n.removeprefix(prefix): e for n, e in model.manifest.files.items() if n.startswith(prefix)}


def _found(folder: Path) -> dict[str, Path]:
    """Return the files in a version's folder by name, those of operating systems left out."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if not is_os_file(name)}


def digest_of_folder(folder: Path) -> str:
    """Return the digest of the files in a version's folder, those of operating systems left out.

    Args:
        folder: The folder.
    """
    return _files_digest({name: file_entry(path) for name, path in _found(folder).items()})


def _files_digest(entries: dict[str, FileEntry]) -> str:
    return digest_of({name: entry.model_dump() for name, entry in entries.items()})


def _different(folder: Path, model: PushedModel) -> list[str]:
    """Return the names of the files of a version's folder that are not a model's, byte for byte."""
    return different_files(_found(folder), _saved_model_files(model))


def _same_but_for_the_card(folder: Path, model: PushedModel, different: list[str]) -> bool:
    """Return whether a version's folder differs from a model in nothing that a client gets other responses by.

    Folders of earlier releases do not state how to prepare images: the defaults apply.
    """
    if not {f"{EXTRA}/{name}" for name in (CARD_MARKDOWN, CARD_HTML, IMAGES)}.issuperset(different):
        return False
    try:
        forms = [read_form(path, model.facts.image_shape) for path in (folder, model.saved_model)]
    except ArtifactError:
        return False
    return forms[0] == forms[1]


def _check(folder: Path, model: PushedModel) -> None:
    """Check in a fresh process that a folder serves the evaluation's own predictions."""
    try:
        check(folder, model.check, model.facts.class_names)
    except ServingError as error:
        raise RegistryError(f"{error} Nothing was changed; the champion is unchanged.") from error
