"""What another Unix user may not read: it is named, with its owner, and never taken for empty."""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path

from ridgeline.masking import mask


def denied(error: PermissionError) -> str:
    """Return the message about a file or folder that this user may not use.

    Args:
        error: The error of the operating system.
    """
    if error.filename is None:
        return f"Cannot use a file: {error}. Give this user access to it."
    path = Path(os.fsdecode(error.filename))
    return (
        f"Cannot use {path}: {cause(error)}. Give this user access to it and to all that it holds, run as "
        f"{_owner(path)}, or name another folder in RIDGELINE_STORE or RIDGELINE_SERVING."
    )


def cause(error: OSError) -> str:
    """Return what is wrong with a file; if this user may not use it, also who the user and the owner are.

    Args:
        error: The error of the operating system.

    Example:
        >>> import errno
        >>> cause(FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere"))
        'No such file or directory'
    """
    if not isinstance(error, PermissionError) or error.filename is None:
        return error.strerror or str(error)
    owner = _owner(Path(os.fsdecode(error.filename)))
    return f"{error.strerror} for the user {_name(os.geteuid())}; it belongs to {owner}"


def message(error: BaseException) -> str:
    """Return an error's message for people: what a user may not read is explained, and secrets are hidden.

    Args:
        error: Any error.
    """
    return mask(denied(error) if isinstance(error, PermissionError) else error)


def expect_readable(root: Path, depth: int) -> None:
    """Check that a folder and those in it can be listed, as far as they exist: a search leaves out what it can't read.

    Args:
        root: The folder.
        depth: How many levels of folders below it are checked.

    Raises:
        PermissionError: If one can't be listed; it names the folder.
    """
    try:
        with os.scandir(root) as entries:  # of the last level, no name is read, however many there are
            found = [entry for entry in entries if entry.is_dir(follow_symlinks=False)] if depth else []
    except (FileNotFoundError, NotADirectoryError):
        return
    if not os.access(root, os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))
    for folder in found:
        # ext4 makes lost+found, for root alone, in the folder that it is mounted at
        if not folder.name.startswith(".") and folder.name != "lost+found":
            expect_readable(Path(folder.path), depth - 1)


def _owner(path: Path) -> str:
    """Return the owner of a path, or of the folder around it that can be seen."""
    for place in (path, *path.parents):
        try:
            return _name(place.stat().st_uid)
        except OSError:
            continue
    return "another user"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
