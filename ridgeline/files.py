"""Files that survive a kill and a power cut: flushed before they become visible, whole, and checked when read.

A name counts as written once its folder was flushed, too. An acknowledgement follows both.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

SMALL_BYTES, LARGE_BYTES = 2**16, 2**24  # of one reading
CHECKSUM = re.compile(r',\s*"sha256": ?"([0-9a-f]{64})"\s*\}\s*\Z')


def flush(path: Path) -> None:
    """Write a file's content, or the names in a folder, to the disk.

    Args:
        path: The file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if full := getattr(fcntl, "F_FULLFSYNC", None):  # macOS: the cache of the drive
            fcntl.fcntl(descriptor, full)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't flush a folder
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Write a folder and all that it holds to the disk.

    Args:
        folder: The folder.
    """
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            flush(path)


def read(path: str) -> bytes:
    """Return a file's content. A small file costs three system calls, fewer than `Path` makes.

    Args:
        path: The file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = [os.read(descriptor, SMALL_BYTES)]
        if len(parts[0]) == SMALL_BYTES:
            while part := os.read(descriptor, LARGE_BYTES):
                parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts)


def names(folder: Path) -> list[str]:
    """Return the names in a folder, which may be missing; a path for each would take ten times as long.

    Args:
        folder: The folder.
    """
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except FileNotFoundError:
        return []


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, unless it exists.

    Args:
        folder: The folder.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush(path.parent)


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder, whole and flushed, into a place that others read.

    Args:
        source: The file or folder, complete.
        target: Its new path, in the same file system; a file there is replaced.
    """
    flush_tree(source) if source.is_dir() else flush(source)
    source.rename(target)
    flush(target.parent)


def write(path: Path, text: str, unfinished: Path | None = None) -> None:
    """Create or replace a file by one rename: a reader, a kill or a power cut sees the old or the new one.

    Args:
        path: The file; its folder exists.
        text: Its content.
        unfinished: Where it is written before the rename; a hidden file beside it if None.
    """
    unfinished = unfinished or path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    move(unfinished, path)


def remove(path: Path) -> None:
    """Delete a file or a folder as far as possible, whether or not it exists.

    Args:
        path: The file or folder.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sign(text: str) -> str:
    """Add the SHA-256 of a JSON object's text as its last member.

    Args:
        text: The JSON object, not empty.

    Example:
        >>> sign('{"version": 3}')[:36]
        '{"version": 3, "sha256": "a52ee2c7de'
    """
    body = text.rstrip().removesuffix("}").rstrip()
    return f'{body}, "sha256": "{_sha256(body)}"}}'


def unsign(text: str) -> str:
    """Return the JSON object without the SHA-256 that `sign` added. A text of earlier releases has none.

    Args:
        text: The text of one JSON object.

    Raises:
        ValueError: If the SHA-256 is that of another text.
    """
    if not (checksum := CHECKSUM.search(text)):
        return text
    body = text[: checksum.start()]
    if _sha256(body) != checksum[1]:
        raise ValueError(f"Expected a text with the SHA-256 {checksum[1]}; received {_sha256(body)}. It is damaged.")
    return f"{body}}}"


def is_newer(text: str, schema_version: int) -> bool:
    """Return whether an undamaged text of `sign` states a schema version that a later release introduced.

    Args:
        text: The text of one JSON object.
        schema_version: The newest version that this release knows.

    Example:
        >>> is_newer(sign('{"schema_version": 3}'), 1), is_newer('{"schema_version": 3}', 1)
        (True, False)
    """
    try:
        stated = json.loads(unsign(text)).get("schema_version") if CHECKSUM.search(text) else None
    except (ValueError, AttributeError):
        return False
    return isinstance(stated, int) and stated > schema_version


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
