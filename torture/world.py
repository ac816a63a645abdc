"""A store with a few runs and served versions, what is done to it, and what must always hold in it."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from ridgeline import pipeline
from ridgeline.artifacts.base import MANIFEST, ArtifactError, verify
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.gc import collect_garbage
from ridgeline.registry import RegistryError
from ridgeline.settings import Settings
from torture.toys import MODEL_NAME, STEPS

KEEP_RUNS = 5
STARTS = ("new run", "reused run", "rollback", "gc")  # what people do next
# Events of Python's audit hooks that change a file system or lock a file. A flush has none and is counted separately.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "fcntl.flock", "shutil.copyfile"}


def leave_out_the_serving_check() -> None:
    """Push without loading the model in a fresh process: a toy model is no SavedModel."""
    for module in ("ridgeline.registry", "ridgeline.serving_check"):
        importlib.import_module(module).check = lambda *_, **__: None  # type: ignore[attr-defined]


class World:
    """A store and its served models.

    Attributes:
        folder: Holds ``store/`` and ``tmp/``, the folder for temporary files.
        acknowledgements: A file outside of that folder, where finished actions are noted.
    """

    def __init__(self, folder: Path, acknowledgements: Path | None = None) -> None:
        self.folder = folder
        self.acknowledgements = acknowledgements or folder / "acknowledged.jsonl"
        self.settings = Settings(store=str(folder / "store"), manual_dir=None, keep_versions=3)

    @classmethod
    def template(cls, folder: Path) -> World:
        """Return a new world with four runs that each pushed, and a rollback."""
        world = cls(folder)
        (folder / "tmp").mkdir(parents=True)
        for value in range(4):
            world.run(value, f"template {value}")
        world.rollback("template rollback")
        return world

    def copy(self, folder: Path, acknowledgements: Path | None = None) -> World:
        """Return a copy of the world in another folder."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return World(folder, acknowledgements)

    # --- actions

    def run(self, value: int, run_id: str, seconds: float = 0.0, by: str = "ann") -> list[Any]:
        """Run the toy steps for a number, and return their results."""
        return list(self.results(value, run_id, seconds, by))

    def results(self, value: int, run_id: str, seconds: float = 0.0, by: str = "ann") -> Iterator[Any]:
        """Run the toy steps for a number, and yield each result as soon as it is there."""
        values = {"seed.value": value} | ({f"{step.name}.seconds": seconds for step in STEPS} if seconds else {})
        params = pipeline.parse_params(STEPS, values, self.settings)
        return pipeline.run(self.settings, STEPS, params, run_id, by)

    def rollback(self, run_id: str) -> Any:
        """Roll back to the previous champion; return None where there is none to roll back to."""
        try:
            return self.settings.open_registry().rollback(
                self.settings.open_store(), MODEL_NAME, None, reason="torture", by="bob", run_id=run_id
            )
        except RegistryError as error:
            if not str(error).startswith(("Expected another model", "Expected the name of a served model")):
                raise
            return None

    def gc(self, keep_runs: int = KEEP_RUNS) -> Any:
        """Collect garbage, also of runs that ended just now."""
        store, registry = self.settings.open_store(), self.settings.open_registry()
        return collect_garbage(store, registry, keep_runs, dry_run=False, recent=timedelta(0))

    def acknowledge(self, **facts: Any) -> None:
        """Note a finished action, as a caller would who was told that it is done."""
        with self.acknowledgements.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def act(self, rng: random.Random, actions: int, kinds: tuple[str, ...] = ("run", "run", "rollback", "gc")) -> None:
        """Do some random actions, each acknowledged when it is done."""
        for number in range(actions):
            kind = rng.choice(kinds)
            run_id = f"{kind} {number}"
            if kind == "run":
                for result in self.results(rng.randrange(100), run_id):
                    self.acknowledge(run=run_id, step=result.execution.component, output=result.execution.output)
                    if result.pushed and result.pushed.new:
                        self.acknowledge(action="push", version=result.pushed.version, run=run_id)
            elif kind == "rollback":
                if entry := self.rollback(run_id):
                    self.acknowledge(action="rollback", version=entry.version, run=run_id)
            else:
                self.gc()

    def start_again(self, kind: str) -> None:
        """Do one thing of `STARTS`."""
        if kind in STARTS[:2]:
            self.run(500 if kind == STARTS[0] else 3, "next")
        elif kind == "rollback":
            self.rollback("next")
        else:
            self.gc()

    # --- what must hold

    def acknowledged(self) -> list[dict[str, Any]]:
        """Return the noted actions."""
        if not self.acknowledgements.exists():
            return []
        lines = self.acknowledgements.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def lost(self) -> Iterator[str]:
        """Yield what was acknowledged and is not there any more: results of the last runs, pushes and rollbacks."""
        done = self.acknowledged()
        store = self.settings.open_store()
        recent = list(dict.fromkeys(fact["run"] for fact in done if "step" in fact))[-KEEP_RUNS + 2 :]
        records = {(record.run_id, record.component, record.output) for record in store.executions()}
        for fact in done:
            if "step" in fact and fact["run"] in recent:
                if (fact["run"], fact["step"], fact["output"]) not in records:
                    yield f"lost record: {fact}"
                try:
                    verify(store.path(fact["output"]))
                except (ArtifactError, OSError) as error:
                    yield f"lost result: {fact}: {error}"
        try:
            history = self.settings.open_registry().history(MODEL_NAME)
        except Exception as error:
            yield f"unreadable history: {error}"
            return
        entries = [(entry.action, entry.version, entry.run_id) for entry in history]
        wanted = [(fact["action"], fact["version"], fact["run"]) for fact in done if "action" in fact]
        found = [entry for entry in entries if entry in wanted]
        if found != wanted:
            yield f"lost push or rollback: acknowledged {wanted}; the history has {entries}"
        elif wanted and entries.index(wanted[-1]) < len(entries) - 2 - (entries[-1][2] == "next"):
            yield f"lost push or rollback: {wanted[-1]} is not the last of {entries}"

    def damaged(self) -> Iterator[str]:
        """Yield artifacts that are half visible, and records and histories that cannot be read."""
        root = self.folder / "store"
        for folder in root.glob("artifacts/*/*"):
            try:
                verify(folder)
            except (ArtifactError, OSError) as error:
                yield f"half-visible artifact: {folder.name[:12]}: {error}"
        records = list(root.glob("executions/*/*/[0-9]*.json"))
        readable = sum(1 for _ in self.settings.open_store().executions())
        if readable < len(records):
            empty = [path.name for path in records if path.stat().st_size == 0]
            yield f"damaged record: {len(records) - readable} of {len(records)} are left out; empty are {empty}"
        try:
            self.settings.open_registry().history(MODEL_NAME)
        except Exception as error:
            yield f"damaged history: {error}"

    def not_served(self, champion_only: bool = False) -> Iterator[str]:
        """Yield differences between the history, the files for other readers and the versions' own files."""
        registry, store = self.settings.open_registry(), self.settings.open_store()
        folder = registry.root / MODEL_NAME
        history = registry.history(MODEL_NAME)
        if not history:  # its first push was cut short
            yield from (f"version without an entry: {version}" for version in registry.versions(MODEL_NAME))
            return
        champion = history[-1]
        try:
            pointer = json.loads((folder / "champion.json").read_text())["version"]
        except (OSError, ValueError) as error:
            pointer = str(error)
        if pointer != champion.version:
            yield f"wrong champion.json: expected version {champion.version}; received {pointer}"
        config = (registry.root / "models.config").read_text() if (registry.root / "models.config").exists() else ""
        if f"versions: {champion.version} " not in config:
            yield f"wrong models.config: expected version {champion.version}; received {config!r}"
        artifact = {entry.version: entry.artifact for entry in history if entry.action == "push"}
        for version in [champion.version] if champion_only else registry.versions(MODEL_NAME):
            if version not in artifact:
                yield f"version without an entry: {version}"
                continue
            model = store.open(artifact[version], PushedModel)
            expected = {p.relative_to(model.saved_model): p.read_bytes() for p in files_in(model.saved_model)}
            served = folder / str(version)
            if {p.relative_to(served): p.read_bytes() for p in files_in(served)} != expected:
                yield f"wrong version: the files of {version} differ from {artifact[version]}"

    def leftovers(self) -> Iterator[str]:
        """Yield what a killed process left behind and nothing has cleared."""
        root = self.folder / "store"
        store = self.settings.open_store()
        for path in root.glob("staging/*"):
            yield f"staging: {path.name}"
        finished = {record.key for record in store.executions() if record.output}
        for path in root.glob("scratch/*"):
            if path.suffix == ".lock" and not path.with_suffix("").exists():
                yield f"lock file: {path.name}"
            elif path.stem in finished:
                yield f"scratch of a finished key: {path.name}"
        for path in root.glob("leases/*"):
            yield f"lease: {path.name}"
        for path in root.glob("executions/**/.*"):
            yield f"hidden record: {path.name}, {path.stat().st_size} bytes"
        for path in [*root.glob("serving/*/.*"), *root.glob("serving/.*")]:
            if path.name != ".lock":
                yield f"hidden file of the registry: {path.name}"
        for path in (self.folder / "tmp").glob("*"):
            yield f"temporary file: {path.name}"

    def zero_bytes(self) -> Iterator[str]:
        """Yield empty files among the champion, history, records, manifests and published files."""
        root = self.folder / "store"
        records = [*root.glob("executions/*/*/[0-9]*.json"), *root.glob(f"artifacts/*/*/{MANIFEST}")]
        served = [path for path in root.glob("serving/**/*") if path.name[0] != "." and path.is_file()]
        published = [path for path in root.glob("artifacts/*/*/**/*") if path.is_file()]
        for path in dict.fromkeys([*records, *served, *published]):
            if path.stat().st_size == 0 and not any(part.startswith(".") for part in path.relative_to(root).parts):
                yield f"empty file: {path.relative_to(root)}"

    def after_the_next_start(self, rng: random.Random) -> Iterator[str]:
        """Start something in a new process, and yield all that is wrong then."""
        kind = rng.choice(STARTS)
        problem = in_new_process(self, lambda: self.start_again(kind))
        if problem:
            yield f"next start fails: {kind}: {problem}"
            return
        for check in (self.lost, self.damaged, self.not_served, self.leftovers):
            try:
                yield from (f"{problem}, after the next start, {kind}" for problem in check())
            except Exception as error:
                yield f"check fails: {check.__name__}: {type(error).__name__}: {error}"


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


