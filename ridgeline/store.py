"""The store: whole artifacts by content digest, and the record of every execution."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from upath import UPath

from ridgeline.artifacts.base import MANIFEST, Artifact, ArtifactError, Manifest, verify
from ridgeline.keys import KeyParts
from ridgeline.masking import mask, remember

log = logging.getLogger(__name__)

REF = re.compile(r"[A-Z][A-Za-z]*/[0-9a-f]{64}")

A = TypeVar("A", bound=Artifact[Any])


class StoreError(RuntimeError):
    """The store can't be read or written. The secrets of URLs in the message are hidden."""

    def __init__(self, message: str) -> None:
        super().__init__(mask(message))


class Execution(BaseModel):
    """The record of one attempt to run a component, with everything that differs between equal runs.

    Attributes:
        schema_version: Version of this record's layout.
        component: The component's name.
        run_id: The pipeline run that it belongs to.
        state: MLMD's terms: ``complete`` (it ran), ``cached`` (reused), ``skipped`` or ``failed``.
        reason: Why it ran, was reused or was skipped; the error if it failed. The secrets of URLs in it are hidden.
        key: Digest of `parts`.
        parts: What the key covers.
        inputs: Store-relative names of the input artifacts, by input name.
        output: Store-relative name of the output artifact, if there is one.
        started_at: Start of the attempt, UTC.
        seconds: Wall time of the attempt.
        host: Name of the machine.
        pid: Process id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    component: str
    run_id: str
    state: Literal["complete", "cached", "skipped", "failed"]
    reason: Annotated[str, AfterValidator(mask)]
    key: str
    parts: KeyParts
    inputs: dict[str, str]
    output: str | None
    started_at: datetime
    seconds: float
    host: str = Field(default_factory=socket.gethostname)
    pid: int = Field(default_factory=os.getpid)


@contextmanager
def translate_os_errors(action: str, root: object) -> Iterator[None]:
    """Turn an `OSError` into a `StoreError` that says what to do.

    Args:
        action: What was being done, for example ``"write"``.
        root: Where.
    """
    advice = {
        errno.ENOSPC: "Free disk space, for example with `ridgeline gc`, and run again",
        errno.EDQUOT: "Free disk space, for example with `ridgeline gc`, and run again",
        errno.EROFS: "Name a writable folder in RIDGELINE_STORE",
        errno.ENOENT: "Name a folder that can be created in RIDGELINE_STORE",
        errno.EACCES: "Give this user write access, or name another folder in RIDGELINE_STORE",
        errno.EPERM: "Give this user write access, or name another folder in RIDGELINE_STORE",
        errno.ENOTDIR: "Name a folder in RIDGELINE_STORE; a part of this path is a file",
        errno.EEXIST: "Name a folder in RIDGELINE_STORE; a part of this path is a file",
    }
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not str(error.filename).startswith(str(root))
        if error.errno not in advice or elsewhere:
            raise
        raise StoreError(
            f"Cannot {action} the store {root}: {error.strerror} ({error.filename}). {advice[error.errno]}. "
            "The earlier content of the store is unchanged."
        ) from error


class Store:
    """Artifacts and execution records under one root: a local folder or any `universal_pathlib` URL.

    On disk::

        <root>/artifacts/<Type>/<digest>/        whole artifacts; appear by one atomic rename
        <root>/executions/<component>/<start>-<key>-<id>.json
        <root>/staging/<id>/, <id>.lock          what a running step writes; the lock's owner is that step
        <root>/scratch/<key>/, <key>.lock        what an unfinished execution left for the next one with its key

    With a remote root, components still see local paths: artifacts are mirrored into a local folder of the
    same layout, and an upload is complete when its manifest, written last, is there.

    Args:
        root: The root as a path or URL.
        mirror: Local folder for the copies of a remote root's artifacts; a folder in the user's cache,
            named after the root, if None.
    """

    def __init__(self, root: str | Path, mirror: Path | None = None) -> None:
        remember(str(root))
        try:
            path = UPath(root)
            self.remote = path.protocol not in ("", "file", "local")
            if self.remote:
                assert path.fs is not None
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"Expected a folder or a URL that fsspec can open; received {str(root)!r}: {error}. Install the "
                "driver, for example s3fs for s3://, or correct RIDGELINE_STORE."
            ) from error
        self.root = path if self.remote else UPath(Path(path.path).expanduser().absolute())
        if not self.remote:
            self.local = Path(self.root.path)
        else:
            name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
            self.local = mirror or Path.home() / ".cache" / "ridgeline" / name

    # --- artifacts

    def path(self, ref: str) -> Path:
        """Return the local path of an artifact, whether or not it exists.

        Args:
            ref: The artifact's store-relative name, ``<Type>/<digest>``.
        """
        if not REF.fullmatch(ref):
            raise ArtifactError(f"Expected an artifact's name such as Model/<64 hex digits>; received {ref!r}.")
        return self.local / "artifacts" / ref

    def open(self, ref: str, kind: type[A]) -> A:
        """Return an artifact, verified.

        Raises:
            ArtifactError: If it is missing, damaged or of another type.
            PermissionError: If this user may not read it.
        """
        try:
            artifact = kind.load(self.fetch(ref))
        except ArtifactError as error:
            if isinstance(error.__cause__, PermissionError):  # another user's, neither missing nor damaged
                raise error.__cause__ from None
            raise
        if artifact.ref != ref:
            raise ArtifactError(f"Expected {ref}; received the content of {artifact.ref}. The artifact is damaged.")
        return artifact

    def fetch(self, ref: str) -> Path:
        """Return an artifact's local path.

        A remote artifact is first copied into the mirror, unless the mirror holds it undamaged.

        Args:
            ref: The artifact's store-relative name, ``<Type>/<digest>``.

        Raises:
            ArtifactError: If a remote artifact is missing or damaged; a local one is verified by `open`.
        """
        if not self.remote:
            return self.path(ref)
        source, manifest = self.root / "artifacts" / ref, self.manifest(ref)
        for name, entry in manifest.files.items():
            if not (source / name).exists() or (source / name).stat().st_size != entry.bytes:
                raise ArtifactError(
                    mask(f"Expected {source / name} with {entry.bytes} bytes; it is missing or damaged.")
                )
        try:
            if verify(self.path(ref)) == manifest:
                return self.path(ref)
        except ArtifactError:
            pass
        with self.stage() as folder:
            for name in [*manifest.files, MANIFEST]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((source / name).read_bytes())
            verify(folder)
            with self.lock():
                shutil.rmtree(self.path(ref), ignore_errors=True)
                self.path(ref).parent.mkdir(parents=True, exist_ok=True)
                folder.rename(self.path(ref))
        return self.path(ref)

    def refs(self) -> list[str]:
        """Return the store-relative names of all artifacts."""
        found = (self.root / "artifacts").glob(f"*/*/{MANIFEST}")
        return sorted("/".join(path.parts[-3:-1]) for path in found)

    def holds(self, ref: str) -> bool:
        """Return whether an artifact is in the store, without verifying it."""
        root = self.root if self.remote else self.local  # a local path that can't be read is an error, not False
        return bool((root / "artifacts" / ref / MANIFEST).exists())

    def find(self, name: str) -> str:
        """Return the store-relative name of the one artifact that a name matches.

        Args:
            name: ``<Type>/<digest>``, any unique prefix of it or of the digest, the artifact's path, or a type
                alone: the latest of that type.

        Raises:
            ArtifactError: If none or several match.
        """
        wanted = "/".join(Path(name).parts[-2:]) if "artifacts/" in name else name
        if REF.fullmatch(wanted) and self.holds(wanted):
            return wanted
        outputs = (execution.output or "" for execution in self.executions())
        latest = next((ref for ref in outputs if ref.startswith(f"{wanted}/") and self.holds(ref)), None)
        if latest is not None:
            return latest
        found = [ref for ref in self.refs() if ref.startswith(wanted) or ref.split("/")[1].startswith(wanted)]
        if len(found) != 1 or not wanted:
            received = f"{len(found)} matches" if found else "none"
            raise ArtifactError(
                mask(f"Expected one artifact named {name!r} in {self.root}; received {received}. ")
                + "Give <Type>/<digest> or a longer prefix of the digest."
            )
        return found[0]

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """Yield an empty folder on the store's own file system; it is deleted afterwards, unless published.

        Folders of dead processes are deleted first.
        """
        staging = self.local / "staging"
        with translate_os_errors("write to", self.root), self.lock():
            staging.mkdir(parents=True, exist_ok=True)
            self._clear_dead(staging)
            name = uuid.uuid4().hex
            owner = FileLock(staging / f"{name}.lock")
            owner.acquire()
            folder = staging / name
            folder.mkdir()
        try:
            with translate_os_errors("write to", self.root):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            owner.release()
            Path(owner.lock_file).unlink(missing_ok=True)

    @contextmanager
    def scratch(self, key: str) -> Iterator[Path | None]:
        """Yield the folder of an execution's unfinished work; it is deleted afterwards, unless the body failed.

        Only one execution of a key holds it. A concurrent one gets None and works without it.

        Args:
            key: The execution's key.
        """
        folder = self.local / "scratch" / key
        with self._owned(folder) as owned:
            if not owned:
                log.warning("the same step is running elsewhere: this execution can't be resumed if it fails")
                yield None
                return
            with translate_os_errors("write to", self.root):
                folder.mkdir(exist_ok=True)
            yield folder
            shutil.rmtree(folder, ignore_errors=True)

    def clear_scratch(self, older_than: timedelta, dry_run: bool) -> dict[str, int]:
        """Delete the scratch folders that no execution uses and that have not changed for some time.

        Args:
            older_than: How long ago the last change must be.
            dry_run: Only report what would be deleted.

        Returns:
            Size in bytes of each such folder, by key.
        """
        sizes = {}
        for folder in sorted(path for path in (self.local / "scratch").glob("*") if path.is_dir()):
            with self._owned(folder) as owned:
                if not owned:
                    continue
                files = [path.stat() for path in folder.rglob("*") if path.is_file()]
                changed = max(stat.st_mtime for stat in [folder.stat(), *files])
                if time.time() - changed >= older_than.total_seconds():
                    sizes[folder.name] = sum(stat.st_size for stat in files)
                    if not dry_run:
                        shutil.rmtree(folder)
        return sizes

    def publish(self, artifact: Artifact[Any]) -> str:
        """Move a staged, sealed artifact into place, whole, by one rename.

        If equal content is there already, it stays; damaged content is replaced.

        Returns:
            The artifact's store-relative name.
        """
        with translate_os_errors("write to", self.root), self.lock():
            target = self.path(artifact.ref)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                try:
                    verify(target)
                except ArtifactError:
                    target.rename(artifact.path.with_name(f"{artifact.path.name}-damaged"))
            if not target.exists():
                artifact.path.rename(target)
            shutil.rmtree(artifact.path.with_name(f"{artifact.path.name}-damaged"), ignore_errors=True)
            if self.remote and not self._uploaded(artifact):
                self._upload(artifact.ref)
        return artifact.ref

    def delete(self, ref: str) -> None:
        """Delete an artifact; it is first hidden by one rename."""
        if self.remote:
            (self.root / "artifacts" / ref / MANIFEST).unlink(missing_ok=True)
            self.root.fs.rm((self.root / "artifacts" / ref).path, recursive=True)
        if (path := self.path(ref)).exists():
            with self.stage() as staging:
                path.rename(staging / "deleted")

    def size_bytes(self, ref: str) -> int:
        """Return the size of an artifact's files as its manifest states it."""
        return sum(entry.bytes for entry in self.manifest(ref).files.values())

    def manifest(self, ref: str) -> Manifest:
        """Return an artifact's manifest alone, nothing verified.

        Raises:
            ArtifactError: If it is missing or damaged.
        """
        folder = self.root / "artifacts" / ref
        try:
            return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(mask(f"Expected an artifact at {folder}; received: {error}.")) from error

    def lock(self) -> FileLock:
        """Return the store's lock, which is held while an artifact and its record change together."""
        with translate_os_errors("write to", self.root):
            self.local.mkdir(parents=True, exist_ok=True)
            return FileLock(self.local / ".lock", is_singleton=True)

    # --- executions

    def record(self, execution: Execution) -> None:
        """Write an execution's record."""
        start = execution.started_at.astimezone(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        folder = self.root / "executions" / execution.component
        target = folder / f"{start}-{execution.key[:16]}-{uuid.uuid4().hex[:8]}.json"
        content = execution.model_dump_json(indent=2).encode()
        with translate_os_errors("write to", self.root):
            folder.mkdir(parents=True, exist_ok=True)
            if self.remote:
                target.write_bytes(content)
            else:
                unfinished = target.with_name(f".{target.name}")
                unfinished.write_bytes(content)
                unfinished.rename(target)

    def executions(self, component: str = "*", key: str = "") -> Iterator[Execution]:
        """Yield records, newest first.

        Args:
            component: The component's name, or ``*`` for all.
            key: Only executions with this key, or with any if empty.
        """
        pattern = f"{component}/[0-9]*-{key[:16]}*.json" if key else f"{component}/[0-9]*.json"
        for path in sorted((self.root / "executions").glob(pattern), key=lambda path: path.name, reverse=True):
            execution = self._read_execution(path)
            if execution and (not key or execution.key == key):
                yield execution

    def delete_executions(self, unwanted: Callable[[Execution], bool], dry_run: bool) -> int:
        """Delete the records that a function picks, and return their number; with `dry_run`, only count."""
        paths = list((self.root / "executions").glob("*/[0-9]*.json"))
        found = [path for path in paths if (execution := self._read_execution(path)) and unwanted(execution)]
        for path in [] if dry_run else found:
            path.unlink()
        return len(found)

    # --- internals

    @contextmanager
    def _owned(self, folder: Path) -> Iterator[bool]:
        """Yield whether this process alone uses a scratch folder; an empty one is deleted afterwards."""
        owner = FileLock(folder.with_name(f"{folder.name}.lock"))
        with translate_os_errors("write to", self.root), self.lock():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                owner.acquire(timeout=0)
        if not owner.is_locked:
            yield False
            return
        try:
            yield True
        finally:
            with self.lock():
                with suppress(OSError):  # not empty, or deleted already
                    folder.rmdir()
                if not folder.exists():
                    Path(owner.lock_file).unlink(missing_ok=True)
                owner.release()

    @staticmethod
    def _read_execution(path: UPath) -> Execution | None:
        try:
            return Execution.model_validate_json(path.read_bytes())
        except ValueError as error:
            log.warning("Left out the execution record %s, which can't be read: %s", mask(path), mask(error))
            return None

    @staticmethod
    def _clear_dead(staging: Path) -> None:
        for lock_file in staging.glob("*.lock"):
            lock = FileLock(lock_file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            for leftovers in staging.glob(f"{lock_file.stem}*"):
                if leftovers != lock_file:
                    shutil.rmtree(leftovers, ignore_errors=True)
            lock.release()
            lock_file.unlink(missing_ok=True)

    def _uploaded(self, artifact: Artifact[Any]) -> bool:
        try:
            self.fetch(artifact.ref)
        except ArtifactError:
            return False
        return True

    def _upload(self, ref: str) -> None:
        source, target = self.path(ref), self.root / "artifacts" / ref
        files = sorted(path for path in source.rglob("*") if path.is_file() and path != source / MANIFEST)
        for path in [*files, source / MANIFEST]:
            copy = target / path.relative_to(source).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
