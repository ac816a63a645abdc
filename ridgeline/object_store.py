"""Object stores: opened without cached listings, with retries, parallel transfers and conditional writes.

The driver of S3 repeats a request after errors 5xx, throttling, timeouts and broken connections, with growing waits.
Here, a whole transfer is repeated after what is left.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

from fsspec.callbacks import Callback
from upath import UPath

from ridgeline.masking import mask

log = logging.getLogger(__name__)

S3 = ("s3", "s3a")
# botocore repeats a request, s3fs repeats what botocore gave up, and `repeated` the whole action. An endpoint that
# refuses connections or throttles is an error after minutes, one that never responds after eight.
S3_CONFIG = {"retries": {"mode": "standard", "max_attempts": 5}, "connect_timeout": 5, "read_timeout": 30}
DRIVER_ATTEMPTS = 3  # of s3fs, which would make five
ATTEMPTS, FIRST_WAIT_SECONDS = 4, 0.2  # of a transfer
NUM_TRANSFERS = 8  # at a time
BULK = 1_000  # objects that S3 deletes with one request
CLOCK = ".clock"  # the object whose time of writing is the present time
PART_BYTES, NUM_PARTS = 2**24, 4  # of a file in S3 in memory: 512 MiB for all transfers
MAX_PARTS = 10_000  # that S3 allows
PROGRESS_SECONDS = 10.0  # between two lines in the log about a transfer
TRANSIENT = (errno.EIO, errno.EBUSY, errno.ETIMEDOUT, errno.EAGAIN, getattr(errno, "EREMOTEIO", errno.EIO))
TRANSIENT_KINDS = (
    "ConnectionError",
    "HTTPClientError",
    "ClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
)

INVALID_BUCKET = re.compile('Invalid bucket name "[^"]*"')
DRIVERS = ("botocore", "aiobotocore")  # packages whose errors say what S3 answered
RIGHTS = "Correct the credentials, or grant them the rights to list, read, write and delete"
ADDRESS = "Correct the credentials, the region or the address"
LATER = "Try again later"

A = TypeVar("A")
T = TypeVar("T")


def open_url(url: str | Path, options: Mapping[str, Any] = MappingProxyType({})) -> UPath:
    """Return a path whose driver lists what is there now, and repeats requests that fail for a moment.

    fsspec keeps one driver, and all that it listed, for as long as the process lives.

    Args:
        url: A folder or a URL.
        options: Options of the driver; they win over those that are set here.

    Raises:
        ImportError: If the driver is not installed.
        ValueError: If the URL can't be opened.
        TypeError: If the driver does not know an option.
    """
    protocol = str(url).partition("://")[0] if "://" in str(url) else ""
    if protocol in ("", "file", "local"):
        return cast(UPath, UPath(url, **options))
    merged = {"use_listings_cache": False, **options}
    if protocol in S3:
        merged["config_kwargs"] = {**S3_CONFIG, **options.get("config_kwargs", {})}
    path = cast(UPath, UPath(url, **merged))
    assert path.fs is not None  # the driver is there
    if protocol in S3:
        path.fs.retries = DRIVER_ATTEMPTS
    return path


def is_transient(error: BaseException) -> bool:
    """Return whether an error may be gone at the next attempt.

    Args:
        error: An error of a driver.
    """
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return False
    if isinstance(error, TimeoutError | ConnectionError | EOFError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT
    return any(kind.__name__ in TRANSIENT_KINDS for kind in type(error).__mro__)


def repeated(action: Callable[[], T]) -> T:
    """Return the result of an action, which is repeated after errors that may be gone the next time.

    Args:
        action: What to do; doing it twice is harmless.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if not is_transient(error) or type(error).__name__ == "ReadTimeoutError":  # which took minutes already
                raise
            log.info("attempt %d of %d failed: %s", attempt, ATTEMPTS, mask(f"{type(error).__name__}: {error}"))
            time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
    return action()


def download(source: UPath, target: Path, sizes: Mapping[str, int]) -> None:
    """Copy files into a local folder, several at a time.

    Args:
        source: The folder in the object store.
        target: The local folder.
        sizes: Size in bytes of each file, by its name in the folder. A copy of another size is repeated.

    Raises:
        FileNotFoundError: If a file is missing.
        EOFError: If the object store keeps sending too little.
    """

    def copy(name: str, callback: Callback) -> None:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        source.fs.get_file((source / name).path, str(place), callback=callback, **_parts(source, sizes[name]))
        if (received := place.stat().st_size) != sizes[name]:
            raise EOFError(f"Expected {sizes[name]} bytes of {name}; received {received}.")

    _transfer("downloaded", copy, sizes)


