"""A full disk at many points of every step, a full /tmp, a read-only root, no home folder, a user without a name."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ridgeline import pipeline
from ridgeline.executor import execute
from torture import whole_runs
from torture.corruption import SWEEP
from torture.report import Options, Row, run_cases, skipped
from torture.world import World, files_in, in_new_process, leave_out_the_serving_check

PAGE = 4096
GOAL = "says to free disk space, records it, store as before"
STEPS_TEST = "disk full: every real step"
HOSTS_TEST = "whole run: /tmp full, read-only root, unwritable HOME, uid without a name"
NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
NOBODY = 54_321  # a user id without an entry in passwd
FULL_AT = (0.02, 0.3, 0.6, 0.9)  # of what a step writes


def run(options: Options) -> Iterator[Row]:
    """Yield the rows of full disks and of other hosts that a container may offer."""
    if os.geteuid() != 0 or not _mounts(options.folder / "probe"):
        yield skipped("disk full", GOAL, "mounting a tmpfs is not allowed")
        return
    leave_out_the_serving_check()
    yield _toys(options)
    if not any(map(options.wants, (STEPS_TEST, HOSTS_TEST))):
        return
    values = whole_runs.SYNTHETIC | SWEEP
    whole, problem = whole_runs.make(options.folder / "whole", values)
    if problem:
        yield Row(STEPS_TEST, 0, problem, GOAL, False, (problem,))
        return
    yield _steps(options, whole, values)
    yield from _hosts(options)


class SmallDisk:
    """A tmpfs of a size that can be changed.

    Attributes:
        mounted: Where it is mounted.
    """

    def __init__(self, mounted: Path, size: int = 2**30) -> None:
        self.mounted = mounted
        mounted.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted))

    def leave(self, free: int) -> None:
        """Leave some bytes free, a whole number of pages."""
        found = os.statvfs(self.mounted)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        _mount("-o", f"remount,size={max(PAGE, used + free // PAGE * PAGE)}", str(self.mounted))

    def grow(self) -> None:
        """Free more than enough."""
        _mount("-o", f"remount,size={2**30}", str(self.mounted))

    def unmount(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", str(self.mounted)], check=False, capture_output=True)


def _toys(options: Options) -> Row:
    template = World.template(options.folder / "template")

    def full(case: int, rng: random.Random) -> list[str]:
        disk = SmallDisk(options.folder / f"toys {case}")
        try:
            world = template.copy(disk.mounted / "world", disk.mounted.with_name(f"acknowledged {case}"))
            disk.leave(case * PAGE)
            before = set(world.settings.open_store().refs())
            problem = in_new_process(world, lambda: world.run(700, "full"))
            problems = _judged(problem)
            clean_up = in_new_process(world, lambda: world.gc(keep_runs=1))
            if clean_up and "free disk space" not in clean_up.lower():
                problems.append(f"gc fails on a full disk: {clean_up}")
            elif clean_up:
                problems.append("gc cannot free anything: it needs free space itself")
            disk.grow()
            after = set(world.settings.open_store().refs())
            if not problem and not after - before:
                problems.append("nothing was written")
            problems += world.after_the_next_start(rng)
            return [f"{text} ({case} pages free)" for text in dict.fromkeys(problems)]
        finally:
            disk.unmount()

    return run_cases(options, "disk full: toy steps and a push", 60, GOAL, full, share=0.3)


def _judged(problem: str) -> list[str]:
    """Return what is wrong with the outcome of a step on a full disk."""
    if problem.startswith("killed by signal"):
        return [f"killed: {problem}"]
    if problem and "free disk space" not in problem.lower():
        return [f"wrong message: {problem[:200]}"]
    return []


def _steps(options: Options, whole: World, values: dict[str, Any]) -> Row:
    steps = pipeline.plan("export", ["sweep"])
    params = pipeline.parse_params(steps, values, whole.settings)
    store = whole.settings.open_store()
    records = {record.component: record for record in store.executions() if record.output}
    cases = [(step, share) for step in steps for share in FULL_AT]

    def full(case: int, rng: random.Random) -> list[str]:
        step, share = cases[case]
        record = records[step.name]
        disk = SmallDisk(options.folder / f"step {case}")
        try:
            world = World(disk.mounted / "world", disk.mounted.with_name(f"acknowledged step {case}"))
            for ref in record.inputs.values():
                shutil.copytree(store.path(ref), world.settings.open_store().path(ref))
            (world.folder / "tmp").mkdir(parents=True)
            before = {path: path.read_bytes() for path in files_in(world.folder) if "artifacts" in path.parts}
            disk.leave(2 * PAGE + int(share * sum(store.sizes([record.output or ""]).values())))
            arguments = (world.settings.open_store(), step, record.inputs, params[step.name], "full")
            problem = in_new_process(world, lambda: execute(*arguments), 200)
            problems = _judged(problem)
            failed = [found for found in world.settings.open_store().executions() if found.state == "failed"]
            if problem and not problems and not failed:
                problems.append("no record of the failure")
            disk.grow()
            after = {path: path.read_bytes() for path in files_in(world.folder) if "artifacts" in path.parts}
            if problem and after != before:
                problems.append("the store is not as before")
            in_new_process(world, lambda: world.run(1, "next"))
            problems += world.leftovers()
            return [f"{text} ({step.name}, {share:.0%} of its output fits)" for text in dict.fromkeys(problems)]
        except Exception as error:
            return [f"check fails: {type(error).__name__}: {error} ({step.name})"]
        finally:
            disk.unmount()

    shuffled = random.Random(options.seed)
    shuffled.shuffle(cases)
    return run_cases(options, STEPS_TEST, len(cases), GOAL, full, share=0.6)


def _hosts(options: Options) -> Iterator[Row]:
    """Run everything once where something that is usually writable is not."""
    hosts: dict[str, Callable[[World], None]] = {
        "/tmp full": _full_temporary_folder,
        "read-only root": _read_only_root,
        "unwritable HOME": _no_home,
        "a uid without passwd entry": _nobody,
    }
    if not all(parent.stat().st_mode & 0o001 for parent in Path(sys.executable).resolve().parents):
        del hosts["a uid without passwd entry"]  # it could not start this Python
    names = list(hosts)

    def on_host(case: int, rng: random.Random) -> list[str]:
        world = World(options.folder / f"host {case}")
        (world.folder / "tmp").mkdir(parents=True)

        def act() -> None:
            hosts[names[case]](world)
            whole_runs.run_all(world, "run")

        problem = in_new_process(world, act, 300)
        if not problem or (case == 0 and "free disk space" in problem.lower()):
            return []
        return [f"fails: {names[case]}: {problem}"]

    yield run_cases(options, HOSTS_TEST, len(names), "runs, or says what to free", on_host)


def _full_temporary_folder(world: World) -> None:
    _private_mounts()
    _mount("-t", "tmpfs", "-o", f"size={16 * PAGE}", "tmpfs", str(world.folder / "tmp"))
    with suppress(OSError):
        (world.folder / "tmp" / "filler").write_bytes(b"x" * 2**20)


def _read_only_root(world: World) -> None:
    """Make everything but the store and the folder for temporary files read-only, for this process alone."""
    _private_mounts()
    _mount("--bind", str(world.folder), str(world.folder))
    _mount("-o", "remount,bind,ro", "/")


def _no_home(world: World) -> None:
    os.environ["HOME"] = "/proc"  # where not even root can write


def _nobody(world: World) -> None:
    for path in [world.folder, *world.folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    for parent in world.folder.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.environ["HOME"] = "/"


def _private_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("--make-rprivate", "/")


def _mounts(folder: Path) -> bool:
    try:
        SmallDisk(folder).unmount()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _mount(*words: str) -> None:
    for _ in range(20):
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(0.05)
    raise OSError(f"mount {' '.join(words)}: {done.stderr.strip()}")
