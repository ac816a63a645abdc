"""The work on one key across hosts that share only an object store: a lease, and a copy of the unfinished work.

All times are those of the object store, so the clocks of the hosts do not matter.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from upath import UPath

from ridgeline import object_store
from ridgeline.masking import mask
from ridgeline.records import SHORT

log = logging.getLogger(__name__)

EXPIRY, RENEWAL_SECONDS = timedelta(seconds=90), 15.0
LOOK_SECONDS = 3.0  # between two looks whether another host has ended
COPY_SECONDS = 5.0  # between two looks at what changed in a scratch folder


class Holder(BaseModel):
    """What an object of a lease states.

    Attributes:
        host: Name of the machine.
        mirror: Random name of its mirror. Who has locked the key there, on the same machine, knows that an earlier
            holder is dead. A copy of a machine has the same mirror, but another name.
        pid: Process id.
        id: Random name of this holding.
        renewals: Their number, so that the object's tag changes with each.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str = Field(default_factory=socket.gethostname)
    mirror: str
    pid: int = Field(default_factory=os.getpid)
    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    renewals: int = 0

    def as_bytes(self) -> bytes:
        """Return the content of the object."""
        return self.model_dump_json().encode()


class KeyLease:
    """The right to work on a key, which one host has at a time.

    It is an object that is created, renewed and taken over by conditional writes. A holder that does not renew it for
    `EXPIRY`, because it died or was stopped, loses it to the next host that looks. If it works on regardless, nothing
    is damaged: what it publishes is named by its content.

    Args:
        place: The object.
        mirror: Name of this host's mirror, see `Holder`.
    """

    def __init__(self, place: UPath, mirror: str) -> None:
        self.place, self.mirror = place, mirror
        self._holder = Holder(mirror=mirror)
        self._is_lost = False  # another host has taken it over
        self._offset: datetime | None = None
        self._renewing = threading.Lock()

    def acquire(self) -> str | None:
        """Return None if this process has the lease now, else the name of the host that has it."""
        began, found = _monotonic(), object_store.read(self.place)
        if found:
            other = _holder_in(found[0])
            is_own = (other.host, other.mirror) == (self._holder.host, self._holder.mirror)
            if not is_own and not self._has_expired():
                return other.host
        if not object_store.write_if_unchanged(self.place, self._holder.as_bytes(), found[1] if found else None):
            return "another host"
        self._renewed_at = began
        if found:
            log.info("took over the work of %s on key %s, which ended there", other.host, self.place.stem[:SHORT])
        return None

    def _has_expired(self) -> bool:
        if self._offset is None:  # once: each look at the clock writes an object
            self._offset = object_store.clock(self.place.parent) - _monotonic()
        try:
            return self._offset + _monotonic() - object_store.modified_at(self.place) > EXPIRY
        except FileNotFoundError:
            return False  # its holder just ended: look again

    def renew(self) -> bool:
        """Return whether this process has the lease still."""
        with self._renewing:
            began, found = _monotonic(), object_store.read(self.place)
            # The last holder's deletion may have been repeated, in an object store that ignores its condition.
            is_deleted = not found and began - self._renewed_at < EXPIRY
            if is_deleted or (found and _holder_in(found[0]).id == self._holder.id):
                self._holder = self._holder.model_copy(update={"renewals": self._holder.renewals + 1})
                content, tag = self._holder.as_bytes(), found[1] if found else None
                if object_store.write_if_unchanged(self.place, content, tag):
                    self._renewed_at = began
                    return True
        self._lose()
        return False

    def _lose(self) -> None:
        if not self._is_lost:
            log.warning(
                "another host has taken over the work on key %s; this one did not respond", self.place.stem[:SHORT]
            )
            self._is_lost = True

    def is_held(self) -> bool:
        """Return whether this process has the lease still; asked only if it may have expired."""
        return not self._is_lost and (_monotonic() - self._renewed_at < EXPIRY / 2 or self.renew())

    def release(self) -> None:
        """End the lease, unless another host has it."""
        found = None if self._is_lost else object_store.read(self.place)
        if found and _holder_in(found[0]).id == self._holder.id:
            object_store.delete_if_unchanged(self.place, found[1])
        else:
            self._lose()


def _holder_in(content: bytes) -> Holder:
    """Return what an object of a lease states; nothing but another host if it can't be read."""
    try:
        return Holder.model_validate_json(content)
    except ValidationError:
        return Holder(host="another host", mirror="")  # of another release, or damaged: it expires all the same


