"""Sources: what a step reads outside the store, recognized by its content.

A local folder has an index in the store, as git keeps one: an unchanged file is recognized by its size, times and
inode, so that a folder of 60,000 files costs one ``stat`` each. An object store's listing has an ETag for each object.
"""

from __future__ import annotations

import array
import collections
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import stat
import time
import zipfile
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.access import cause
from ridgeline.artifacts.base import canonical_json, is_os_file
from ridgeline.component import Component, Params, Source, SourceError, SourceFolder, TransientStepError
from ridgeline.files import move, read, remove

LARGE_BYTES = 2**20  # threads hash these; for small files they cost more than they gain
# A file that was changed this shortly before the index was made may change again without another time.
RECENT_NS = 2 * 10**9
KEPT_LISTINGS = 20  # as many as the executions that a step is compared with
LISTED_DIGITS = 8
BATCH_SIZE = 10_000
NAMED_FILES = 20
INDEX = "index.npz"
COLUMNS = 4  # of an index entry: size, times of the content and of the inode, inode
MISSING = (-1,) * COLUMNS


def read_sources(
    component: Component, params: Params, cache: Path | None, keep: bool = True, inputs: Collection[str] = ()
) -> dict[str, Source]:
    """List and fingerprint the sources that a step declares and uses.

    Args:
        component: The step.
        params: Its parameters.
        cache: Folder for the index of each local folder and for recent listings. It may be missing or not writable;
            then all files are read. None for none.
        keep: Write the index and the listing. If not, nothing is written.
        inputs: Names of the inputs that the step is given, see `SourceFolder.used_with`.

    Returns:
        The sources by name.

    Raises:
        SourceError: If a source is missing or no folder, can't be read, or has a link that leads out of it.
    """
    folders = component.sources(params).items()
    used = {name: folder for name, folder in folders if folder.used_with is None or folder.used_with in inputs}
    return {name: _read(name, folder, cache, keep) for name, folder in used.items()}


def fingerprint(folder: SourceFolder, cache: Path | None) -> str:
    """Return the digest of a folder's content, as that of `read_sources`, without keeping a listing.

    Args:
        folder: The folder.
        cache: As for `read_sources`.

    Raises:
        SourceError: As for `read_sources`.
    """
    return _list("", folder, cache)[0].digest


def expect_unchanged(component: Component, params: Params, sources: Mapping[str, Source], cache: Path | None) -> None:
    """Check, after a step, that its sources hold the files that were listed before it; new files are allowed.

    Args:
        component: The step.
        params: Its parameters.
        sources: Its sources, as they were listed before the step.
        cache: As for `read_sources`.

    Raises:
        TransientStepError: If a file was changed or removed meanwhile.
        SourceError: As for `read_sources`.
    """
    folders = component.sources(params)
    for name, source in sources.items():
        if changed := _changed(source, folders[name], cache):
            more = f" and {len(changed) - NAMED_FILES} more" if len(changed) > NAMED_FILES else ""
            raise TransientStepError(
                f"Expected the files of {source.location} to stay as they were when the step began; received "
                f"others, or none, for {', '.join(changed[:NAMED_FILES])}{more}. Run the step again when nothing "
                "writes into the folder."
            )


def _changed(source: Source, folder: SourceFolder, cache: Path | None) -> list[str]:
    """Return the files of a source that were changed or removed since it was listed."""
    if source.is_remote:
        now = _list(source.name, folder, cache)[0].files
        return [file for file, content in source.files.items() if now.get(file) != content]
    names = list(source.files)
    numbers = array.array("q")
    for name in names:
        try:
            status = os.stat(f"{source.location}/{name}")  # noqa: PTH116 - half as long as with Path
            numbers.extend(_entry(status) if stat.S_ISREG(status.st_mode) else MISSING)
        except OSError:
            numbers.extend(MISSING)
    entries = np.frombuffer(numbers, np.int64).reshape(-1, COLUMNS)
    index = _Index.load(_folder_of(cache, source.location, folder.only) / INDEX if cache else None)
    found = _digests(Path(source.location), names, entries, index)[0].tobytes()
    return [name for row, name in enumerate(names) if found[32 * row : 32 * row + 32].hex() != source.files[name]]


def clear_unused(cache: Path, older_than: timedelta, dry_run: bool) -> dict[str, int]:
    """Delete the indices and listings of the locations that no step has read for some time.

    Args:
        cache: As for `read_sources`.
        older_than: How long ago the last reading must be.
        dry_run: Only report what would be deleted.

    Returns:
        Size in bytes of what belongs to each such location, by the name of its folder in the cache.
    """
    sizes = {}
    for place in cache.iterdir() if cache.is_dir() else ():
        try:
            status = [file.stat() for file in (place, *place.glob("*"))]
        except FileNotFoundError:  # a step is reading the source now
            continue
        if time.time() - max(s.st_mtime for s in status) >= older_than.total_seconds():
            sizes[place.name] = sum(s.st_size for s in status[1:])
            if not dry_run:
                remove(place)
    return sizes


