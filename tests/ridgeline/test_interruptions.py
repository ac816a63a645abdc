"""Writers that are killed, fail or lose power between any two calls: acknowledged work stays, nothing is half there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ridgeline.artifacts.base import verify
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.executor import execute
from ridgeline.registry import Registry
from ridgeline.store import Execution, Store, StoreError

NAME = "shoes"
WRITES = ("fsync", "rename", "replace", "mkdir")
DELETIONS = ("unlink", "rmdir")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out what takes long: the check in a fresh process, and the flushing itself, but not the calls."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr("ridgeline.registry.check", lambda *_: None)
    monkeypatch.setattr("ridgeline.registry.STILL_LOADED", timedelta(days=-1))


class Interrupter:
    """Counts the calls that change files, and does something before one of them."""

    def __init__(self, at: int, act: Callable[[], None], calls: Sequence[str]) -> None:
        self.left, self.act, self.calls = at, act, calls

    def count(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.act()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in self.calls:
            patch.setattr(os, name, self.wrap(getattr(os, name)))
        patch.setattr(shutil, "copyfile", self.wrap(shutil.copyfile))
        opened = pathlib.Path.open

        def open_path(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = opened(path, mode, *arguments, **options)
            try:
                if "w" in mode:
                    self.count()  # an empty file is left
            except OSError:
                file.close()
                raise
            return file

        patch.setattr(pathlib.Path, "open", open_path)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count()
            return function(*arguments, **options)

        return counted


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Do something in a child process that is killed before one of its calls; return whether it came so far."""
    if (pid := os.fork()) == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                Interrupter(number, lambda: os._exit(137), [*WRITES, *DELETIONS]).install(patch)
                action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 137)
    return code == 137


def fails_at(number: int, action: Callable[[], object]) -> bool:
    """Do something, one of whose calls finds a full disk; return whether it came so far."""
    reached = []

    def fail() -> None:
        reached.append(True)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        Interrupter(number, fail, WRITES).install(patch)
        with suppress(StoreError, shutil.Error):
            action()
    return bool(reached)


INTERRUPTIONS = pytest.mark.parametrize("interrupted_at", [killed_at, fails_at])


def every_state(
    folder: Path, interrupted_at: Callable[[int, Callable[[], object]], bool], act: Callable[[Path], object]
) -> Iterator[tuple[Path, bool]]:
    """Yield a copy of a folder after an interruption before each call, and whether there was one."""
    for number in itertools.count():
        copy = folder.with_name(f"{folder.name} {number}")
        shutil.copytree(folder, copy)
        interrupted = interrupted_at(number, lambda copy=copy: act(copy))  # type: ignore[misc]
        yield copy, interrupted
        shutil.rmtree(copy)
        if not interrupted:
            assert number > 10
            return


def expect_agreement(store: Store, registry: Registry) -> list[int]:
    """Check that all files of the registry say the same, and return the versions of the history."""
    folder, history = registry.root / NAME, registry.history(NAME)
    left = {path.name for path in folder.iterdir()} - {str(version) for version in registry.versions(NAME)}
    files = {".lock", "history.jsonl", "history-copy.jsonl", "champion.json"}
    assert left == (files if history else {".lock"})
    assert {path.name for path in registry.root.iterdir()} <= {NAME, ".lock", "models.config"}
    assert set(registry.versions(NAME)) <= {entry.version for entry in history}
    if history:
        assert json.loads((folder / "champion.json").read_text()) == {"version": history[-1].version}
        assert re.findall(r"versions: (\d+)", (registry.root / "models.config").read_text()) == [
            str(history[-1].version)
        ]
        assert (folder / "history-copy.jsonl").read_bytes() == (folder / "history.jsonl").read_bytes()
        registry.verify(store, NAME)
    return [entry.version for entry in history]


@pytest.fixture
def models(store, publish_servable):
    return [publish_servable(store, number) for number in (1, 2, 3)]


@pytest.fixture
def open_registry(store):
    """Return a function that opens a registry, which keeps one version."""
    return lambda root: Registry(root, 1, store=store)


