"""A registry in an object store: any number of hosts push, and no lock is needed."""

from __future__ import annotations

import json
import logging
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from upath import UPath

from ridgeline import files, object_store
from ridgeline.artifacts.base import file_entry
from ridgeline.artifacts.pushed_model import CARD_HTML, EXTRA
from ridgeline.history import CHAMPION, HISTORY, HistoryEntry, Lines, Serving, champions, joined, parse, split_lines
from ridgeline.history import serving as serving_of
from ridgeline.masking import mask
from ridgeline.registry import (
    PUSH_ATTEMPTS,
    STILL_LOADED,
    HistoryChangedError,
    Registry,
    RegistryError,
    digest_of_folder,
)
from ridgeline.store import Store, StoreError, translate_os_errors

log = logging.getLogger(__name__)

DELETION_SECONDS = 5  # between hiding a version and putting it back, if another host needs it
CLAIM_AGE = timedelta(hours=6)  # a push that takes longer is taken for dead; by the clock of the object store alone


class ObjectRegistry(Registry):
    """The served models, in an object store with conditional writes (S3).

    In the object store::

        <url>/<model name>/history.jsonl      the history; replaced by a conditional write, if nobody else changed it
        <url>/<model name>/<version>/         SavedModel and model card
        <url>/<model name>/<version>.json     their sizes and SHA-256; written last: with it, the version is whole
        <url>/<model name>/<version>.claim    a host is going to push or delete this version; deleted afterwards

    The history decides, as in a folder. A push uploads its version under a number that it claimed by a conditional
    write, then adds its line. If another host changed the history meanwhile, the version is deleted, and the push
    decides again, against the new champion. What a dead host left is deleted after `CLAIM_AGE`.

    Versions that are read are copied into the mirror, and kept equal to the object store's.

    Args:
        url: The root.
        mirror: A local folder, in the layout of a registry.
        keep_versions: As for `Registry`.
        base_path: The mirror as TF Serving sees it; the mirror's path if None.
        store: As for `Registry`.
    """

    def __init__(
        self,
        url: UPath,
        mirror: Path,
        keep_versions: int = 10,
        base_path: str | None = None,
        store: Store | None = None,
    ) -> None:
        super().__init__(mirror, keep_versions, base_path, store)
        self.url = url
        self.place = mask(str(url)).rstrip("/")
        self._held: dict[str, tuple[bytes, str] | None] = {}  # the histories that this process is changing
        self._known: dict[str, tuple[bytes, str]] = {}  # the last ones that were read, by their tags
        self._claimed: dict[tuple[str, int], bytes] = {}  # the content of this process's claims
        self._is_conditional = False

    # --- queries

    def model_names(self) -> list[str]:
        """Return the names of the models that were ever pushed."""
        with self._errors("read"):
            folders = [path.name for path in object_store.entries(self.url) if path.name[0] != "."]
            return sorted(name for name in folders if (self.url / name / HISTORY).exists())

    def versions(self, name: str) -> list[int]:
        """Return the versions that were not deleted, oldest first."""
        with self._errors("read"):
            found = [path.name for path in object_store.entries(self.url / name)]
        return sorted(int(file[:-5]) for file in found if file.endswith(".json") and file[:-5].isdecimal())

    def serving(self, name: str) -> Serving | None:
        """Return what of a model is served; None if the model was never pushed."""
        history = self.history(name)
        return serving_of(history)

    def folder(self, name: str, version: int) -> Path:
        """Return the local folder of a version's files, which are copied from the object store if they changed there.

        Args:
            name: The model's name.
            version: The version.
        """
        with self._errors("read"):
            return self._fetched(name, version)

    def _fetched(self, name: str, version: int, pushed: HistoryEntry | None = None) -> Path:
        """Return a version's folder, copied if its objects changed; with an entry, only if they are what was pushed."""
        target, state = self.root / name / str(version), self.root / name / f".{version}.json"
        source = self.url / name / str(version)
        prefix = f"{source.path.rstrip('/')}/"
        listed = object_store.repeated(lambda: source.fs.find(source.path, detail=True))
        found = {path.removeprefix(prefix): [info["size"], info.get("ETag")] for path, info in listed.items()}
        files.make_folder(target.parent)
        with FileLock(self.root / name / ".fetch.lock"):
            with suppress(OSError, ValueError):
                sizes = {file: (target / file).stat().st_size for file in found}
                if target.exists() and json.loads(state.read_bytes()) == found and sizes == _sizes(found):
                    return target
            for leftover in [*target.parent.glob(".fetch-*"), *target.parent.glob(".pruned-*")]:
                files.remove(leftover)
            fetched = self.root / name / f".fetch-{version}"
            if found:
                fetched.mkdir()
                try:
                    object_store.download(source, fetched, _sizes(found))
                except FileNotFoundError as error:
                    raise RegistryError(
                        f"Expected {self.place_of(name, version)}; another host deleted it meanwhile. Name one of "
                        "`ridgeline models show`."
                    ) from error
                files.flush_tree(fetched)  # here: between the two renames below, the version is missing
            if pushed and not self._was_pushed(fetched, pushed):
                files.remove(fetched)
                raise RegistryError(f"Expected {self.place_of(name, version)} to hold the files that were pushed.")
            files.remove(state)
            hidden = target.with_name(f".pruned-{uuid.uuid4().hex}")
            if found and target.exists() and digest_of_folder(target) == digest_of_folder(fetched):
                files.remove(fetched)  # only its state was missing
            else:
                if target.exists():
                    target.rename(hidden)
                if found:
                    fetched.rename(target)
                files.flush(target.parent)
                files.remove(hidden)
            if found:
                files.write(state, json.dumps(found))
                gone = set() if pushed else set(super().versions(name)) - {version, *self.versions(name)}
                for old in gone:  # `sync` deletes them itself, last
                    files.remove(self.root / name / f".{old}.json")
                    files.remove(self.root / name / str(old))
        return target

    def card(self, name: str, version: int) -> Path | None:
        """Return the model card of a version, in HTML; None if it has none. No other file of the version is copied."""
        card = self.url / name / str(version) / EXTRA / CARD_HTML
        with self._errors("read"):
            if version not in self.versions(name) or not card.exists():
                return None
            copy = self.root / name / ".cards" / f"{version}.html"
            files.make_folder(copy.parent)
            unfinished = copy.with_name(f".{uuid.uuid4().hex}")  # several may be asked for it at the same time
            files.write(copy, card.read_text(encoding="utf-8"), unfinished)
        return copy

    # --- changes

    def recover(self) -> None:
        """Delete what dead hosts left, and restore damaged lines of histories, as far as this process may write."""
        try:
            with self._errors("read"):
                names = [path.name for path in object_store.entries(self.url) if path.name[0] != "."]
        except StoreError as error:
            log.warning("%s", error)
            return
        for name in names:
            try:
                with suppress(Timeout), self._locked(name, timeout=0):
                    pass
            except (StoreError, OSError) as error:
                log.warning("%s", error)
        object_store.abort_uploads(self.url, CLAIM_AGE)

    def sync(self) -> dict[str, Serving]:
        """Make the mirror equal to the registry, for servers that read a folder.

        A version is copied beside its place, compared with what was pushed, and renamed into place. Then history,
        ``champion.json`` and ``models.config`` follow. What was deleted from the registry is deleted last, and not
        within `STILL_LOADED` after another version is served: until a server has read that, it needs the one before.

        Returns:
            What is served, by model.

        Raises:
            StoreError: If the object store can't be read, or the folder can't be written.
            RegistryError: If a served version is missing or has other files than were pushed, or the folder holds a
                registry of its own. Other models are synchronized all the same.
        """
        served, problems = {}, []
        local = Registry(self.root, base_path=self.base_path)
        for name in self.model_names():
            folder = self.root / name
            with translate_os_errors("write to", self.root):
                files.make_folder(folder)
            try:
                with FileLock(folder / ".lock"), self._errors("read"):
                    if (folder / HISTORY).exists() and not any(folder.glob(".[0-9]*.json")):
                        raise RegistryError(
                            f"Expected a folder for local copies alone; received {self.root}, which has a history of "
                            "its own. Name another folder."
                        )
                    lines, present = self._lines(name)[0], self.versions(name)
                    history = [parse(line) for line in lines]
                    now = serving_of(history)
                    assert now  # a push made a champion
                    if missing := {now.champion, now.canary or now.champion}.difference(present):
                        raise RegistryError(
                            f"Expected version {missing.pop()}, which is served; it was deleted. Nothing was changed."
                        )
                    pushes = {entry.version: entry for entry in reversed(history)}
                    for version in present:
                        is_served = version in (now.champion, now.canary)
                        if version in pushes and (is_served or not (folder / str(version)).exists()):
                            self._fetched(name, version, pushes[version])
                    with translate_os_errors("write to", self.root):
                        local.adopt(name, lines)
                        is_new = time.time() - (folder / CHAMPION).stat().st_mtime < STILL_LOADED.total_seconds()
                        for version in () if is_new else set(local.versions(name)) - set(present):
                            files.remove(folder / f".{version}.json")
                            (folder / str(version)).rename(hidden := folder / f".pruned-{uuid.uuid4().hex}")
                            files.remove(hidden)
                    served[name] = now
            except RegistryError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise RegistryError(" ".join(problems))
        return served

    # --- what a registry in a folder does in other ways

    @contextmanager
    def _locked(self, name: str, timeout: float = -1) -> Iterator[Path]:
        """Yield the mirror's folder of a model, for this process alone of this host; other hosts are noticed later."""
        folder = self.root / name
        with self._errors("write to"):
            self._expect_conditional_writes()
            files.make_folder(folder)
            with FileLock(folder / ".lock", timeout=timeout):
                self._held[name] = object_store.read(self.url / name / HISTORY)
                try:
                    self._repair(name)
                    yield folder
                finally:
                    del self._held[name]

    def _expect_conditional_writes(self) -> None:
        if not self._is_conditional:
            try:
                object_store.expect_conditional_writes(self.url)
            except object_store.ConditionalWritesError as error:
                raise StoreError(
                    f"Expected an object store with conditional writes for the served models; received {self.url}: "
                    f"{error}. Two hosts that push at the same time would lose a push. Use S3 or a service that has "
                    "them, or set RIDGELINE_SERVING to a folder of one host."
                ) from error
            self._is_conditional = True

    def _read_lines(self, name: str) -> tuple[Lines, Lines, bool]:
        place = self.url / name / HISTORY
        if name in self._held:
            found = self._held[name]
        else:
            with self._errors("read"):
                found = object_store.read(place, self._known.get(name))
            if found:
                self._known[name] = found
        return split_lines(found[0] if found else b"", mask(str(place))), Lines([]), found is not None

    def _new_version(self, name: str, history: list[HistoryEntry]) -> int:
        """Claim a number that is larger than all others."""
        used = [path.name.partition(".")[0] for path in object_store.entries(self.url / name)]
        numbers = [entry.version for entry in history] + [int(part) for part in used if part.isdecimal()]
        version = 1 + max(numbers, default=0)
        while not self._claims(name, version):
            version += 1
        if object_store.read(self._manifest(name, version)):  # another host pushed it since the numbers were listed
            object_store.delete_object(self._claim(name, version))
            return self._new_version(name, history)
        return version

    def _claims(self, name: str, version: int) -> bool:
        """Return whether this host alone may push or delete a version now, until it deletes its claim."""
        claim = {"host": socket.gethostname(), "at": datetime.now(UTC).isoformat(), "id": uuid.uuid4().hex}
        self._claimed[name, version] = content = json.dumps(claim).encode()
        return object_store.write_if_unchanged(self._claim(name, version), content, None)

    def _is_claimed(self, name: str, version: int) -> bool:
        """Return whether this host's claim is still there: after `CLAIM_AGE`, another one may have taken the number."""
        found = object_store.read(self._claim(name, version))
        return found is not None and found[0] == self._claimed.get((name, version))

    def _claim(self, name: str, version: int) -> UPath:
        return self.url / name / f"{version}.claim"

    def _manifest(self, name: str, version: int) -> UPath:
        return self.url / name / f"{version}.json"

    def _keep(self, name: str, version: int, staging: Path) -> None:
        found = {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}
        object_store.upload(staging, self.url / name / str(version), found)
        manifest = {"files": {file: file_entry(path).model_dump() for file, path in sorted(found.items())}}
        content = json.dumps(manifest, indent=2).encode()
        object_store.write(self._manifest(name, version), content)

    def _discard(self, name: str, version: int, staging: Path) -> None:
        files.remove(staging)
        # a late request of an earlier holder may have deleted this host's claim
        if self._is_claimed(name, version) or self._claims(name, version):
            self._held[name] = object_store.read(self.url / name / HISTORY)
            if version not in [entry.version for entry in self.history(name)]:
                self._delete_objects(name, version)
            object_store.delete_object(self._claim(name, version))

    def _append(self, name: str, *entries: HistoryEntry) -> None:
        lines, entry = self._lines(name)[0], entries[0]
        staging = self.root / name / f".push-{entry.version}"
        is_new = staging.exists()
        if is_new and not self._is_claimed(name, entry.version):
            raise HistoryChangedError(
                f"Cannot push version {entry.version} of {name}: another host deleted it, since the push took longer "
                f"than {CLAIM_AGE}."
            )
        self._replace(name, joined([*lines, *(added.line() for added in entries)]).encode())
        if is_new:
            object_store.delete_object(self._claim(name, entry.version))
            files.remove(staging)
        # another host may have been deleting it, as an old version
        elif entry.action != "abort" and not self._is_whole(name, entry.version):
            self._undo(name, lines, entry.version)

    def _undo(self, name: str, before: list[str], version: int) -> None:
        """Serve the champion before a change again, unless another host has changed that meanwhile, too.

        Raises:
            HistoryChangedError: Always: the version can't be served.
        """
        problem = f"another host deleted version {version} meanwhile"
        back = champions([parse(line) for line in before])[-1].again("rollback", reason=problem, by="", run_id="")
        for _ in range(PUSH_ATTEMPTS):
            lines = self._lines(name)[0]
            served = serving_of([parse(line) for line in lines])
            if served and version not in (served.champion, served.canary):
                break
            try:
                self._replace(name, joined([*lines, back.line()]).encode())
                break
            except HistoryChangedError:
                self._held[name] = object_store.read(self.url / name / HISTORY)
        raise HistoryChangedError(f"Cannot serve version {version} of {name}: {problem}.")

    def _is_whole(self, name: str, version: int) -> bool:
        """Return whether a version was not deleted, once a host that puts it back had the time to do so."""
        for _ in range(DELETION_SECONDS):
            if object_store.read(self._manifest(name, version)):
                return True
            time.sleep(1)
        return False

    def _replace(self, name: str, content: bytes) -> None:
        place, held = self.url / name / HISTORY, self._held[name]
        is_written = object_store.write_if_unchanged(place, content, held[1] if held else None)
        found = object_store.read(place)
        # else the response may have been lost, and another host have added to what was written
        if not is_written and not (found and found[0].startswith(content)):
            raise HistoryChangedError(
                f"Cannot change the history of {name}: another host changed it meanwhile. Nothing was changed. "
                "Look at it with `ridgeline models show`, and run this again if it still applies."
            )
        self._held[name] = found

    def _delete(self, name: str, version: int, pushed: HistoryEntry) -> bool:
        """Delete a version, unless another host just made it the champion; return whether it was deleted."""
        if not self._claims(name, version):
            return False  # another host deletes it
        manifest = object_store.read(self._manifest(name, version))
        object_store.delete_object(self._manifest(name, version))  # first: now nobody can choose it any more
        self._held[name] = object_store.read(self.url / name / HISTORY)
        is_needed = version in self._needed(name)
        if not is_needed:
            self._delete_objects(name, version)
        elif manifest:
            object_store.write(self._manifest(name, version), manifest[0])
        object_store.delete_object(self._claim(name, version))
        return not is_needed

    def _delete_objects(self, name: str, version: int) -> None:
        object_store.delete_object(self._manifest(name, version))
        object_store.delete(self.url / name / str(version))

    def _repair(self, name: str) -> None:
        """Restore damaged lines of a history, and delete what dead hosts and processes left."""
        folder, held = self.root / name, self._held[name]
        lines, problem = self._lines(name)
        if problem and held:
            kept = f"{HISTORY}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
            object_store.write(self.url / name / kept, held[0])
            self._replace(name, joined(lines).encode())
            log.warning("repaired the history of %s: %s; the damaged object is %s", name, problem, kept)
        for leftover in [*folder.glob(".push-*"), *folder.glob(".pruned-*")]:
            files.remove(leftover)
        claims = [path for path in object_store.entries(self.url / name) if path.suffix == ".claim"]
        if claims:
            now = object_store.clock(self.url)
            pushed, present = {parse(line).version for line in lines}, self.versions(name)
            for claim in claims:
                try:
                    age = now - object_store.modified_at(claim)
                except FileNotFoundError:  # its push just ended
                    continue
                if claim.stem.isdecimal() and age > CLAIM_AGE:
                    if int(claim.stem) not in pushed or int(claim.stem) not in present:
                        self._delete_objects(name, int(claim.stem))
                        log.info("%s: deleted version %s, whose push or deletion was killed", name, claim.stem)
                    object_store.delete_object(claim)

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        with translate_os_errors(action, self.url):
            yield


def _sizes(listed: dict[str, list[Any]]) -> dict[str, int]:
    """Return the sizes in a listing of sizes and ETags."""
    return {file: size for file, (size, _) in listed.items()}
