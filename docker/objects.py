"""Copy the stack's own object store: ``python objects.py save >TAR`` and ``python objects.py load <TAR``.

This may be done while steps run: what is still being written is a step's unfinished work, or runs again.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
from typing import BinaryIO, cast

from upath import UPath

from ridgeline import object_store

UNFINISHED = ("store/scratch/", "store/keys/", "store/leases/")
SMALL_BYTES = 2**24  # what may be replaced meanwhile, such as a history, is smaller


def save(bucket: UPath, target: BinaryIO) -> None:
    """Write all objects but unfinished work into a tar archive.

    Args:
        bucket: The bucket.
        target: The archive.
    """
    with tarfile.open(fileobj=target, mode="w|") as archive:
        for name, size in sorted(object_store.sizes(bucket).items()):
            if name.startswith(UNFINISHED):
                continue
            try:
                opened = _opened(bucket / name, size)
            except FileNotFoundError:  # deleted just now; once its entry has begun, it is an error
                continue
            with opened as file:
                entry = tarfile.TarInfo(name)
                entry.size = file.seek(0, io.SEEK_END)
                file.seek(0)
                archive.addfile(entry, file)


def _opened(path: UPath, size: int) -> BinaryIO:
    """Return an object for reading; a small one is read at once, again if another process replaces it meanwhile."""
    if size >= SMALL_BYTES:
        return cast(BinaryIO, path.fs.open(path.path, "rb"))
    if not (found := object_store.read(path)):
        raise FileNotFoundError
    return io.BytesIO(found[0])


def load(bucket: UPath, source: BinaryIO) -> None:
    """Write the objects of a tar archive.

    Args:
        bucket: The bucket, which exists.
        source: The archive.
    """
    with tarfile.open(fileobj=source, mode="r|") as archive:
        for entry in archive:
            if content := archive.extractfile(entry):
                with bucket.fs.open((bucket / entry.name).path, "wb") as file:
                    shutil.copyfileobj(content, file, 2**24)


if __name__ == "__main__":
    protocol, _, path = os.environ["RIDGELINE_STORE"].partition("://")
    found = object_store.open_url(f"{protocol}://{path.partition('/')[0]}")
    if sys.argv[1] == "save":
        save(found, sys.stdout.buffer)
    else:
        load(found, sys.stdin.buffer)