# --- processes


def fork(world: World, action: Callable[[], Any], errors: Path | None = None) -> int:
    """Run an action in a new process that has everything imported already, and return its id.

    Args:
        world: Gives the folder for temporary files.
        action: What to do.
        errors: The file that gets the error's text, if there is one.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ["TMPDIR"] = str(world.folder / "tmp")
        tempfile.tempdir = None
        action()
        code = 0
    except BaseException as error:
        if errors:
            with suppress(OSError), errors.open("a") as file:
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                file.write(" ".join(f"{type(error).__name__} at {place}: {error}".split())[:600] + "\n")
    finally:
        os._exit(code)


def wait(pid: int, seconds: float = 120.0) -> int:
    """Wait for a process, kill it when the time is up, and return its exit code; negative for a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGALRM


def kill_after(pid: int, seconds: float) -> bool:
    """Kill a process after some time, and return whether it had to be: it may have ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def in_new_process(world: World, action: Callable[[], Any], seconds: float = 120.0) -> str:
    """Run an action in a new process and return its error; empty if there is none."""
    with tempfile.NamedTemporaryFile("r", dir="/dev/shm" if Path("/dev/shm").exists() else None) as errors:
        code = wait(fork(world, action, Path(errors.name)), seconds)
        text = errors.read().strip()
    if code == 0:
        return ""
    if code == -signal.SIGALRM:
        return f"no end after {seconds:.0f} s"
    return text or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")


def die_at(number: int) -> None:
    """Kill this process at the numbered change of the file system, counted from now."""
    count = itertools.count(1)

    def one_more() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"):
            one_more()

    flush = os.fsync

    def counted(fd: Any) -> None:
        one_more()
        flush(fd)

    os.fsync = counted
    sys.addaudithook(hook)