def describe_changes(source: Source, before: str, cache: Path) -> str:
    """Return what changed in a source since an earlier listing, as a phrase.

    Args:
        source: The source now.
        before: The digest of the earlier listing.
        cache: As for `read_sources`.

    Returns:
        For example ``source products changed: 12 files added, 3 modified``.
    """
    label = f"source {source.label} changed"
    try:  # also one of another location: the folder may have been moved
        listing = next(cache.glob(f"*/{before}.json.gz"))
        with gzip.open(listing, "rt", encoding="utf-8") as lines:
            earlier = {name: _short(content) for line in lines for name, content in json.loads(line).items()}
    except (StopIteration, OSError, EOFError, ValueError, zlib.error):  # missing or damaged
        return f"{label} ({before[:12]} → {source.digest[:12]})"
    return f"{label}: {_differences(earlier, {name: _short(content) for name, content in source.files.items()})}"


def _short(content: str) -> str:
    """Return what a listing holds of a content: a listing only counts the files that differ."""
    if len(content) <= LISTED_DIGITS:  # from a listing
        return content
    is_sha256 = len(content) == 64 and ":" not in content
    return content[:LISTED_DIGITS] if is_sha256 else hashlib.sha256(content.encode()).hexdigest()[:LISTED_DIGITS]


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    modified = sum(before[name] != now[name] for name in before.keys() & now.keys())
    removed = collections.Counter(before[name] for name in before.keys() - now.keys())
    added = collections.Counter(now[name] for name in now.keys() - before.keys())
    renamed = (removed & added).total()
    counts = {
        "added": added.total() - renamed,
        "modified": modified,
        "removed": removed.total() - renamed,
        "renamed": renamed,
    }
    found = [(count, verb) for verb, count in counts.items() if count]
    (first, verb), *others = found
    return ", ".join([f"{first} file{'s' * (first != 1)} {verb}", *(f"{count} {verb}" for count, verb in others)])


def _read(name: str, folder: SourceFolder, cache: Path | None, keep: bool) -> Source:
    source, place = _list(name, folder, cache, keep)
    if place and keep:
        with contextlib.suppress(OSError):  # a full or read-only disk
            _keep_listing(place, source)
    return source


def _list(name: str, folder: SourceFolder, cache: Path | None, keep: bool = True) -> tuple[Source, Path | None]:
    """Return a source, and its own folder in the cache."""
    from ridgeline.object_store import open_url

    try:
        path = open_url(folder.location)
    except (ImportError, ValueError, TypeError) as error:
        raise SourceError(
            f"Expected a folder or a URL that fsspec can open; received {str(folder.location)!r}: {error}. Correct it."
        ) from error
    if path.protocol in ("", "file", "local"):
        root = Path(path.path).expanduser().absolute()
        place = _folder_of(cache, str(root), folder.only) if cache else None
        return Source(name, str(root), _list_folder(root, folder, place, keep)), place
    source = Source(name, str(folder.location), _list_objects(path, str(folder.location), folder.only))
    return source, _folder_of(cache, source.location, folder.only) if cache else None