class ScratchCopy:
    """A copy of a scratch folder in an object store, from which another host resumes.

    Hidden files are left out: by convention, they are not complete.

    Args:
        folder: The local folder.
        place: The copy.
    """

    def __init__(self, folder: Path, place: UPath) -> None:
        self.folder, self.place = folder, place
        self._copied: dict[str, tuple[int, ...]] = {}
        self._copying = threading.Lock()

    def fetch(self) -> None:
        """Make the local folder equal to the copy, if there is one."""
        if found := {n: size for n, size in object_store.sizes(self.place).items() if not _is_hidden(n)}:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            object_store.download(self.place, self.folder, found)
            self._copied = self._files()
            log.info(
                "fetched the unfinished work on key %s: %.1f MiB", self.place.name[:SHORT], sum(found.values()) / 2**20
            )

    def update(self) -> None:
        """Copy what changed."""
        with self._copying:
            files = self._files()
            changed = {name for name, state in files.items() if self._copied.get(name) != state}
            with suppress(FileNotFoundError):  # replaced or deleted meanwhile: at the next look
                object_store.upload(self.folder, self.place, changed)
                for name in self._copied.keys() - files.keys():
                    object_store.delete(self.place / name)
                self._copied = files

    def delete(self) -> None:
        """Delete the copy."""
        object_store.delete(self.place)

    def _files(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            with suppress(FileNotFoundError):
                if not _is_hidden(name) and path.is_file():
                    state = path.stat()
                    found[name] = (state.st_ino, state.st_size, state.st_mtime_ns)
        return found


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _monotonic() -> timedelta:
    return timedelta(seconds=time.monotonic())


@contextmanager
def hold(root: UPath, key: str, folder: Path, mirror: str) -> Iterator[None]:
    """Be the only host that works on a key while the body runs, and keep a copy of its unfinished work.

    Another host that holds the key is waited for. What it, or an earlier attempt, left is fetched first. The copy
    follows the folder every `COPY_SECONDS`, and is deleted afterwards, unless the body failed.

    Args:
        root: The store's root, in an object store with conditional writes.
        key: The key.
        folder: The local scratch folder, which this process has locked.
        mirror: Name of this host's mirror, see `Holder`.
    """
    copy = ScratchCopy(folder, root / "scratch" / key)

    def update() -> None:
        if lease.is_held():
            copy.update()

    def delete() -> None:
        if lease.is_held():
            copy.delete()

    with exclusive(root, key, mirror, "runs the same step on the same inputs") as lease:
        copy.fetch()
        try:
            with object_store.repeating(COPY_SECONDS, "copy the unfinished work", update):
                yield
        except BaseException:
            _tried("copy the unfinished work", update)
            raise
        _tried("delete the copy of the finished work", delete)


@contextmanager
def exclusive(root: UPath, key: str, mirror: str, does: str) -> Iterator[KeyLease]:
    """Yield the lease of a key, for this host alone; another one that holds it is waited for.

    Args:
        root: The store's root, in an object store with conditional writes.
        key: The key, which this process has locked on this host.
        mirror: Name of this host's mirror, see `Holder`.
        does: What the other host does, for the log.
    """
    lease = KeyLease(root / "keys" / f"{key}.json", mirror)
    waits = False
    while other := lease.acquire():
        if not waits:
            log.info("waits: %s %s (key %s)", other, does, key[:SHORT])
            waits = True
        time.sleep(LOOK_SECONDS)
    with _kept(lease):
        yield lease


@contextmanager
def attempted(root: UPath, key: str, mirror: str) -> Iterator[bool]:
    """Yield whether this host alone has a key while the body runs; another one that holds it is not waited for.

    Args:
        root: The store's root, in an object store with conditional writes.
        key: The key, which this process has locked on this host.
        mirror: Name of this host's mirror, see `Holder`.
    """
    lease = KeyLease(root / "keys" / f"{key}.json", mirror)
    if lease.acquire():
        yield False
        return
    with _kept(lease):
        yield True


@contextmanager
def _kept(lease: KeyLease) -> Iterator[None]:
    """Renew a lease while the body runs, and end it afterwards."""
    try:
        with object_store.repeating(RENEWAL_SECONDS, "renew the lease of a key", lease.renew):
            yield
    finally:
        _tried("end the lease of a key", lease.release)


def _tried(what: str, action: Callable[[], object]) -> None:
    """Do what garbage collection, or the end of the lease, makes up for if it fails."""
    try:
        action()
    except Exception as error:
        log.warning("Cannot %s: %s", what, mask(f"{type(error).__name__}: {error}"))