@pytest.fixture
def serving(tmp_path, open_registry, models):
    """The folder of a registry that serves the second of two models."""
    for number, model in enumerate(models[:2], start=1):
        open_registry(tmp_path / "serving").push(model, f"run {number}")
    return tmp_path / "serving"


@INTERRUPTIONS
def test_the_first_push_is_done_or_undone(store, open_registry, models, tmp_path, interrupted_at):
    (tmp_path / "serving").mkdir()
    for root, interrupted in every_state(
        tmp_path / "serving", interrupted_at, lambda root: open_registry(root).push(models[0], "run 1")
    ):
        registry = open_registry(root)
        registry.recover()
        if (root / NAME / ".lock").exists():
            versions = expect_agreement(store, registry)
            assert versions in ([], [1]) if interrupted else versions == [1]
        assert registry.push(models[0], "run 1").version == 1
        assert expect_agreement(store, registry) == [1]


@INTERRUPTIONS
def test_a_push_is_done_or_undone(store, open_registry, models, serving, interrupted_at):
    for root, interrupted in every_state(
        serving, interrupted_at, lambda root: open_registry(root).push(models[2], "run 3")
    ):
        registry = open_registry(root)
        registry.recover()
        versions = expect_agreement(store, registry)
        assert versions in ([1, 2], [1, 2, 3]) if interrupted else versions == [1, 2, 3]
        assert registry.push(models[2], "run 3").version == 3
        assert expect_agreement(store, registry) == [1, 2, 3]


@INTERRUPTIONS
def test_a_rollback_is_done_or_undone_and_its_retry_completes_it(store, open_registry, serving, interrupted_at):
    def roll_back(root: Path) -> object:
        return open_registry(root).rollback(store, NAME, 1, reason="worse", by="ann", run_id="one run")

    for root, interrupted in every_state(serving, interrupted_at, roll_back):
        shutil.copytree(root, retried := root.with_name("retried"))
        roll_back(retried)
        assert expect_agreement(store, open_registry(retried)) == [1, 2, 1]
        shutil.rmtree(retried)
        open_registry(root).recover()
        versions = expect_agreement(store, open_registry(root))
        assert versions in ([1, 2], [1, 2, 1]) if interrupted else versions == [1, 2, 1]


@INTERRUPTIONS
def test_a_damaged_history_is_repaired_or_still_there_to_be_repaired(store, open_registry, serving, interrupted_at):
    history = serving / NAME / "history.jsonl"
    content = history.read_bytes()
    history.write_bytes(content[:-40])
    for root, _ in every_state(serving, interrupted_at, lambda root: open_registry(root).recover()):
        open_registry(root).recover()
        assert (root / NAME / "history.jsonl").read_bytes() == content
        kept = list((root / NAME).glob("history.jsonl.damaged-*"))
        assert kept
        for path in kept:
            path.unlink()
        expect_agreement(store, open_registry(root))


@INTERRUPTIONS
def test_a_step_is_done_or_not_and_leaves_nothing_behind(toy_steps, tmp_path, interrupted_at):
    from toy_steps.seed import seed

    (tmp_path / "steps").mkdir()

    def run(folder: Path) -> Execution:
        return execute(Store(folder), seed, {}, seed.parse({}), "run")

    for copy, interrupted in every_state(tmp_path / "steps", interrupted_at, run):
        store = Store(copy)
        store.clear_leftovers()
        left = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
        for ref in store.refs():
            verify(store.path(ref))
            left -= {path.relative_to(copy).as_posix() for path in store.path(ref).iterdir()}
        records = list(store.executions())
        assert len({name for name in left if not name.startswith("index/")} - {".lock"}) == len(records)
        assert all(record in store.executions(key=record.key) for record in records if record.state == "complete")
        assert all(record in store.executions(run_id=record.run_id) for record in records)
        assert all(store.holds(record.output) for record in records if record.output)
        assert interrupted or records[0].state == "complete"
        assert run(copy).state in ("complete", "cached")


# --- power cuts: what is flushed, and when


