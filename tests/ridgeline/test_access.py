"""A second Unix user, and folders that a umask of 077 closed: unreadable is neither empty nor missing nor damaged."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ridgeline.access import denied, expect_readable
from ridgeline.cli import app
from ridgeline.settings import Settings
from ridgeline.store import Store

NOBODY = 65534
NAMES = {"root": "", "artifacts": "artifacts", "a type": "artifacts/Model", "records": "executions"}
NAMES |= {"a step's records": "executions/train", "served models": "serving"}
NAMES |= {"a served model": "serving/synthetic_garments"}


@pytest.fixture(scope="module")
def copy(synthetic_store: Store) -> Iterator[Path]:
    """A copy of a store in a folder that all users can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        shutil.copytree(synthetic_store.local, folder / "store")
        for path in [folder / "store", *(folder / "store").rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield folder / "store"
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def shared(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The copy, as the store of all commands."""
    monkeypatch.setenv("RIDGELINE_STORE", str(copy))
    return copy


@contextmanager
def closed(path: Path) -> Iterator[None]:
    """Close a file or folder as a umask of 077 does, and become another user, if this one is root."""
    mode = path.stat().st_mode & 0o777
    path.chmod(0o700 if os.geteuid() == 0 else 0)
    if root := os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


def refuse(arguments: list[str], path: Path) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "train" not in result.stdout  # only what precedes it can be judged
    assert result.stderr.startswith("error: Cannot "), result.stderr
    assert str(path) in result.stderr
    assert "Permission denied" in result.stderr
    assert "access" in result.stderr
    assert result.stderr.count("\n") == 1


SYNTHETIC = ["--set", "ingest.dataset=synthetic_garments:1.0.0", "--set", "transform.validation_examples=1000"]
COMMANDS = {
    "explain": ["explain", "train", *SYNTHETIC],
    "run": ["run", "train", *SYNTHETIC],
    "gc": ["gc", "--dry-run"],
    "show": ["show", "Model"],
    "lineage": ["lineage", "Model"],
}


@pytest.mark.parametrize("name", [name for name in NAMES if "served" not in name])
def test_a_folder_of_the_store_that_is_closed_is_named_by_every_command(shared: Path, name: str) -> None:
    place = shared / NAMES[name]
    with closed(place):
        for arguments in COMMANDS.values() if name == "root" else [COMMANDS["explain"], COMMANDS["gc"]]:
            refuse(arguments, place)


@pytest.mark.parametrize("name", ["root", "served models", "a served model"])
def test_a_folder_of_the_served_models_that_is_closed_is_named_by_every_command(shared: Path, name: str) -> None:
    place = shared / NAMES[name]
    with closed(place):
        for command in ("list", "show synthetic_garments", "verify synthetic_garments"):
            result = CliRunner().invoke(app, ["models", *command.split()])
            assert (result.exit_code, result.stdout) == (1, "")
            assert result.stderr.startswith(f"error: Cannot use {place}"), result.stderr
            assert "it belongs to " in result.stderr


@pytest.mark.parametrize(
    "find",
    [
        lambda store, refs: store.path(refs["train"]),
        lambda store, refs: store.path(refs["train"]) / "manifest.json",
        lambda store, refs: store.path(refs["train"]) / "model.weights.h5",
    ],
    ids=["an artifact", "a manifest", "a file"],
)
def test_an_artifact_that_is_closed_is_neither_missing_nor_damaged(
    shared: Path, refs: dict[str, str], find: Callable[[Store, dict[str, str]], Path]
) -> None:
    place = find(Store(shared), refs)
    with closed(place):
        refuse(COMMANDS["explain"], place)
        refuse(["show", refs["train"]], place)


def test_a_record_or_a_history_that_is_closed_is_named(shared: Path) -> None:
    record = next((shared / "executions" / "train").glob("*/*.json"))
    with closed(record):
        refuse(COMMANDS["explain"], record)
    history = shared / "serving" / "synthetic_garments" / "history.jsonl"
    with closed(history):
        refuse(["models", "list"], history)


def test_a_store_that_can_only_be_read_is_one_message_where_it_must_be_written(shared: Path) -> None:
    with closed(shared / ".lock"):
        refuse(["gc"], shared / ".lock")


def test_folders_that_are_missing_or_empty_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_readable(tmp_path / "missing", depth=3)
    expect_readable(tmp_path, depth=3)
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    assert Settings().open_registry().model_names() == []


def test_what_a_file_system_makes_for_root_alone_is_passed_over(shared: Path) -> None:
    (shared / "lost+found").mkdir()
    with closed(shared / "lost+found"):
        expect_readable(shared, depth=1)


def test_an_owner_without_a_name_is_shown_by_number(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    if os.geteuid() == 0:
        os.chown(path, 4242, 4242)
        assert "it belongs to uid 4242. Give" in denied(PermissionError(13, "Permission denied", str(path)))
    assert "Cannot use " in denied(PermissionError(13, "Permission denied", "/nowhere/at/all"))
