"""Small files in the order of their times, found by time or by a value without listing the others."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ridgeline import files, object_store

log = logging.getLogger(__name__)

MONTH = re.compile(r"[0-9]{6}", re.ASCII)
NAME = re.compile(r"(?:(.*)-)?([0-9]{8}T[0-9]{6}\..*\.json)", re.ASCII)  # after the folder, in an entry of the index
COMPLETE = "complete"

Place = Any  # a path of this machine, or a UPath in an object store
Values = Mapping[str, Iterable[str]]  # of a file, by the name of the index that finds it


class Journal:
    """Files whose names begin with a time. The files are the truth; the index can be made from them again.

    On disk::

        <root>/<kind>/[<folder>/]<month>/<name>.json    the files
        <root>/<kind>/[<folder>/]<name>.json            those of releases up to 0.2, until one is added to the folder
        <root>/index/<kind>/<field>/<xx>/<value>-[<folder>-]<name>.json   empty: this file has this value
        <root>/index/<kind>/complete                    empty: every file is in the index

    An entry of the index is written before its file, so that no kill leaves a new file that is not found. An entry
    without a file counts for nothing. Files that are deleted lose their entries first; a deletion that was killed is
    repeated by the next garbage collection. In an object store, which lists names by their beginning, a search by a
    value is one request, and the newest files of a folder are two. In a local folder, the index is split into 256
    folders by the first two digits of the value.

    Args:
        root: The root of the store.
        kind: The name of the folder of the files.
        remote: Whether the root is a URL.
        values_of: Reads the values of a file of a folder, both given by name; returns none if it is damaged.
    """

    def __init__(self, root: Place, kind: str, remote: bool, values_of: Callable[[str, str], Values]) -> None:
        self._values_of = values_of
        self._files, self._index, self._remote = root / kind, root / "index" / kind, remote
        self._known_complete = False

    def add(self, folder: str, name: str, text: str, values: Values, unfinished: Place | None = None) -> None:
        """Write a file, whole and flushed, and its entries in the index. The caller holds the store's lock.

        Args:
            folder: Its folder; empty for none.
            name: Its name.
            text: Its content.
            values: Its values: hexadecimal digits, at least two.
            unfinished: Where a local file is written before a rename; a hidden file beside it if None.
        """
        if self.is_complete():  # an earlier release may still be in use
            self._take_in([(folder, old) for old in self._names(self._folder(folder)) if _is_file(old)])
        else:
            self.complete()
        self._enter([(folder, name, values)])
        self._write(self._places(folder, name)[0], text, unfinished)

    def replace(self, folder: str, name: str, text: str) -> None:
        """Replace the content of a file. Its values stay.

        Args:
            folder: Its folder; empty for none.
            name: Its name.
            text: Its new content.
        """
        new, old = self._places(folder, name)
        self._write(new, text)
        if old.exists():
            old.unlink()

    def read(self, folder: str, name: str) -> str:
        """Return the content of a file.

        Args:
            folder: Its folder; empty for none.
            name: Its name.

        Raises:
            FileNotFoundError: If it is missing.
        """
        new, old = self._places(folder, name)
        for place in (new, old):
            with suppress(FileNotFoundError):
                return self._text(place)
        return self._text(new)  # it was moved meanwhile

    def exists(self, folder: str, name: str) -> bool:
        """Return whether a file exists.

        Args:
            folder: Its folder; empty for none.
            name: Its name.
        """
        new, old = self._places(folder, name)
        return any(place.exists() for place in (new, old, new))  # new again: it was moved meanwhile

    def newest(self, folder: str = "") -> Iterator[str]:
        """Yield the names in a folder, newest first; a month is listed when it is needed.

        Args:
            folder: The folder; empty for none.
        """
        place = self._folder(folder)
        listed = self._names(place)
        months = {name for name in listed if MONTH.fullmatch(name)}
        old: dict[str, list[str]] = {}
        for name in listed:
            if _is_file(name):
                old.setdefault(name[:6], []).append(name)
        for month in sorted({*months, *old}, reverse=True):
            names = {*(self._names(place / month) if month in months else ()), *old.get(month, ())}
            yield from filter(_is_file, sorted(names, reverse=True))  # in this order, the newest costs one test

    def all(self) -> list[tuple[str, str]]:
        """Return the folders and names of all files, newest first."""
        return sorted(set(self._all()), key=lambda found: found[::-1], reverse=True)

    def find(self, field: str, value: str, folder: str = "") -> Iterator[tuple[str, str]]:
        """Yield the folders and names of the files with a value, newest first.

        While the index is incomplete, these are all files, whatever their values and folders.

        Args:
            field: The name of the index.
            value: The value.
            folder: Only files in this folder; empty for all.
        """
        if not self.is_complete():
            yield from self.all()
            return
        prefix = f"{value}-{folder}-" if folder else f"{value}-"
        names = self._names(self._index / field / value[:2], prefix)
        found = [_file_of(name) for name in names if name.startswith(prefix)]
        yield from sorted(found, key=lambda file: file[::-1], reverse=True)

    def delete(self, unneeded: Iterable[tuple[str, str]]) -> None:
        """Delete files and their entries.

        Args:
            unneeded: Their folders and names.
        """
        unneeded = set(unneeded)
        if not unneeded:
            return
        entries = {path for path in self._paths(self._index) if _file_of(path.rpartition("/")[2]) in unneeded}
        self._remove(self._index, entries)
        places = {place for file in unneeded for place in _relative_places(*file)}
        self._remove(self._files, places)

    def is_complete(self) -> bool:
        """Return whether every file is in the index."""
        if not self._known_complete:
            self._known_complete = COMPLETE in self._names(self._index, COMPLETE)
        return self._known_complete

    def complete(self) -> None:
        """Enter all files into the index, unless they are, and move those of earlier releases.

        The caller holds the store's lock. In an object store, another host may do the same at the same time.
        """
        if not self.is_complete():
            self._take_in(self.all())
            self._create([self._index / COMPLETE])

    def _folder(self, folder: str) -> Place:
        return self._files / folder if folder else self._files

    def _places(self, folder: str, name: str) -> tuple[Place, Place]:
        new, old = _relative_places(folder, name)
        return self._files / new, self._files / old

    def _text(self, place: Place) -> str:
        return str((object_store.content(place) if self._remote else place.read_bytes()).decode())

    def _names(self, folder: Place, prefix: str = "") -> list[str]:
        """Return the names in a folder, which may be missing; of a remote one, those that begin with a prefix."""
        if not self._remote:
            return files.names(folder)
        return object_store.names(folder, prefix)

    def _all(self) -> Iterator[tuple[str, str]]:
        for path in self._paths(self._files):
            *folders, name = path.split("/")
            if _is_file(name):
                yield "/".join(folders[:-1] if folders and MONTH.fullmatch(folders[-1]) else folders), name

    def _paths(self, folder: Place) -> Iterator[str]:
        """Yield the paths of the files in a folder and below, relative to it."""
        if self._remote:
            yield from object_store.sizes(folder)
            return
        for place, folders, names in os.walk(folder, onerror=_expect_missing):
            inner = os.path.relpath(place, folder)
            found = [*names, *(name for name in folders if name.endswith(".json"))]  # a folder in place of a file
            yield from (name if inner == "." else f"{inner}/{name}" for name in found)

    def _take_in(self, found: Collection[tuple[str, str]]) -> None:
        """Enter files into the index, and move those of earlier releases."""
        if not found:
            return
        log.info("enters %d %s into their index", len(found), self._files.name)
        with ThreadPoolExecutor(object_store.NUM_TRANSFERS if self._remote else 1) as pool:
            values = pool.map(lambda file: self._values_of(*file), found)
            self._enter((*file, own) for file, own in zip(found, values, strict=True))
            for _ in pool.map(self._move, found):
                pass

    def _enter(self, found: Iterable[tuple[str, str, Values]]) -> None:
        self._create(
            self._index / field / value[:2] / "-".join(filter(None, (value, folder, name)))
            for folder, name, values in found
            for field, own in values.items()
            for value in own
        )

    def _create(self, paths: Iterable[Place]) -> None:
        """Create empty files; those that exist stay."""
        paths = list(paths)
        if self._remote:
            object_store.create(paths)
            return
        folders = {path.parent for path in paths}
        for folder in folders:
            files.make_folder(folder)
        for path in paths:
            path.touch()
        for folder in folders:
            files.flush(folder)

    def _write(self, place: Place, text: str, unfinished: Place | None = None) -> None:
        if self._remote:
            object_store.write(place, text.encode())
        else:
            files.make_folder(place.parent)
            files.write(place, text, unfinished)

    def _move(self, file: tuple[str, str]) -> None:
        """Move a file of an earlier release into the folder of its month."""
        new, old = self._places(*file)
        if self._remote:
            object_store.move(old, new)
        elif old.exists():
            files.make_folder(new.parent)
            files.move(old, new)

    def _remove(self, folder: Place, paths: Collection[str]) -> None:
        if self._remote:
            object_store.delete(folder, paths)
        else:
            for path in paths:
                (folder / path).unlink(missing_ok=True)


def _expect_missing(error: OSError) -> None:
    """Raise the error of a folder that can't be listed, unless it was just deleted."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _is_file(name: str) -> bool:
    return name[:1].isdecimal() and name.endswith(".json")


def _relative_places(folder: str, name: str) -> tuple[str, str]:
    """Return where a file is below the folder of its kind, and where releases up to 0.2 wrote it."""
    place = f"{folder}/" if folder else ""
    return f"{place}{name[:6]}/{name}", f"{place}{name}"


def _file_of(entry: str) -> tuple[str, str]:
    """Return the folder and the name of the file that an entry of the index is about."""
    found = NAME.fullmatch(entry.partition("-")[2])
    return found.groups("") if found else ("", "")  # type: ignore[return-value]
