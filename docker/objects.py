"""Copy the stack's own object store: ``python objects.py save >TAR`` and ``python objects.py load <TAR``.

This may be done while steps run: what is still being written is a step's unfinished work, or runs again.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from contextlib import suppress
from typing import BinaryIO

from upath import UPath

from ridgeline import object_store

UNFINISHED = ("scratch", "keys", "leases")  # of the store


def save(bucket: UPath, target: BinaryIO) -> None:
    """Write all objects but unfinished work into a tar archive.

    Args:
        bucket: The bucket.
        target: The archive.
    """
    with tarfile.open(fileobj=target, mode="w|") as archive:
        for name in sorted(object_store.sizes(bucket)):
            if name.split("/")[1] in UNFINISHED:
                continue
            with suppress(FileNotFoundError), bucket.fs.open((bucket / name).path, "rb") as file:
                entry = tarfile.TarInfo(name)
                entry.size = file.size
                archive.addfile(entry, file)


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
