"""The store: whole artifacts by content digest, and the record of every execution."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from upath import UPath

from ridgeline import files, key_lease, object_store
from ridgeline.artifacts.base import MANIFEST, Artifact, ArtifactError, Manifest, verify
from ridgeline.journal import Journal
from ridgeline.keys import KeyParts
from ridgeline.masking import mask, remember
from ridgeline.records import NO_OUTPUT, SHORT, RecordFile, may_match, short_ref, short_run, values_of

log = logging.getLogger(__name__)

REF = re.compile(r"[A-Z][A-Za-z]*/[0-9a-f]{64}")

A = TypeVar("A", bound=Artifact[Any])

LEASE_AGE = timedelta(days=1)  # how long an unfinished execution on another host counts, if its lock can't be seen
# In a store at a URL, a lease is renewed while its process lives, and what is new or reused is not deleted meanwhile.
LEASE_EXPIRY, RENEWAL_SECONDS = timedelta(hours=1), 600.0  # by the clock of the object store alone
CACHE_IN_USE = timedelta(hours=1)  # after its last use, a local copy counts as read still
UPLOAD_AGE = timedelta(hours=6)  # an artifact whose upload takes longer is taken for dead; by the same clock
MARK = ".deleting-"  # begins the name of an object that is in an artifact's folder while its files are deleted
MARK_EXPIRY, MARK_LOOK_SECONDS = timedelta(minutes=10), 1.0  # after that, its host is dead
MARKED_AT_ONCE = 200  # artifacts, whose files are deleted within half of this time
WAIT_SECONDS = 0.1  # between two looks whether another execution of the same key has ended


RECORD_SCHEMA_VERSION = 1  # the newest that this release knows


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


class Lease(BaseModel):
    """What a running execution, or a running pipeline, needs.

    Attributes:
        host: Name of the machine.
        run_id: The pipeline run; its records and all artifacts that they name are needed.
        artifacts: Store-relative names of the artifacts that it reads.
        lock: Path of the file that the process has locked.
        started_at: Start, UTC.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a later release may state more

    host: str = Field(default_factory=socket.gethostname)
    run_id: str
    artifacts: list[str]
    lock: str
    started_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


# NumPy loses the number of a write's error; libraries and child processes hand on only its text.
DISK_FULL = re.compile(
    f"{os.strerror(errno.ENOSPC)}|{os.strerror(errno.EDQUOT)}|[0-9]+ requested and [0-9]+ written", re.IGNORECASE
)