def upload(source: Path, target: UPath, names: Iterable[str]) -> None:
    """Copy files of a local folder into an object store, several at a time.

    Args:
        source: The local folder.
        target: The folder in the object store.
        names: Names of the files in the folder.
    """
    sizes = {name: (source / name).stat().st_size for name in names}

    def copy(name: str, callback: Callback) -> None:
        make_folder((target / name).parent)
        place = (target / name).path
        target.fs.put_file(str(source / name), place, callback=callback, **_parts(target, sizes[name]))

    _transfer("uploaded", copy, sizes)


def _parts(folder: UPath, size: int) -> dict[str, int]:
    """Return the options by which S3's driver transfers a file in parts, of which few are in memory at a time."""
    if folder.protocol not in S3:
        return {}
    return {"chunksize": max(PART_BYTES, -(-size // MAX_PARTS)), "max_concurrency": NUM_PARTS}


class _Progress(Callback):  # type: ignore[misc]  # fsspec has no types
    """Counts the bytes of one file, and calls a function after each part of it."""

    def __init__(self, log_progress: Callable[[], None]) -> None:
        super().__init__()
        self._log_progress = log_progress

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._log_progress()


def _transfer(done: str, copy: Callable[[str, Callback], None], sizes: Mapping[str, int]) -> None:
    """Copy files, largest first, and log now and then how much of them is done."""
    total, logged = sum(sizes.values()), time.monotonic()
    progress: dict[str, Callback] = {}

    def log_progress() -> None:
        nonlocal logged
        if time.monotonic() - logged > PROGRESS_SECONDS:
            logged = time.monotonic()
            count = sum(min(file.value, sizes[name]) for name, file in progress.copy().items())
            log.info("%s %.1f of %.1f MiB", done, count / 2**20, total / 2**20)

    def copied(name: str) -> None:
        progress[name] = _Progress(log_progress)
        copy(name, progress[name])

    with ThreadPoolExecutor(NUM_TRANSFERS) as pool:
        largest_first = sorted(sizes, key=lambda name: -sizes[name])
        try:
            for _ in pool.map(lambda name: repeated(lambda: copied(name)), largest_first):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def make_folder(folder: UPath) -> None:
    """Create a folder where its driver needs one. S3 has none: there, the driver would create a missing bucket.

    Args:
        folder: The folder.
    """
    if folder.protocol not in S3:
        folder.mkdir(parents=True, exist_ok=True)


def delete(folder: UPath, names: Collection[str] | None = None) -> None:
    """Delete objects in a folder and below, whether or not they exist.

    Args:
        folder: The folder.
        names: Their names there; all objects if None.
    """
    with suppress(FileNotFoundError):  # another process deletes it, too
        wanted = list(sizes(folder) if names is None else names)
        if folder.protocol in S3 and len(wanted) > 1:
            parts = [wanted[start : start + BULK] for start in range(0, len(wanted), BULK)]
            wanted = [name for left in mapped(functools.partial(_delete_in_bulk, folder), parts) for name in left]
        for name in wanted:  # in S3, this raises the reason
            delete_object(folder / name)


def _delete_in_bulk(folder: UPath, names: Iterable[str]) -> list[str]:
    """Delete objects in S3 with one request; return the names of those that a response with status 200 refuses."""
    bucket, prefix, _ = folder.fs.split_path(f"{folder.path.rstrip('/')}/")
    keys = {f"{prefix}{name}": name for name in names}
    request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    response = repeated(lambda: folder.fs.call_s3("delete_objects", Bucket=bucket, Delete=request))
    return [keys[error["Key"]] for error in response.get("Errors", [])]


def delete_object(path: UPath) -> None:
    """Delete one object, whether or not it exists.

    Args:
        path: The object.
    """
    with suppress(FileNotFoundError):
        repeated(lambda: path.fs.rm_file(path.path))


def write(path: UPath, content: bytes) -> None:
    """Create or replace an object.

    Args:
        path: The object.
        content: Its content.
    """

    def replace() -> None:
        make_folder(path.parent)
        path.fs.pipe_file(path.path, content)

    repeated(replace)


def content(path: UPath) -> bytes:
    """Return the content of a small object, with one request.

    Args:
        path: The object.
    """
    options = {"max_concurrency": 1} if path.protocol in S3 else {}  # with more, s3fs asks for the size first
    return cast(bytes, repeated(lambda: path.fs.cat_file(path.path, **options)))


def contents(folder: UPath, names: Iterable[str]) -> dict[str, bytes]:
    """Return the contents of small objects by name, several read at a time; those that are missing are left out.

    Args:
        folder: Their folder.
        names: Their names there.
    """

    def content_of(name: str) -> bytes | None:
        try:
            return content(folder / name)
        except FileNotFoundError:
            return None

    names = list(names)
    found = zip(names, mapped(content_of, names), strict=True)
    return {name: text for name, text in found if text is not None}


def mapped(action: Callable[[A], T], items: Iterable[A]) -> list[T]:
    """Return the results of an action, which is done with several items at a time.

    Args:
        action: What to do with an item: requests to an object store.
        items: The items.
    """
    with ThreadPoolExecutor(NUM_TRANSFERS) as pool:
        return list(pool.map(action, items))


def sizes(folder: UPath) -> dict[str, int]:
    """Return the sizes in bytes of all objects in a folder and below, by their names there.

    A listing that fails is an error. fsspec's `glob` and `walk` return nothing then, and what is there looks deleted.

    Args:
        folder: The folder; one that is missing has no objects.
    """
    prefix = f"{folder.path.rstrip('/')}/"
    found = repeated(lambda: folder.fs.find(folder.path, detail=True))
    return {path.removeprefix(prefix): info["size"] for path, info in found.items()}


def names(folder: UPath, prefix: str = "") -> list[str]:
    """Return the names of the objects and folders in a folder, which may be missing.

    Args:
        folder: The folder.
        prefix: Only of the objects whose names begin with this; S3 lists no others.
    """
    if not prefix:
        return [path.name for path in entries(folder)]
    place = f"{folder.path.rstrip('/')}/"
    found = repeated(lambda: folder.fs.find(folder.path, prefix=prefix))
    listed = [path.removeprefix(place) for path in found]
    return [name for name in listed if name.startswith(prefix) and "/" not in name]


def create(paths: Iterable[UPath]) -> None:
    """Create empty objects, several at a time.

    Args:
        paths: The objects.
    """
    paths = list(paths)
    for folder in {path.parent for path in paths}:
        make_folder(folder)
    if paths:
        repeated(lambda: paths[0].fs.pipe({path.path: b"" for path in paths}))


def move(source: UPath, target: UPath) -> None:
    """Rename an object, unless it is missing.

    Args:
        source: The object.
        target: Its new path.
    """
    with suppress(FileNotFoundError):
        write(target, content(source))
        delete_object(source)


def entries(folder: UPath) -> list[UPath]:
    """Return the objects and folders in a folder, which may be missing.

    Args:
        folder: The folder.
    """
    try:
        found = repeated(lambda: folder.fs.ls(folder.path, detail=False))
    except FileNotFoundError as error:
        if _status(error)[1] == "NoSuchBucket":
            raise
        return []
    return [folder / name for path in found if (name := path.rstrip("/").rpartition("/")[2])]


def modified_at(path: UPath) -> datetime:
    """Return when an object was written, by the clock of the object store.

    Args:
        path: The object.
    """
    return cast(datetime, repeated(lambda: path.fs.modified(path.path)))


class Listed(NamedTuple):
    """An object in a listing.

    Attributes:
        bytes: Its size.
        age: How long ago it was written, by the clock of the object store.
    """

    bytes: int
    age: timedelta


def ages(folder: UPath, suffix: str = "") -> dict[str, timedelta]:
    """Return how long ago the objects in a folder and below were written, by the clock of the object store.

    Args:
        folder: The folder.
        suffix: The end of the names of the objects in question; empty for all.
    """
    return {name: found.age for name, found in listing(folder, suffix).items()}


def listing(folder: UPath, suffix: str = "") -> dict[str, Listed]:
    """Return sizes and ages of the objects in a folder and below, by their names there.

    Args:
        folder: The folder.
        suffix: The end of the names of the objects in question; empty for all.
    """
    prefix = f"{folder.path.rstrip('/')}/"
    listed = repeated(lambda: folder.fs.find(folder.path, detail=True))
    infos = {
        path.removeprefix(prefix): info
        for path, info in listed.items()
        if path.endswith(suffix) and not path.endswith(f"/{CLOCK}")
    }
    if not infos:
        return {}
    try:
        now = clock(folder)
    except PermissionError:  # who may only read deletes nothing by it
        now = datetime.now(UTC)
    return {
        name: Listed(info["size"], now - (info.get("LastModified") or modified_at(folder / name)))
        for name, info in infos.items()
    }


def clock(folder: UPath) -> datetime:
    """Return the time by the clock of an object store, so that the hosts' own clocks do not matter.

    Args:
        folder: Where a small object is written.
    """
    write(folder / CLOCK, b"1")
    return modified_at(folder / CLOCK)


def abort_uploads(folder: UPath, older_than: timedelta) -> None:
    """Delete the parts of large files in S3 whose upload began some time ago and never ended.

    Listings do not show them. It takes rights of its own, and some services can't do it: an error is logged.

    Args:
        folder: The folder.
        older_than: How long ago an upload must have begun.
    """
    if folder.protocol not in S3:
        return
    bucket, prefix, _ = folder.fs.split_path(folder.path)
    listing = {"Bucket": bucket, "Prefix": f"{prefix.rstrip('/')}/"}
    try:
        found = repeated(lambda: folder.fs.call_s3("list_multipart_uploads", **listing)).get("Uploads", [])
        now = clock(folder) if found else None
        for upload in found:
            if now and now - upload["Initiated"] > older_than:
                with suppress(FileNotFoundError):
                    folder.fs.call_s3(
                        "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                log.info("deleted what was uploaded of %s before its host died", mask(upload["Key"]))
    except Exception as error:  # of the driver
        log.info(
            "Cannot delete parts of large files whose upload never ended: %s", mask(f"{type(error).__name__}: {error}")
        )


@contextmanager
def repeating(seconds: float, what: str, action: Callable[[], object]) -> Iterator[None]:
    """Do something again and again, in a thread, while the body runs. An error is logged.

    Args:
        seconds: Time between the end of one action and the next.
        what: What the action does, after "Cannot".
        action: The action.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            try:
                action()
            except Exception as error:  # of the driver; there are more attempts
                log.warning("Cannot %s: %s", what, mask(f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=repeat, name=what, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # so that nothing is written after the end


def explain(error: BaseException) -> tuple[str, str] | None:
    """Return what is wrong with an object store and what to do about it; None if an error is about something else.

    Args:
        error: An error of a driver.
    """
    if isinstance(error, FileNotFoundError) and _status(error)[1] != "NoSuchBucket":
        return None  # an object that another process has just deleted
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.args == (None,):  # Ceph sends a code without a text
        text = _status(error)[1] or type(error).__name__
    is_of_driver = any(kind.__module__.partition(".")[0] in DRIVERS for kind in type(error).__mro__)
    if isinstance(error, OSError) and type(error.__cause__).__module__.partition(".")[0] in DRIVERS:
        return text, _advice(error)
    if isinstance(error, PermissionError) and error.errno is None:
        return text, RIGHTS
    if is_of_driver and (name := INVALID_BUCKET.search(text)):
        return name[0], "Correct the name of the bucket"
    if is_of_driver:
        return f"{type(error).__name__}: {text}", LATER if is_transient(error) else ADDRESS
    if isinstance(error, OSError) and error.filename is None and is_transient(error):
        return text, LATER
    return None


def _advice(error: OSError) -> str:
    """Return what to do about an error that a response of S3 was made of."""
    code = _status(error)[1]
    if code == "RequestTimeTooSkewed":
        return "Set the clock of this machine"
    if code == "NoSuchBucket":
        return "Create the bucket, or correct its name"
    if isinstance(error, PermissionError):
        return RIGHTS
    return LATER if is_transient(error) else ADDRESS


# --- conditional writes

NOT_IMPLEMENTED = 501  # HTTP status
UNKNOWN = (400, 405, NOT_IMPLEMENTED)  # of a condition that an object store does not know


class ConditionalWritesError(RuntimeError):
    """An object store can't change an object only if nobody else did so meanwhile."""


def read(path: UPath, known: tuple[bytes, str] | None = None) -> tuple[bytes, str] | None:
    """Return an object's content and the tag of just this content; None if there is no such object.

    Args:
        path: An object in S3.
        known: What was read before; if the object has the same tag still, its content is not read again.
    """

    def consistent() -> tuple[bytes, str]:
        with path.fs.open(path.path, "rb") as file:  # each part is read only if the tag is still the same
            return known if known and known[1] == file.details["ETag"] else (file.read(), file.details["ETag"])

    for _ in range(ATTEMPTS):
        try:
            return repeated(consistent)
        except FileNotFoundError:
            return None
        except OSError as error:
            if _status(error)[0] != 412 and type(error).__name__ != "FileExpired":  # it was replaced meanwhile
                raise
    return repeated(consistent)


def write_if_unchanged(path: UPath, content: bytes, tag: str | None) -> bool:
    """Replace an object if it still has a tag, by one conditional write.

    Args:
        path: An object in S3.
        content: Its new content, which nobody else writes.
        tag: The tag that `read` returned; None if there must be no such object.

    Returns:
        Whether it was replaced; if not, another process has changed it.

    Raises:
        ConditionalWritesError: If the object store says that it knows no conditions.
    """
    condition = {"mode": "create"} if tag is None else {"IfMatch": tag}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            repeated(functools.partial(path.fs.pipe_file, path.path, content, **condition))
            return True
        except OSError as error:
            status, code = _status(error)
            if status == NOT_IMPLEMENTED:
                name = "If-None-Match" if tag is None else "If-Match"
                raise ConditionalWritesError(f"it does not implement the condition {name}") from error
            if status not in (409, 412) and code != "NoSuchKey":
                raise
            found = read(path)
            if found and found[0] == content:  # the answer to an earlier attempt was lost
                return True
            if (found and found[1]) != tag:
                return False
            if status != 409:
                bare = (tag or "").strip('"')
                if condition == {"IfMatch": bare} or not bare:
                    return False
                condition = {"IfMatch": bare}  # Ceph compares the tag without its quotes
                continue
            time.sleep(FIRST_WAIT_SECONDS * 2**attempt)  # S3 asks for a repetition
    return False


def delete_if_unchanged(path: UPath, tag: str) -> None:
    """Delete an object if it still has a tag, by one conditional request.

    Without the condition, a deletion that the driver repeats, because the first answer was lost, deletes what another
    host has created since. An object store that ignores the condition deletes as ever.

    Args:
        path: An object in S3.
        tag: The tag that `read` returned.
    """
    bucket, key, _ = path.fs.split_path(path.path)
    for condition in (tag, tag.strip('"')):  # Ceph compares the tag without its quotes
        try:
            repeated(functools.partial(path.fs.call_s3, "delete_object", Bucket=bucket, Key=key, IfMatch=condition))
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if _status(error)[0] in UNKNOWN:
                delete_object(path)
                return
            if _status(error)[0] not in (409, 412):
                raise
        if (found := read(path)) is None or found[1] != tag:
            return


def _status(error: OSError) -> tuple[int, str]:
    """Return the HTTP status and the code that S3's driver made an error of; 0 and no code of another error."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code", ""))


def expect_conditional_writes(folder: UPath) -> None:
    """Check, by a small object, that an object store refuses conditional writes whose condition is not met.

    Args:
        folder: Where the object is written, and deleted.

    Raises:
        ConditionalWritesError: If it does not.
    """
    if folder.protocol not in S3:
        raise ConditionalWritesError(f"{folder.protocol}:// URLs are not supported, only s3:// URLs")
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        if not write_if_unchanged(probe, b"1", None):
            raise ConditionalWritesError("it refuses to create an object under the condition If-None-Match")
        if write_if_unchanged(probe, b"2", None):
            raise ConditionalWritesError("it ignores the condition If-None-Match")
        if write_if_unchanged(probe, b"3", '"0123456789abcdef0123456789abcdef"'):
            raise ConditionalWritesError("it ignores the condition If-Match")
        if not ((found := read(probe)) and write_if_unchanged(probe, b"4", found[1])):
            raise ConditionalWritesError("it refuses to replace an object under the condition If-Match")
    finally:
        delete_object(probe)