def _folder_of(cache: Path, location: str, only: str | None) -> Path:
    location = location if only is None else f"{location}/{only}"
    return cache / hashlib.sha256(location.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _keep_listing(place: Path, source: Source) -> None:
    listing = place / f"{source.digest}.json.gz"
    if listing.exists():
        os.utime(listing)
        return
    place.mkdir(parents=True, exist_ok=True)
    unfinished = place / f".{os.getpid()}-{source.digest}"
    with gzip.open(unfinished, "wt", 1, encoding="utf-8") as lines:
        contents = iter(source.files.items())
        while part := {name: _short(content) for name, content in itertools.islice(contents, BATCH_SIZE)}:
            lines.write(canonical_json(part) + "\n")
    unfinished.replace(listing)
    for old in sorted(place.glob("*.json.gz"), key=lambda file: file.stat().st_mtime_ns)[:-KEPT_LISTINGS]:
        old.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Index:
    """The files of a folder as they were at a time, in the order of their names: some 90 bytes for each."""

    started_ns: int
    names: bytes  # each followed by a zero byte
    entries: np.ndarray  # int64 [n, COLUMNS]
    digests: np.ndarray  # uint8 [n, 32]: SHA-256

    @classmethod
    def load(cls, file: Path | None) -> _Index:
        """Return an index from a file; an empty one if there is none, or if that is missing or damaged."""
        try:
            with np.load(file or os.devnull, allow_pickle=False) as arrays:  # each has a checksum
                names, entries, digests = arrays["names"].tobytes(), arrays["entries"], arrays["digests"]
                started_ns = int(arrays["started_ns"])
            count = names.count(0)
            if entries.shape == (count, COLUMNS) and digests.shape == (count, 32):
                return cls(started_ns, names, entries, digests)
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
            pass
        return cls(0, b"", np.zeros((0, COLUMNS), np.int64), np.zeros((0, 32), np.uint8))

    def save(self, file: Path) -> None:
        """Write it, whole and flushed."""
        names = np.frombuffer(self.names, np.uint8)
        unfinished = file.with_name(f".{os.getpid()}-{file.name}")
        with unfinished.open("wb") as out:
            np.savez(out, started_ns=self.started_ns, names=names, entries=self.entries, digests=self.digests)
        move(unfinished, file)

    def recognize(self, names: list[str], entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which files are those of the index, bool ``[n]``, and the SHA-256 of these, others 0."""
        rows: np.ndarray | slice = slice(None)
        known = entries[:, 1:3].max(1, initial=0) < self.started_ns - RECENT_NS
        if _joined(names) != self.names:
            places = {name: row for row, name in enumerate(self.names.decode().split("\0")[:-1])}
            rows = np.array([places.get(name, -1) for name in names], np.int64)
            known &= rows >= 0
            rows[~known] = 0
        if known.any():
            known &= (self.entries[rows] == entries).all(1)
            return known, np.where(known[:, None], self.digests[rows], np.uint8(0))
        return known, np.zeros((len(names), 32), np.uint8)


def _joined(names: list[str]) -> bytes:
    return "\0".join([*names, ""]).encode()


def _digests(root: Path, names: list[str], entries: np.ndarray, index: _Index) -> tuple[np.ndarray, int]:
    """Return the SHA-256 of files, uint8 ``[n, 32]``, 0 if missing; and how many are read, as the index lacks them."""
    known, digests = index.recognize(names, entries)
    unknown = np.flatnonzero(~known & (entries[:, 0] >= 0))
    if len(unknown):
        digests[unknown] = _hash(root, [names[row] for row in unknown], entries[unknown, 0].tolist())
    return digests, len(unknown)


def _list_folder(root: Path, folder: SourceFolder, place: Path | None, keep: bool) -> dict[str, str]:
    """Return the SHA-256 of each file in a local folder; those that the index knows are not read."""
    started_ns = time.time_ns()
    names, entries = _stat_file(root, folder.only) if folder.only else _walk(root, folder.outside_links)
    index = _Index.load(place / INDEX if place else None)
    digests, num_read = _digests(root, names, entries, index)
    if place and keep and (num_read or len(names) < len(index.entries)):
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            _Index(started_ns, _joined(names), entries, digests).save(place / INDEX)
            (place / "index.json").unlink(missing_ok=True)  # of an earlier release
    text = digests.tobytes().hex()
    return {name: text[64 * row : 64 * row + 64] for row, name in enumerate(names)}


def _stat_file(root: Path, name: str) -> tuple[list[str], np.ndarray]:
    """Return the name and the index entry of one file of a folder."""
    try:
        status = (root / name).stat()
        problem = "" if stat.S_ISREG(status.st_mode) else "it is no file"
    except OSError as error:
        problem = cause(error)
    if problem:
        raise SourceError(
            f"Expected a file that can be read; received {root / name}: {problem}. Correct its name or rights."
        )
    return [name], np.array([_entry(status)], np.int64)


def _entry(status: os.stat_result) -> tuple[int, int, int, int]:
    inode = status.st_ino & 2**63 - 1  # some file systems use all 64 bits
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, inode


def _walk(root: Path, outside_links: bool) -> tuple[list[str], np.ndarray]:
    """Return the relative name and the index entry of each file in a folder, in the order of the names.

    Hidden files, and those that operating systems put into any folder, are left out.
    """
    _expect_folder(root)
    problems: list[str] = []
    base = os.path.realpath(root)
    names: list[str] = []
    numbers = array.array("q")

    def visit(folder: str, prefix: str, parents: tuple[tuple[int, int], ...]) -> None:
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except OSError as error:
            problems.append(f"{prefix or '.'}: {cause(error)}")
            return
        while listed:
            entry = listed.pop()  # its status is not kept
            name = f"{prefix}{entry.name}"
            if entry.name.startswith(".") or is_os_file(entry.name):
                continue
            try:
                name.encode()
            except UnicodeEncodeError:
                problems.append(f"{name.encode('utf-8', 'surrogateescape')!r}: its name is not UTF-8")
                continue
            if entry.is_symlink() and not outside_links:
                target = os.path.realpath(entry.path)
                if os.path.commonpath([base, target]) != base:
                    problems.append(f"{name}: a link that leads out of the folder, to {target}")
                    continue
            try:
                status = entry.stat()
            except OSError as error:
                problems.append(f"{name}: {cause(error)}")
                continue
            if stat.S_ISREG(status.st_mode):
                names.append(name)
                numbers.extend(_entry(status))
            elif stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity in parents:
                    problems.append(f"{name}: a link to a folder around it")
                else:
                    visit(entry.path, f"{name}/", (*parents, identity))
            else:
                problems.append(f"{name}: no file and no folder")

    status = root.stat()
    visit(str(root), "", ((status.st_dev, status.st_ino),))
    _refuse(root, problems)
    order = sorted(range(len(names)), key=names.__getitem__)
    return [names[row] for row in order], np.frombuffer(numbers, np.int64).reshape(-1, COLUMNS)[order]


def _expect_folder(root: Path) -> None:
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
        problem = "" if is_folder else "it is a file"
    except OSError as error:
        problem = cause(error)
    if problem:
        raise SourceError(
            f"Expected a folder that can be read; received {root}: {problem}. Correct its name or rights."
        )


def _refuse(root: object, problems: list[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - NAMED_FILES} more" if len(problems) > NAMED_FILES else ""
        named = "".join(f"\n  {problem}" for problem in sorted(problems)[:NAMED_FILES])
        raise SourceError(
            f"Cannot read all of {root}: {len(problems)} of its entries can't be used. Correct or remove them:"
            f"{named}{more}"
        )


def _hash(root: Path, names: list[str], sizes: list[int]) -> np.ndarray:
    """Return the SHA-256 of files, uint8 ``[n, 32]``."""
    problems: list[str] = []

    def digest(row: int) -> bytes:
        path = f"{root}/{names[row]}"
        try:
            if sizes[row] < LARGE_BYTES:
                return hashlib.sha256(read(path)).digest()
            with Path(path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            problems.append(f"{names[row]}: {cause(error)}")
            return bytes(32)

    found = bytearray(32 * len(names))
    large = []
    for row, size in enumerate(sizes):
        if size < LARGE_BYTES:
            found[32 * row : 32 * row + 32] = digest(row)
        else:
            large.append(row)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, value in zip(large, pool.map(digest, large), strict=True):
            found[32 * row : 32 * row + 32] = value
    _refuse(root, problems)
    return np.frombuffer(found, np.uint8).reshape(-1, 32)


def _list_objects(path: Any, location: str, only: str | None) -> dict[str, str]:
    """Return the ETag, or what the file system has in its place, and the size of each object."""
    from ridgeline.object_store import explain, is_transient, repeated

    try:
        listed = repeated(lambda: path.fs.find((path / only if only else path).path, detail=True))
        if only:
            listed = {name: info for name, info in listed.items() if name.rpartition("/")[2] == only}
    except Exception as error:
        if found := explain(error):
            kind = TransientStepError if is_transient(error) else SourceError
            raise kind(f"Cannot list {location}: {found[0]}. {found[1]}.") from error
        if isinstance(error, ImportError | ValueError | PermissionError | FileNotFoundError):
            raise SourceError(f"Cannot list {location}: {error}. Correct its name, rights or driver.") from error
        raise TransientStepError(  # other drivers' own, such as missing credentials and no network
            f"Cannot list {location}: {type(error).__name__}: {error}. Correct the credentials, or try again later."
        ) from error
    if not listed:
        expected = f"the file {only}" if only else "a folder with files"
        raise SourceError(f"Expected {expected}; received {location}, where there are none. Correct its name.")
    prefix = path.path.rstrip("/") + "/"
    files = {}
    problems = []
    for name, info in sorted(listed.items()):
        relative = name.removeprefix(prefix) if name.startswith(prefix) else name.partition(prefix.lstrip("/"))[2]
        if info["type"] == "directory" or name.endswith("/"):  # an empty object with which a console shows a folder
            continue
        if not relative:
            raise SourceError(f"Expected a folder; received {location}, which is a file. Name the folder around it.")
        if "" in relative.split("/"):
            problems.append(f"{relative}: a folder without a name")
            continue
        if not only and any(part.startswith(".") or is_os_file(part) for part in relative.split("/")):
            continue
        tag = next((info[key] for key in ("ETag", "etag", "md5Hash") if info.get(key)), None) or path.fs.ukey(name)
        files[relative] = f"{str(tag).strip(chr(34))}:{info['size']}"
    _refuse(location, problems)
    return files