def _disk_full(error: BaseException) -> OSError | None:
    """Return the error in a chain that says that a disk is full, or None; also one that a library wrapped."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        found = pending.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
            return OSError(found.errno, os.strerror(found.errno), found.filename)  # h5py's text has many lines
        inner = [*found.args, *getattr(found, "exceptions", ())]
        pending += [found.__context__, found.__cause__, *(part for part in inner if isinstance(part, BaseException))]
        if match := DISK_FULL.search(text := " ".join(str(found).split())):
            return OSError(errno.ENOSPC, text[max(0, match.start() - 200) : match.end() + 100])
    return None


@contextmanager
def translate_os_errors(action: str, root: object) -> Iterator[None]:
    """Turn an `OSError`, and any error that a full disk caused, into a `StoreError` that says what to do.

    Args:
        action: What was being done, for example ``"write to"``.
        root: Where.
    """
    full = "Free disk space, for example with `ridgeline gc`, and run again"
    advice = {
        errno.ENOSPC: full,
        errno.EDQUOT: full,
        errno.EROFS: "Name a writable folder in RIDGELINE_STORE",
        errno.ENOENT: "Name a folder that can be created in RIDGELINE_STORE",
        errno.EACCES: "Give this user access, or name another folder in RIDGELINE_STORE",
        errno.EPERM: "Give this user access, or name another folder in RIDGELINE_STORE",
        errno.ENOTDIR: "Name a folder in RIDGELINE_STORE; a part of this path is a file",
        errno.EEXIST: "Name a folder in RIDGELINE_STORE; a part of this path is a file",
        errno.EXDEV: "Keep artifacts/ and staging/ on one file system: a finished step is moved by one rename",
    }
    try:
        yield
    except StoreError:
        raise
    except Exception as caught:
        if "://" in str(root) and (found := object_store.explain(caught)):
            raise StoreError(f"Cannot {action} {root}: {found[0]}. {found[1]}.") from caught
        error = _disk_full(caught) or caught
        if not isinstance(error, OSError) or error.errno not in advice:
            raise
        named = "" if error.filename is None else str(error.filename)
        elsewhere = not (named.startswith(str(root)) or str(root).startswith(named))
        place, todo = f"the store {root}", advice[error.errno]
        if elsewhere and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place, todo = str(error.filename), "Free disk space there, and run again"
        elif elsewhere or (error.errno == errno.ENOENT and Path(str(root)).exists()):
            raise
        file = "" if error.filename is None else f" ({error.filename})"
        raise StoreError(
            f"Cannot {action} {place}: {error.strerror}{file}. {todo}. The earlier content of the store is unchanged."
        ) from caught


class Store:
    """Artifacts and execution records under one root: a local folder or any `universal_pathlib` URL.

    On disk::

        <root>/artifacts/<Type>/<digest>/        whole artifacts; appear by one atomic rename
        <root>/artifacts/<Type>/<digest>/.deleting-<id>   in an object store: garbage collection deletes the others
        <root>/executions/<component>/<month>/<start>-...json   a record; its name is explained in `RecordFile`
        <root>/index/executions/...              finds records without a listing of all, see `Journal`
        <root>/leases/<id>.json                  what a running execution needs
        <root>/staging/<id>/, <id>.lock          what a running step writes; the lock's owner is that step
        <root>/staging/<id>.json                 a record that is being written, by the owner of the store's lock
        <root>/scratch/<key>/, <key>.lock        what an unfinished execution left for the next one with its key
        <local>/leases/<id>.lock                 its owner is the execution
        <root>/keys/<key>.json                   in an object store: the host that works on a key, see `KeyLease`
        <local>/.name                            of a mirror: its random name

    With a remote root, components still see local paths: artifacts are mirrored into a local folder of the
    same layout, and an upload is complete when its manifest, written last, is there. Staging is local, and so are
    scratch folders, but an object store with conditional writes holds a copy of these, see `key_lease`.

    Args:
        root: The root as a path or URL.
        mirror: Local folder for the copies of a remote root's artifacts; a folder in the user's cache,
            named after the root, if None.
        options: Options of the driver of a remote root, such as its credentials.
        cache_bytes: How much the copies of a remote root's artifacts may take; no limit if None.
    """

    def __init__(
        self,
        root: str | Path,
        mirror: Path | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        cache_bytes: int | None = None,
    ) -> None:
        remember(str(root))
        self.cache_bytes = cache_bytes
        self._unshared: str | None = None  # why several hosts can't share it; None: not looked at yet
        try:
            path = object_store.open_url(root, options)
        except (ImportError, ValueError, TypeError) as error:
            raise StoreError(
                f"Expected a folder or a URL that fsspec can open; received {str(root)!r}: {error}. Install the "
                "driver, for example s3fs for s3://, or correct RIDGELINE_STORE."
            ) from error
        self.remote = path.protocol not in ("", "file", "local")
        self.root = path if self.remote else UPath(Path(path.path).expanduser().absolute())
        if not self.remote:
            self.local = Path(self.root.path)
        else:
            self.local = mirror or mirror_of(str(root))
        root_of_files = self.root if self.remote else self.local
        self._journal = Journal(root_of_files, "executions", self.remote, self._values_of)

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
        except FileNotFoundError as error:  # while it was read
            raise ArtifactError(f"Expected {ref}; it was deleted. Rerun the step that writes it.") from error
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
        with translate_os_errors("read", self.root):
            found = object_store.sizes(source)
        for name, entry in manifest.files.items():
            if found.get(name) != entry.bytes:
                raise ArtifactError(
                    mask(f"Expected {source / name} with {entry.bytes} bytes; it is missing or damaged.")
                )
        damaged = None
        with suppress(ArtifactError, FileNotFoundError):
            damaged = self.path(ref).stat().st_ino
            os.utime(self.path(ref))  # used just now, see _evict
            if verify(self.path(ref)) == manifest:
                return self.path(ref)
        with self.stage() as folder:
            object_store.download(source, folder, {name: entry.bytes for name, entry in manifest.files.items()})
            (folder / MANIFEST).write_bytes(object_store.content(source / MANIFEST))
            verify(folder)
            with self.lock():
                if not self.path(ref).exists() or self.path(ref).stat().st_ino == damaged:
                    shutil.rmtree(self.path(ref), ignore_errors=True)
                    files.make_folder(self.path(ref).parent)
                    files.move(folder, self.path(ref))
                # else another process has fetched it meanwhile, and may be reading it
        self._evict()
        return self.path(ref)

    def refs(self) -> list[str]:
        """Return the store-relative names of all artifacts."""
        if not self.remote:
            kinds = _folders(self.local / "artifacts")
            refs = [f"{kind.name}/{name}" for kind in kinds for name in files.names(kind)]
            refs = [ref for ref in refs if Path(f"{self.local}/artifacts/{ref}/{MANIFEST}").exists()]
        else:
            with translate_os_errors("read", self.root):
                found = object_store.sizes(self.root / "artifacts")
            refs = [name.removesuffix(f"/{MANIFEST}") for name in found if name.endswith(f"/{MANIFEST}")]
        return sorted(ref for ref in refs if REF.fullmatch(ref))

    def holds(self, ref: str) -> bool:
        """Return whether an artifact is in the store, without verifying it."""
        root = self.root if self.remote else self.local  # a local path that can't be read is an error, not False
        with translate_os_errors("read", self.root):
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
        refs = self.refs()
        of_type = {short_ref(ref): ref for ref in refs if ref.startswith(f"{wanted}/")}
        for file in self.record_files() if of_type else ():
            if not file.output or file.output in of_type:
                execution = self.read_record(file)
                if execution and execution.output and execution.output in of_type.values():
                    return execution.output
        found = [ref for ref in refs if ref.startswith(wanted) or ref.split("/")[1].startswith(wanted)]
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

        What dead processes left there is deleted first.
        """
        with self._own_staging() as folder, translate_os_errors("write to", self.root):
            folder.mkdir()
            self._expect_one_file_system(folder)
            yield folder

    @contextmanager
    def scratch(self, key: str) -> Iterator[Path]:
        """Yield the folder of an execution's unfinished work; it is deleted afterwards, unless the body failed.

        Only one execution of a key holds it: another one waits, and finds the result of the first. In an object store
        with conditional writes, this holds across hosts, and what one left is there for the next one on any host.

        Args:
            key: The execution's key.

        Raises:
            StoreError: If an object store without conditional writes is used by several hosts.
        """
        folder = self.local / "scratch" / key
        with self._owned(folder, "runs the same step on the same inputs"), ExitStack() as stack:
            with translate_os_errors("write to", self.root):
                folder.mkdir(exist_ok=True)
                if self.remote and self._is_shared():
                    stack.enter_context(key_lease.hold(self.root, key, folder, self._mirror_name()))
            yield folder
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def alone(self, name: str) -> Iterator[bool]:
        """Yield whether no other process does the same meanwhile, in an object store also on no other host.

        Args:
            name: The name of what is done.
        """
        with self._owned(self.local / "scratch" / name) as owned, ExitStack() as stack:
            is_alone = owned
            with translate_os_errors("write to", self.root):
                if owned and self.remote and not self._why_unshared():
                    is_alone = stack.enter_context(key_lease.attempted(self.root, name, self._mirror_name()))
            yield is_alone

    def _why_unshared(self) -> str:
        """Return why several hosts can't share this object store; empty if they can."""
        if self._unshared is None:
            try:
                object_store.expect_conditional_writes(self.root)
                self._unshared = ""
            except object_store.ConditionalWritesError as error:
                self._unshared = str(error)
        return self._unshared

    def _is_shared(self) -> bool:
        """Return whether several hosts may use this object store; refuse one that can't be shared if several do."""
        others = {lease.host for lease in self.leases()} - {socket.gethostname()} if self._why_unshared() else set()
        if others:
            raise StoreError(
                f"Expected an object store with conditional writes for several hosts; received {self.root}: "
                f"{self._unshared}. Now {', '.join(sorted(others))} uses it, too. Use S3 or a service that has them, "
                "or run all steps on one host."
            )
        return not self._unshared

    def _mirror_name(self) -> str:
        """Return the random name of the mirror."""
        with self.lock():
            if not (file := self.local / ".name").exists():
                files.write(file, uuid.uuid4().hex)
            return file.read_text(encoding="utf-8")

    @contextmanager
    def lease(self, run_id: str, artifacts: Iterable[str] = ()) -> Iterator[StoreError | None]:
        """Keep artifacts, and all that a run made or used, from garbage collection while the body runs.

        A lease ends with its process, however that dies. In a store at a URL, a process that can't end its lease loses
        it after `LEASE_EXPIRY`; it is renewed every `RENEWAL_SECONDS`.

        Args:
            run_id: The pipeline run.
            artifacts: Store-relative names of artifacts.

        Yields:
            None, or the error if the lease can't be written: then nothing is kept.
        """
        name, failure = uuid.uuid4().hex, None
        owner = FileLock(self.local / "leases" / f"{name}.lock")
        lease = Lease(run_id=run_id, artifacts=list(artifacts), lock=str(owner.lock_file))
        file, content = self.root / "leases" / f"{name}.json", lease.model_dump_json().encode()
        try:
            with translate_os_errors("write to", self.root), self.lock():
                Path(owner.lock_file).parent.mkdir(parents=True, exist_ok=True)
                object_store.make_folder(file.parent)
                self.leases(clear=True)
                owner.acquire()
                object_store.write(file, content) if self.remote else file.write_bytes(content)
        except StoreError as error:
            failure = error
        try:
            renewed = object_store.repeating(
                RENEWAL_SECONDS, f"renew the lease of {run_id}", lambda: object_store.write(file, content)
            )
            with renewed if self.remote and not failure else nullcontext():
                yield failure
        finally:
            if owner.is_locked:
                try:
                    self._end_lease(name)
                except Exception as error:  # of the driver; what the body did is done
                    log.warning("Cannot delete the lease of %s, which expires by itself: %s", run_id, mask(error))
                owner.release()

    def leases(self, clear: bool = False) -> list[Lease]:
        """Return the leases of running processes, on other hosts those of the last `LEASE_AGE`.

        In a store at a URL, a lease counts until `LEASE_EXPIRY` after its renewal, unless this host sees that its
        process has ended.

        Args:
            clear: Delete all others. The caller holds the store's lock, so that none is being made.
        """
        found = []
        folder, locks = self.root / "leases", self.local / "leases"
        with translate_os_errors("read", self.root):
            ages = object_store.ages(folder, ".json") if self.remote else {}
        listed = ages if self.remote else [path.name for path in folder.glob("*.json")]
        names = {name.removesuffix(".json") for name in listed} | {path.stem for path in locks.glob("*.lock")}
        for name in names:
            try:
                with translate_os_errors("read", self.root):
                    lease = Lease.model_validate_json(self._content(folder / f"{name}.json"))
            except (FileNotFoundError, ValueError):  # its process just ended, or died while it wrote
                lease = None
            # The path may differ: of a remote root between users, of a local one between mounts.
            paths = {locks / f"{name}.lock", *([Path(lease.lock)] if lease else [])}
            if self.remote:  # the path of another host may lead where this user may not look
                paths = {path for path in paths if os.path.exists(path)}  # noqa: PTH110 - Path raises then
                young = ages.get(f"{name}.json", LEASE_EXPIRY) < LEASE_EXPIRY and not paths
            else:
                elsewhere = lease is not None and lease.host != socket.gethostname()
                young = elsewhere and lease is not None and datetime.now(UTC) - lease.started_at < LEASE_AGE
            if young or any(_is_held(path) for path in paths):
                found += [lease] if lease else []
            elif clear:
                with suppress(OSError):
                    self._end_lease(name)
        return found

    def clear_scratch(self, older_than: timedelta, dry_run: bool) -> dict[str, int]:
        """Delete the scratch folders that no execution uses and that have not changed for some time, and their copies.

        Args:
            older_than: How long ago the last change must be.
            dry_run: Only report what would be deleted.

        Returns:
            Size in bytes of each such folder, by key.
        """
        sizes = self._clear_copies(older_than, dry_run)
        for folder in _folders(self.local / "scratch"):
            lock_file = folder.with_name(f"{folder.name}.lock")
            with (
                suppress(FileNotFoundError),  # its execution just ended
                nullcontext(not _is_held(lock_file)) if dry_run else self._owned(folder) as owned,
            ):
                if not owned:
                    continue
                files = [path.stat() for path in folder.rglob("*") if path.is_file()]
                changed = max(stat.st_mtime for stat in [folder.stat(), *files])
                if time.time() - changed >= older_than.total_seconds():
                    sizes[folder.name] = sum(stat.st_size for stat in files)
                    if not dry_run:
                        shutil.rmtree(folder)
        return sizes

    def _clear_copies(self, older_than: timedelta, dry_run: bool) -> dict[str, int]:
        """Delete copies of scratch folders that no host uses, and leases that dead hosts had on keys.

        A copy goes if it did not change for some time, or if its key was finished.
        """
        if self.root.protocol not in object_store.S3:
            return {}
        copies = self.root / "scratch"

        def is_unneeded(key: str, listed: Collection[object_store.Listed]) -> bool:
            is_old = all(file.age >= older_than for file in listed)
            return is_old or any(self.executions(key=key, with_output=True))

        with translate_os_errors("write to", self.root):
            found: dict[str, list[object_store.Listed]] = {}
            for name, file in object_store.listing(copies).items():
                found.setdefault(name.partition("/")[0], []).append(file)
            leases = object_store.ages(self.root / "keys", ".json")
            in_use = {Path(name).stem for name, age in leases.items() if age <= key_lease.EXPIRY}
            unneeded = [key for key in found.keys() - in_use if is_unneeded(key, found[key])]
            sizes = {key: sum(file.bytes for file in found[key]) for key in unneeded}
            dead = {Path(name).stem for name in leases} - in_use
            for key in () if dry_run else {*sizes, *dead}:
                with self.alone(key) as is_alone:  # a host may have worked on it meanwhile
                    if is_alone and key in sizes and is_unneeded(key, object_store.listing(copies / key).values()):
                        object_store.delete(copies / key)
        return sizes

    def clear_leftovers(self) -> None:
        """Delete what killed processes left: staging, leases, unfinished records, scratch of finished keys."""
        with translate_os_errors("write to", self.root), self.lock():
            self.leases(clear=True)
            self._clear_dead(self.local / "staging")
            for hidden in (self.local / "executions").glob("*/.*.json"):  # of earlier releases
                files.remove(hidden)
            for folder in {path.with_suffix("") for path in (self.local / "scratch").glob("[0-9a-z]*")}:
                with self._owned(folder) as owned:  # it also deletes the lock file of a folder that is gone
                    if owned and folder.is_dir() and self._is_finished(folder):
                        files.remove(folder)

    def publish(self, artifact: Artifact[Any]) -> str:
        """Move a staged, sealed artifact into place, whole and flushed, by one rename.

        If equal content is there already, it stays; damaged content is replaced.

        Returns:
            The artifact's store-relative name.
        """
        with translate_os_errors("write to", self.root), self.lock():
            target = self.path(artifact.ref)
            files.make_folder(target.parent)
            if target.exists():
                try:
                    verify(target)
                except ArtifactError:
                    target.rename(artifact.path.with_name(f"{artifact.path.name}-damaged"))
            if not target.exists():
                files.move(artifact.path, target)
            shutil.rmtree(artifact.path.with_name(f"{artifact.path.name}-damaged"), ignore_errors=True)
            if self.remote and not (self._uploaded(artifact) and self.reuse(artifact.ref)):
                self._upload(artifact.ref)
        self._evict()
        return artifact.ref

    def reuse(self, ref: str) -> bool:
        """Return whether an artifact is in the store, about to be recorded as an output once more.

        In a store at a URL, its manifest is written again: garbage collection on another host, which does not see the
        record yet, keeps what is younger than `LEASE_EXPIRY`.

        Args:
            ref: The artifact's store-relative name.
        """
        if not self.remote or self.root.protocol not in object_store.S3:
            return self.holds(ref)
        place = self.root / "artifacts" / ref / MANIFEST
        with translate_os_errors("write to", self.root):
            if not (found := object_store.read(place)):
                return False
            try:
                return object_store.write_if_unchanged(place, *found)
            except object_store.ConditionalWritesError:  # a store of one host needs none
                object_store.write(place, found[0])
                return True

    def young(self) -> set[str]:
        """Return the artifacts that may be about to be recorded: of a store at a URL, those of `LEASE_EXPIRY`."""
        if not self.remote:
            return set()
        with translate_os_errors("read", self.root):
            ages = object_store.ages(self.root / "artifacts", f"/{MANIFEST}")
        return {name.removesuffix(f"/{MANIFEST}") for name, age in ages.items() if age < LEASE_EXPIRY}

    def delete(self, ref: str) -> None:
        """Delete an artifact; it is first hidden by one rename."""
        with self.deletion() as hide:
            hide([ref])

    @contextmanager
    def deletion(self, keep_young: bool = False) -> Iterator[Callable[[Iterable[str]], list[str]]]:
        """Yield a function that hides artifacts, each by one rename; afterwards, the hidden files are deleted.

        It returns which it hid. In a store at a URL, an artifact without its manifest is hidden. What another host
        records as an output meanwhile gets its manifest back: either this host sees the record, or the other one
        sees, after it wrote the record, that the artifact is gone.

        Args:
            keep_young: Leave what another host just wrote or reused, see `young`.
        """
        manifests: dict[str, bytes] = {}
        with self._own_staging() as place:
            numbers = itertools.count()
            oldest_young, earlier = None, set[RecordFile]()
            if self.remote and keep_young:
                with translate_os_errors("write to", self.root):
                    oldest_young = object_store.clock(self.root) - LEASE_EXPIRY
                earlier = set(self.record_files())

            def hide_remote(ref: str) -> None:
                manifest, content = self.root / "artifacts" / ref / MANIFEST, b""
                with suppress(FileNotFoundError):
                    if oldest_young and object_store.modified_at(manifest) > oldest_young:
                        return
                    content = object_store.content(manifest)
                object_store.delete_object(manifest)
                manifests[ref] = content

            def hide(refs: Iterable[str]) -> list[str]:
                refs = list(refs)
                with translate_os_errors("write to", self.root):
                    if self.remote:
                        object_store.mapped(hide_remote, refs)
                        refs = [ref for ref in refs if ref in manifests]
                    for ref in refs:
                        with suppress(FileNotFoundError):
                            self.path(ref).rename(f"{place}-{next(numbers)}")
                return refs

            def recorded() -> set[str]:
                return {file.output for file in set(self.record_files()) - earlier} if oldest_young else set()

            try:
                yield hide
            finally:
                with translate_os_errors("write to", self.root):
                    self._delete_hidden(manifests, recorded)

    def _delete_hidden(self, manifests: Mapping[str, bytes], recorded: Callable[[], Collection[str]]) -> None:
        """Delete the files of artifacts in an object store that have no manifest.

        Meanwhile, a mark in the folder of each says so. What is recorded or whole after the marks were written stays.
        Who records an artifact later sees its mark, waits until that is gone, and writes the artifact again.

        Args:
            manifests: The manifest that each had, by store-relative name; empty if it had none.
            recorded: Returns the short names of the artifacts that were recorded as outputs, and stay.
        """
        artifacts, hidden = self.root / "artifacts", list(manifests)
        for refs in (hidden[start : start + MARKED_AT_ONCE] for start in range(0, len(hidden), MARKED_AT_ONCE)):
            marks = [f"{ref}/{MARK}{uuid.uuid4().hex}" for ref in refs]
            end = time.monotonic() + MARK_EXPIRY.total_seconds() / 2
            object_store.create(artifacts / mark for mark in marks)
            outputs, gone = recorded(), list[str]()
            for ref, names in zip(
                refs, object_store.mapped(lambda r: object_store.sizes(artifacts / r), refs), strict=True
            ):
                if short_ref(ref) in outputs:
                    if manifests[ref]:  # else another host hid it, too
                        object_store.write(artifacts / ref / MANIFEST, manifests[ref])
                elif MANIFEST not in names:  # else another host has published it again
                    gone += [f"{ref}/{name}" for name in names if not name.startswith(MARK)]
            if time.monotonic() < end:
                object_store.delete(artifacts, gone)
            object_store.delete(artifacts, marks)

    def _keep(self, ref: str) -> None:
        """Write an artifact that was just recorded again, if garbage collection on another host deletes it.

        That did not see the record in time, see `_delete_hidden`.
        """
        source, target = self.path(ref), self.root / "artifacts" / ref
        wanted = Manifest.model_validate_json((source / MANIFEST).read_bytes()).files
        while True:
            found = object_store.sizes(target)
            if not (marks := [name for name in found if name.startswith(MARK)]):
                if MANIFEST in found and all(found.get(name) == entry.bytes for name, entry in wanted.items()):
                    return
                self._upload(ref)
                continue
            now = object_store.clock(self.root)
            for mark in marks:
                with suppress(FileNotFoundError):
                    if now - object_store.modified_at(target / mark) > MARK_EXPIRY:  # its host died
                        object_store.delete_object(target / mark)
            time.sleep(MARK_LOOK_SECONDS)

    def clear_staging(self, dry_run: bool) -> dict[str, int]:
        """Delete what dead processes left in the staging folder, and in an object store of the artifacts they uploaded.

        Args:
            dry_run: Only report what would be deleted.

        Returns:
            Size in bytes of each such folder, by name.
        """
        with nullcontext() if dry_run else self.lock():
            sizes = self._clear_dead(self.local / "staging", dry_run)
        return sizes | self._clear_uploads(dry_run)

    def _clear_uploads(self, dry_run: bool) -> dict[str, int]:
        """Delete the artifacts in an object store that have no manifest, since their host died, after `UPLOAD_AGE`.

        Returns:
            Size in bytes of each, by store-relative name.
        """
        if not self.remote:
            return {}
        with translate_os_errors("write to", self.root):
            place = self.root / "artifacts"
            found = object_store.listing(place)
            marks = {name for name in found if name.rpartition("/")[2].startswith(MARK)}
            for name in () if dry_run else marks:
                if found[name].age > MARK_EXPIRY:  # its host died
                    object_store.delete_object(place / name)
            whole = {name.removesuffix(f"/{MANIFEST}") for name in found if name.endswith(f"/{MANIFEST}")}
            parts: dict[str, list[object_store.Listed]] = {}
            for name, file in found.items():
                ref = "/".join(name.split("/")[:2])
                if ref not in whole and name not in marks and REF.fullmatch(ref):
                    parts.setdefault(ref, []).append(file)
            sizes = {
                ref: sum(file.bytes for file in listed)
                for ref, listed in parts.items()
                if all(file.age > UPLOAD_AGE for file in listed)
            }
            if not dry_run:
                self._delete_hidden(dict.fromkeys(sizes, b""), set)
                object_store.abort_uploads(self.root, UPLOAD_AGE)
        return sizes

    def sizes(self, refs: Iterable[str]) -> dict[str, int]:
        """Return the sizes in bytes of artifacts' files; 0 for a damaged or missing one.

        In a folder, the manifests state them. An object store lists them, a thousand with a request.

        Args:
            refs: Store-relative names of artifacts.
        """
        found = dict.fromkeys(refs, 0)
        if self.remote:
            with translate_os_errors("read", self.root):
                listed = object_store.sizes(self.root / "artifacts") if found else {}
            for path, size in listed.items():
                ref, name = "/".join(path.split("/")[:2]), path.split("/", 2)[-1]
                if ref in found and name != MANIFEST:
                    found[ref] += size
            return found
        for ref in found:
            with suppress(ArtifactError):
                found[ref] = sum(entry.bytes for entry in self.manifest(ref).files.values())
        return found

    def manifest(self, ref: str) -> Manifest:
        """Return an artifact's manifest alone, nothing verified.

        Raises:
            ArtifactError: If it is missing or damaged.
        """
        folder = self.root / "artifacts" / ref
        try:
            with translate_os_errors("read", self.root):
                return Manifest.model_validate_json(self._content(folder / MANIFEST))
        except (OSError, ValueError) as error:
            raise ArtifactError(mask(f"Expected an artifact at {folder}; received: {error}.")) from error

    @contextmanager
    def lock(self, across_hosts: str = "") -> Iterator[None]:
        """Hold the store's lock, as while an artifact and its record change together.

        Args:
            across_hosts: Name of what no other host may change either, if this is an object store; nothing if empty.

        Raises:
            StoreError: If the store can't be written.
        """
        with ExitStack() as stack:
            with translate_os_errors("write to", self.root):
                files.make_folder(self.local)
                if across_hosts and self.remote and self._is_shared():  # waited for without the store's lock
                    stack.enter_context(self._owned(self.local / "scratch" / across_hosts, "changes the same"))
                    mirror = self._mirror_name()
                    stack.enter_context(key_lease.exclusive(self.root, across_hosts, mirror, "changes the same"))
                stack.enter_context(FileLock(self.local / ".lock", is_singleton=True))
            yield

    # --- executions

    def record(self, execution: Execution) -> None:
        """Write an execution's record, whole and flushed."""
        name, text = execution.component, files.sign(execution.model_dump_json(indent=2))
        with translate_os_errors("write to", self.root), self.lock():
            file = RecordFile.of(execution, after=self._newest_start(name))
            (staging := self.local / "staging").mkdir(parents=True, exist_ok=True)
            unfinished = staging / f"{uuid.uuid4().hex}.json"
            self._journal.add(name, file.name, text, values_of(execution), unfinished)
            if self.remote and execution.output and self.path(execution.output).exists():
                self._keep(execution.output)

    def executions(
        self,
        component: str = "*",
        run_id: str = "",
        with_output: bool = False,
        *,
        key: str = "",
        made: str = "",
        used: str = "",
    ) -> Iterator[Execution]:
        """Yield records, newest first; only those are read, and only what may match is listed.

        Args:
            component: The component's name, or ``*`` for all.
            run_id: Only those of this pipeline run, or of any if empty.
            with_output: Only those with an output.
            key: Only complete executions with this key, or all if empty.
            made: Only complete executions that made this artifact, or all if empty.
            used: Only complete executions with this artifact among their inputs, or all if empty.
        """
        complete = bool(key or made or used)
        short = {"key": key[:SHORT], "run": short_run(run_id) if run_id else "", "output": short_ref(made)}
        for file in self._found(component, {**short, "input": short_ref(used)}):
            if (with_output and file.output == NO_OUTPUT) or (complete and file.state not in ("", "complete")):
                continue
            if (
                may_match(file.name, *short.values())
                and (execution := self.read_record(file))
                and run_id in ("", execution.run_id)
                and (execution.output or not with_output)
                and (execution.state == "complete" or not complete)
                and key in ("", execution.key)
                and made in ("", execution.output)
                and (not used or used in execution.inputs.values())
            ):
                yield execution

    def record_files(self) -> list[RecordFile]:
        """Return the files of all records, newest first; nothing is read."""
        with translate_os_errors("read", self.root):
            return [RecordFile.parse(folder, name) for folder, name in self._journal.all()]

    def newest_files(self, component: str) -> Iterator[RecordFile]:
        """Yield the files of a component's records, newest first; a month is listed when it is needed, nothing is read.

        Args:
            component: The component's name.
        """
        with translate_os_errors("read", self.root):
            for name in self._journal.newest(component):
                yield RecordFile.parse(component, name)

    def read_record(self, file: RecordFile) -> Execution | None:
        """Return a record; None if it is damaged, which is logged, or was deleted meanwhile.

        Raises:
            StoreError: If it can't be read.
        """
        try:
            with translate_os_errors("read", self.root):
                text = self._journal.read(file.component, file.name)
                return Execution.model_validate_json(files.unsign(text))
        except FileNotFoundError:
            return None
        except (IsADirectoryError, ValueError) as error:
            newer = isinstance(error, ValidationError) and files.is_newer(text, RECORD_SCHEMA_VERSION)
            cause = "a newer version of Ridgeline wrote it" if newer else error
            place = mask(self.root / "executions" / file.component / file.name)
            log.warning("Left out the execution record %s, which can't be read: %s", place, mask(cause))
            return None

    def is_newer(self, file: RecordFile) -> bool:
        """Return whether a later release wrote a record, in a layout that this one does not know."""
        try:
            return files.is_newer(self._journal.read(file.component, file.name), RECORD_SCHEMA_VERSION)
        except (OSError, ValueError):
            return False

    def delete_records(self, unneeded: Iterable[RecordFile]) -> None:
        """Delete the files of records."""
        with translate_os_errors("write to", self.root):
            self._journal.delete((file.component, file.name) for file in unneeded)

    def complete_index(self) -> None:
        """Make the index of the records, unless there is one: while files move, a listing may leave one out."""
        with translate_os_errors("write to", self.root), self.lock():
            self._journal.complete()

    # --- internals

    def _found(self, component: str, values: Mapping[str, str]) -> Iterator[RecordFile]:
        """Yield the files of the records of a component that may have a value, newest first; of all for ``*``."""
        field = next((field for field in ("key", "output", "input", "run") if values[field]), "")
        folder = "" if component == "*" else component
        with translate_os_errors("read", self.root):
            if folder and not field:
                yield from self.newest_files(folder)
                return
            for place, name in self._journal.find(field, values[field], folder) if field else self._journal.all():
                if folder in ("", place):
                    yield RecordFile.parse(place, name)

    def _values_of(self, component: str, name: str) -> Mapping[str, list[str]]:
        execution = self.read_record(RecordFile.parse(component, name))
        return values_of(execution) if execution else {}

    def _newest_start(self, component: str) -> str:
        """Return the start that the name of a component's newest record states; empty if there is none."""
        return next((file.start for file in self.newest_files(component)), "")

    @contextmanager
    def _own_staging(self) -> Iterator[Path]:
        """Yield an unused path in the staging folder; afterwards, what has a name that begins with it is deleted."""
        staging = self.local / "staging"
        with translate_os_errors("write to", self.root), self.lock():
            staging.mkdir(parents=True, exist_ok=True)
            self._clear_dead(staging)
            name = uuid.uuid4().hex
            owner = FileLock(staging / f"{name}.lock")
            owner.acquire()
        try:
            yield staging / name
        finally:
            for folder in staging.glob(f"{name}*"):
                if folder != Path(owner.lock_file):
                    shutil.rmtree(folder, ignore_errors=True)
            owner.release()
            Path(owner.lock_file).unlink(missing_ok=True)

    def _expect_one_file_system(self, folder: Path) -> None:
        """Refuse an artifacts folder that a staged folder can't be renamed into, before any work is done."""
        artifacts = self.local / "artifacts"
        files.make_folder(artifacts)
        for place in (artifacts, *_folders(artifacts)):
            with suppress(FileNotFoundError):  # where a rename is possible; else EXDEV
                (folder / "nothing").rename(place / folder.name)

    @contextmanager
    def _owned(self, folder: Path, waits_for: str = "") -> Iterator[bool]:
        """Yield whether this process alone of this host has a key, that is, uses its scratch folder, if there is one.

        An empty folder is deleted afterwards.

        Args:
            folder: The scratch folder.
            waits_for: What another process does that is waited for, for the log; empty to wait for none.
        """
        owner, waits = FileLock(folder.with_name(f"{folder.name}.lock")), False
        while not owner.is_locked:
            with translate_os_errors("write to", self.root), self.lock():
                folder.parent.mkdir(parents=True, exist_ok=True)
                with suppress(Timeout):
                    owner.acquire(timeout=0)
            if owner.is_locked:
                break
            if not waits_for:
                yield False
                return
            if not waits:
                log.info("waits: another process %s (key %s)", waits_for, folder.name[:SHORT])
                waits = True
            time.sleep(WAIT_SECONDS)
        try:
            yield True
        finally:
            with self.lock():
                with suppress(OSError):  # not empty, or deleted already
                    folder.rmdir()
                if not folder.exists():
                    Path(owner.lock_file).unlink(missing_ok=True)
                owner.release()

    def _content(self, file: UPath) -> bytes:
        return object_store.content(file) if self.remote else file.read_bytes()

    def _end_lease(self, name: str) -> None:
        (self.local / "leases" / f"{name}.lock").unlink(missing_ok=True)
        if self.remote:
            object_store.delete_object(self.root / "leases" / f"{name}.json")
        else:
            (self.root / "leases" / f"{name}.json").unlink(missing_ok=True)

    @staticmethod
    def _clear_dead(staging: Path, dry_run: bool = False) -> dict[str, int]:
        """Delete all that no running step owns; the caller holds the store's lock, so that none starts meanwhile."""
        sizes, paths = {}, list(staging.glob("*"))  # before the locks: what appears later belongs to a running step
        running = {lock_file.stem for lock_file in staging.glob("*.lock") if _is_held(lock_file)}
        for path in paths:
            if re.split(r"[-.]", path.name)[0] not in running:
                with suppress(FileNotFoundError):  # beside a dry run, which takes no lock, its step just ended
                    if path.is_dir():
                        sizes[path.name] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                if not dry_run:
                    files.remove(path)
        return sizes

    def _is_finished(self, scratch: Path) -> bool:
        """Return whether the execution that a scratch folder belongs to finished after the folder's last change."""
        changed = max(path.stat().st_mtime for path in [scratch, *scratch.rglob("*")])
        made = list(self.executions(key=scratch.name))
        if any(e.started_at.timestamp() + e.seconds >= changed for e in made):
            return True
        for file in self.newest_files(made[0].component) if made else ():  # it may have been reused
            if not file.state or datetime.fromisoformat(file.start).timestamp() < changed:
                break
            if file.key == scratch.name[:SHORT] and file.state == "cached":
                return True
        return False

    def _evict(self) -> None:
        """Delete the copies of a remote store that were not used for longest, until the others fit into the cache.

        Those that a running step reads, and those used within `CACHE_IN_USE`, stay.
        """
        if not self.remote or self.cache_bytes is None:
            return
        with translate_os_errors("write to", self.local), self.lock():
            copies = []
            for folder in itertools.chain.from_iterable(map(_folders, _folders(self.local / "artifacts"))):
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                copies.append((folder.stat().st_mtime, size, folder))
            excess = sum(size for _, size, _ in copies) - self.cache_bytes
            needed = {ref for lease in self.leases() for ref in lease.artifacts} if excess > 0 else set()
            for used_at, size, folder in sorted(copies):
                ref = f"{folder.parent.name}/{folder.name}"
                if excess <= 0 or time.time() - used_at < CACHE_IN_USE.total_seconds():
                    break
                if ref not in needed and folder.stat().st_mtime == used_at:  # else it was used meanwhile
                    files.make_folder(self.local / "staging")
                    folder.rename(evicted := self.local / "staging" / uuid.uuid4().hex)
                    files.remove(evicted)
                    excess -= size
                    log.info("deleted the local copy of %s: %.1f MiB", ref, size / 2**20)
        if excess > 0:
            log.info("the local copies in %s exceed the cache by %.1f MiB: all are in use", self.local, excess / 2**20)

    def _uploaded(self, artifact: Artifact[Any]) -> bool:
        try:
            self.fetch(artifact.ref)
        except ArtifactError:
            return False
        return True

    def _upload(self, ref: str) -> None:
        source, target = self.path(ref), self.root / "artifacts" / ref
        object_store.upload(source, target, Manifest.model_validate_json((source / MANIFEST).read_bytes()).files)
        object_store.upload(source, target, [MANIFEST])  # last: with it, the artifact is complete


def mirror_of(url: str) -> Path:
    """Return the local folder for copies of what is at a URL, in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Args:
        url: The URL.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "ridgeline" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, which may be missing."""
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _is_held(lock_file: Path) -> bool:
    """Return whether a process holds a lock, or may hold it."""
    lock = FileLock(lock_file)
    try:
        if not lock_file.exists():
            return False
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False
