from __future__ import annotations

import pytest

from ridgeline.journal import Journal
from ridgeline.object_store import open_url

NAMES = [f"2026{month:02d}0{day}T000000.000000Z-{month}{day}.json" for month in (1, 2, 3) for day in (1, 2)]


@pytest.fixture(params=["local", "s3", "memory"])
def root(request, tmp_path):
    """The root of a store: a folder, a bucket, or a URL whose driver does not list by a prefix."""
    if request.param == "local":
        return tmp_path / "store"
    if request.param == "s3":
        return open_url(f"{request.getfixturevalue('bucket')}/store")
    return open_url(f"memory://journal-{tmp_path.name}")


def journal_in(root) -> Journal:
    return Journal(root, "things", "://" in str(root), lambda folder, name: {"colour": [f"{int(name[6:8]) % 2}" * 16]})


def fill(journal: Journal) -> None:
    for folder in ("a", "b_c"):
        for number, name in enumerate(NAMES):
            journal.add(folder, name, f"{folder} {number}", {"colour": [f"{number % 2}" * 16]})


def listed(monkeypatch, journal: Journal) -> list[str]:
    """The folders that a journal lists from now on, with the beginnings of the names."""
    seen: list[str] = []
    names, paths = journal._names, journal._paths

    def note_names(folder, prefix=""):
        seen.append(folder.name)
        return names(folder, prefix)

    def note_paths(folder):
        seen.append("all")
        return paths(folder)

    monkeypatch.setattr(journal, "_names", note_names)
    monkeypatch.setattr(journal, "_paths", note_paths)
    return seen


def test_files_are_found_by_time_and_by_value_without_a_listing_of_all(root, monkeypatch):
    fill(journal_in(root))
    journal = journal_in(root)
    seen = listed(monkeypatch, journal)
    newest = journal.newest("a")
    assert [next(newest) for _ in range(2)] == NAMES[:3:-1]
    assert seen == ["a", "202603"]
    seen.clear()
    assert next(journal.find("colour", "1" * 16)) == ("b_c", NAMES[5])
    assert list(journal.find("colour", "0" * 16, "a")) == [("a", NAMES[number]) for number in (4, 2, 0)]
    assert list(journal.find("colour", "2" * 16)) == []
    assert "all" not in seen
    assert journal.read("a", NAMES[3]) == "a 3"
    assert list(journal.newest("missing")) == []


def test_deleted_files_leave_nothing_in_the_index(root):
    journal = journal_in(root)
    fill(journal)
    journal.delete([("a", NAMES[4]), ("a", NAMES[2]), ("b_c", "20260101T000000.000000Z-missing.json")])
    assert list(journal.find("colour", "0" * 16, "a")) == [("a", NAMES[0])]
    assert list(journal.newest("a")) == [NAMES[number] for number in (5, 3, 1, 0)]
    assert len(journal.all()) == 10
    assert not journal.exists("a", NAMES[2])


def old_files(root, names=NAMES) -> None:
    """Write files as earlier releases did: without a month and an index."""
    for number, name in enumerate(names):
        (root / "things" / "a").mkdir(parents=True, exist_ok=True)
        (root / "things" / "a" / name).write_text(f"a {number}")


NEW = "20260301T120000.000000Z-new.json"


def test_files_of_earlier_releases_are_read_and_moved_by_the_next_one(root):
    old_files(root)
    journal = journal_in(root)
    assert list(journal.newest("a")) == NAMES[::-1]
    # the caller reads them, since their values are unknown
    assert [name for _, name in journal.find("colour", "0" * 16)] == NAMES[::-1]
    journal.replace("a", NAMES[0], "replaced")
    assert journal.read("a", NAMES[0]) == "replaced"
    assert not journal.is_complete()
    journal.add("a", NEW, "new", {"colour": ["0" * 16]})
    assert journal_in(root).is_complete()
    assert list(journal.newest("a")) == [NAMES[5], NEW, *NAMES[4::-1]]
    assert [name for _, name in journal_in(root).find("colour", "0" * 16)] == [NAMES[5], NEW, NAMES[3], NAMES[1]]
    assert journal.read("a", NAMES[0]) == "replaced"
    assert sorted(path.name for path in (root / "things" / "a").iterdir()) == ["202601", "202602", "202603"]
    assert len(journal.all()) == 7


def test_an_index_that_was_deleted_is_made_again(root):
    journal = journal_in(root)
    fill(journal)
    journal._remove(root / "index" / "things", list(journal._paths(root / "index" / "things")))
    again = journal_in(root)
    assert len(list(again.find("colour", "1" * 16))) == 12
    again.add("a", NEW, "new", {"colour": ["0" * 16]})
    assert len(list(again.find("colour", "1" * 16))) == 6


def test_a_kill_between_the_index_and_the_file_leaves_no_file_without_an_entry(root, monkeypatch):
    journal = journal_in(root)
    fill(journal)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "_write", die)
    name = "20260401T000000.000000Z-x.json"
    with pytest.raises(KeyboardInterrupt):
        journal.add("a", name, "text", {"colour": ["1" * 16]})
    assert next(journal.find("colour", "1" * 16)) == ("a", name)
    assert not journal.exists("a", name)
    assert next(journal.newest("a")) == NAMES[5]
    with pytest.raises(FileNotFoundError):
        journal.read("a", name)


def test_files_that_an_earlier_release_adds_later_are_moved_by_the_next_one(root, monkeypatch):
    journal = journal_in(root)
    fill(journal)
    old_files(root, [name := "20260228T000000.000000Z-old.json"])
    assert next(journal.newest("a")) == NAMES[5]
    assert journal.exists("a", name)
    read: list[tuple[str, str]] = []
    values_of = journal._values_of

    def read_values(*file):
        read.append(file)
        return values_of(*file)

    monkeypatch.setattr(journal, "_values_of", read_values)
    journal.add("a", NEW, "new", {"colour": ["0" * 16]})
    assert read == [("a", name)]  # the others are in the index
    assert [found for _, found in journal.find("colour", "0" * 16, "a")] == [NEW, NAMES[4], name, NAMES[2], NAMES[0]]
    assert journal.read("a", name) == "a 0"


def test_files_are_in_order_beside_an_index_that_is_half_made(root, monkeypatch):
    old_files(root)
    journal = journal_in(root)
    monkeypatch.setattr(journal, "_create", lambda paths: None)
    journal.add("a", NEW, "new", {})  # all moved
    monkeypatch.undo()
    journal._enter([("a", NAMES[0], {"colour": ["0" * 16]})])
    assert [name for _, name in journal.find("colour", "0" * 16)] == [NAMES[5], NEW, *NAMES[4::-1]]
