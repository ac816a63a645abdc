"""A power cut: ext4 on a loop device is shut down, with and without its journal flushed, and mounted again."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torture.report import Options, Row, run_cases, skipped
from torture.world import World, fork, leave_out_the_serving_check, wait

EXT4_IOC_SHUTDOWN = 0x8004587D
FLUSH_JOURNAL, LOSE_JOURNAL = 1, 2
MEGABYTES = 48
TEST = "power cut on ext4, journal {}"
GOAL = "0 acknowledged lost, 0 empty files, repairs itself"


class Disk:
    """An ext4 file system on a loop device.

    Attributes:
        mounted: Where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.image, self.mounted = folder / "image", folder / "mounted"
        self.mounted.mkdir()
        with self.image.open("wb") as file:
            file.truncate(MEGABYTES * 2**20)
        _command("mkfs.ext4", "-q", "-F", str(self.image))
        self.mount()

    def mount(self) -> None:
        """Mount it."""
        _command("mount", "-o", "loop", str(self.image), str(self.mounted))

    def unmount(self) -> None:
        """Unmount it, and wait until no other process holds it: one that ends, or one with a copy of all mounts."""
        subprocess.run(["umount", "--lazy", str(self.mounted)], capture_output=True, check=False)
        for _ in range(1200):
            held = subprocess.run(["losetup", "-j", str(self.image)], capture_output=True, text=True, check=True)
            if not held.stdout.strip():
                return
            time.sleep(0.05)
        raise RuntimeError(f"expected nobody to hold {self.image} any more; received {held.stdout}")

    def cut(self, flag: int) -> None:
        """Shut it down as it is; what is not on the disk is lost."""
        descriptor = os.open(self.mounted, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(descriptor)


def run(options: Options) -> Iterator[Row]:
    """Yield a row for each of the two kinds of cuts."""
    leave_out_the_serving_check()
    tests = {flag: TEST.format(name) for flag, name in ((FLUSH_JOURNAL, "flushed"), (LOSE_JOURNAL, "lost"))}
    if reason := not_possible(options.folder / "probe"):
        for test in tests.values():
            yield skipped(test, GOAL, reason)
        return
    template = World.template(options.folder / "template")
    for flag, test in tests.items():

        def cut(case: int, rng: random.Random, flag: int = flag) -> list[str]:
            return _cut(template, options.folder / f"cut {flag} {case}", rng, flag)

        yield run_cases(options, test, 60, GOAL, cut)


def not_possible(folder: Path) -> str:
    """Return why a power cut cannot be simulated here; empty if it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    try:
        disk = Disk(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"cannot mount ext4 on a loop device: {getattr(error, 'stderr', None) or error}"
    try:
        disk.cut(FLUSH_JOURNAL)
    except OSError as error:
        return f"cannot shut ext4 down: {error}"
    finally:
        disk.unmount()
    return ""


def _cut(template: World, folder: Path, rng: random.Random, flag: int) -> list[str]:
    disk = Disk(folder)
    try:
        world = template.copy(disk.mounted / "world", folder / "acknowledged.jsonl")
        os.sync()
        first_push = rng.random() < 0.3  # of a model without a history
        if first_push:
            shutil.rmtree(world.folder / "store" / "serving")
            os.sync()
        after_an_action = rng.random() < 0.5
        actions, delay = rng.randrange(1, 5), rng.uniform(0.0, 0.4)
        process = fork(world, lambda: world.act(rng, actions if after_an_action else 20))
        if after_an_action:
            wait(process)
        else:
            time.sleep(delay)
        disk.cut(flag)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            wait(process)
        disk.unmount()
        disk.mount()
        has_history = (world.folder / "store" / "serving" / "toy").exists()
        problems = [*world.zero_bytes(), *(world.lost() if has_history else ())]
        problems += world.after_the_next_start(rng) if has_history else ()
        return list(dict.fromkeys(problems))
    finally:
        disk.unmount()
        shutil.rmtree(folder, ignore_errors=True)


def _command(*words: str) -> None:
    subprocess.run(words, capture_output=True, text=True, check=True)