@pytest.fixture
def calls(monkeypatch):
    """The recorded calls: ("fsync", inode), ("rename", target, inodes of the source), ("mkdir", path)."""
    recorded: list[tuple[Any, ...]] = []
    fsync, rename, mkdir = os.fsync, os.rename, os.mkdir

    def record_fsync(descriptor):
        recorded.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def record_rename(source, target, **options):
        source = Path(source)
        tree = [source, *source.rglob("*")]
        recorded.append(("rename", Path(target), {path.stat().st_ino for path in tree}))
        rename(source, target, **options)

    def record_mkdir(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        recorded.append(("mkdir", Path(path)))

    for name, function in (("fsync", record_fsync), ("rename", record_rename), ("replace", record_rename)):
        monkeypatch.setattr(os, name, function)
    monkeypatch.setattr(os, "mkdir", record_mkdir)
    return recorded


def expect_flushed(calls: list[tuple[Any, ...]]) -> list[str]:
    """Check that a file or folder is flushed before it becomes visible, and its name before anything follows from it.

    Return the names of what became visible, in order.
    """

    def visible(path: Path) -> bool:
        return not any(part.startswith(".") or part in ("staging", "scratch") for part in path.parts)

    def flushed(part: list[tuple[Any, ...]]) -> set[int]:
        return {call[1] for call in part if call[0] == "fsync"}

    renames = [i for i, call in enumerate(calls) if call[0] == "rename" and visible(call[1])]
    for i, following in itertools.zip_longest(renames, renames[1:]):
        _, target, inodes = calls[i]
        assert inodes <= flushed(calls[:i]), f"{target} became visible before it was flushed"
        assert target.parent.stat().st_ino in flushed(calls[i:following]), f"the name {target} was not flushed"
    for i, call in enumerate(calls):
        if call[0] == "mkdir" and visible(call[1]):
            assert call[1].parent.stat().st_ino in flushed(calls[i:]), f"the folder {call[1]} was not flushed"
    return [calls[i][1].name for i in renames]


def test_artifacts_and_records_are_flushed(toy_steps, store, calls):
    from toy_steps.seed import seed

    done = execute(store, seed, {}, seed.parse({}), "run")
    artifact, record = expect_flushed(calls)
    assert (artifact, record[-5:]) == (done.output.split("/")[1], ".json")
    calls.clear()
    assert execute(store, seed, {}, seed.parse({}), "run").state == "cached"
    assert len(expect_flushed(calls)) == 1
    calls.clear()
    with pytest.raises(ArithmeticError):
        execute(store, seed, {}, seed.parse({"fail": True}), "run")
    assert len(expect_flushed(calls)) == 1


def test_a_replaced_artifact_and_a_mirrored_one_are_flushed(tmp_path, calls, publish_servable):
    root = f"memory://flushed-{tmp_path.name}"
    ref = publish_servable(Store(root, mirror=tmp_path / "here"), 1).ref
    assert expect_flushed(calls) == [ref.split("/")[1]]
    calls.clear()
    Store(root, mirror=tmp_path / "there").open(ref, PushedModel)
    assert expect_flushed(calls) == [ref.split("/")[1]]


def test_pushes_and_rollbacks_are_flushed(store, open_registry, models, tmp_path, calls):
    root, derived = tmp_path / "serving", ["history-copy.jsonl", "champion.json", "models.config"]
    calls.clear()
    for version in (1, 2):
        open_registry(root).push(models[version - 1], f"run {version}")
        assert expect_flushed(calls) == ["history.jsonl", str(version), *derived]
        history = next(i for i, call in enumerate(calls) if call[0] == "rename" and call[1].name == "history.jsonl")
        folder = root / NAME / str(version)
        copied = {path.stat().st_ino for path in [folder.parent, folder, *folder.rglob("*")]}
        assert copied <= {call[1] for call in calls[:history] if call[0] == "fsync"}
        calls.clear()
    open_registry(root).rollback(store, NAME, None, reason="worse", by="ann", run_id="run 4")
    assert expect_flushed(calls) == ["history.jsonl", *derived]


def test_a_repaired_history_is_flushed(open_registry, serving, calls):
    history = serving / NAME / "history.jsonl"
    history.write_bytes(history.read_bytes()[:-40])
    calls.clear()
    open_registry(serving).recover()
    assert expect_flushed(calls) == ["history.jsonl"]
    kept = next(history.parent.glob("history.jsonl.damaged-*"))
    assert calls[0] == ("fsync", kept.stat().st_ino)
