"""Runs the parts: ``python -m torture [PART ...] [--seed N] [--scale X] [--case N]``, all of them by default."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torture.report import Options, Row

# Each part with its limit in seconds at full scale; it stops starting cases at nine tenths of it.
PARTS = {
    "kills": 900,
    "power_cut": 120,
    "corruption": 240,
    "concurrency": 150,
    "loads": 60,
    "disk_full": 240,
    "inputs": 300,
    "web": 180,
    "endurance": 60,
    "clock": 30,
}
STARTUP = 180  # seconds that a part may take besides, for imports and what it needs to begin
SHORTEST = 120.0  # seconds that a part has at any scale
MEMORY, ENOUGH_BYTES = Path("/dev/shm"), 4 * 2**30
SHOWN_FAILURES = 12


def main() -> int:
    """Print a row as soon as it is measured, and what replays a failure; return 1 if a goal is not met."""
    parser = argparse.ArgumentParser(prog="make torture", description="Print what was tried, what came out, the goal.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"Some of {', '.join(PARTS)}; all by default.")
    parser.add_argument("--seed", type=int, default=1, help="Decides every random choice; 1 by default.")
    parser.add_argument("--scale", type=float, default=1.0, help="Factor of cases and durations; 1 by default.")
    parser.add_argument("--case", type=int, help="The only case to run, to replay a failure; its files are kept.")
    parser.add_argument("--test", action="append", default=[], help="Part of the name of a row; only such rows run.")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)  # one part, in this process, as JSON
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"expected some of {', '.join(PARTS)}; received {', '.join(unknown)}")
    choice = (arguments.seed, arguments.scale, arguments.case, tuple(arguments.test))
    if arguments.rows:
        for row in rows_of(arguments.parts[0], *choice):
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        return 0
    line("test", "cases", "measured", "goal", "ok", "seed")
    failed = False
    for part in arguments.parts or PARTS:
        start = time.monotonic()
        for row in in_a_process_of_its_own(part, *choice):
            failed |= not row.ok
            line(row.test, str(row.cases), row.measured, row.goal, "ok" if row.ok else "FAILED", str(arguments.seed))
            if row.skipped:
                print(f"    skipped: {row.skipped}")
            for failure in row.failures[:SHOWN_FAILURES] if not row.ok else ():
                print(f"    {failure[:400]}")
            if not row.ok:
                print(f"    replay: {replay(part, arguments.seed, arguments.scale, row)}", flush=True)
        print(f"    {part}: {time.monotonic() - start:.0f} s", flush=True)
    return int(failed)


def replay(part: str, seed: int, scale: float, row: Row) -> str:
    """Return the command that repeats the first failed case of a row, or its part if it has no cases."""
    case = "" if row.first_failed is None else f" --case {row.first_failed} --test {shlex.quote(row.test)}"
    return f"python -m torture {part} --seed {seed} --scale {scale:g}{case}"


def line(*cells: str) -> None:
    """Print one row of the table."""
    print(" | ".join(cells), flush=True)


def rows_of(part: str, seed: int, scale: float, case: int | None = None, tests: tuple[str, ...] = ()) -> Iterator[Row]:
    """Run a part in this process and yield its rows.

    Args:
        part: One of `PARTS`.
        seed: Decides every random choice.
        scale: Factor of the number of cases and of durations.
        case: The only case to run; all if None.
        tests: Parts of the names of the only rows to run; all if empty.
    """
    logging.disable(logging.CRITICAL)
    module: ModuleType = importlib.import_module(f"torture.{part}")
    limit = max(SHORTEST, PARTS[part] * scale)
    folder = Path(tempfile.mkdtemp(prefix=f"torture-{part}-"))
    deadline = time.monotonic() + 0.9 * limit
    yield from module.run(Options(part, seed, scale, case, tests, folder, deadline))


@contextmanager
def emptied(keep: bool) -> Iterator[Path]:
    """Yield a new folder; afterwards unmount what is mounted below it and delete it, unless it is to be kept.

    It is in memory if there is space: a flush that no power cut follows shows nothing but the speed of a disk.
    """
    in_memory = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH_BYTES else None
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=in_memory))
    try:
        yield folder
    finally:
        mounted = [text.split()[1] for text in Path("/proc/mounts").read_text().splitlines() if str(folder) in text]
        for place in reversed(mounted):
            subprocess.run(["umount", "--lazy", place.replace("\\040", " ")], check=False, capture_output=True)
        if keep:
            print(f"    kept {folder}")
        else:
            subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=False)


def in_a_process_of_its_own(
    part: str, seed: int, scale: float, case: int | None = None, tests: tuple[str, ...] = ()
) -> Iterator[Row]:
    """Run a part in a fresh process that is killed when its time is up, and yield its rows."""
    command = [sys.executable, "-m", "torture", part, "--rows", "--seed", str(seed), "--scale", str(scale)]
    command += [word for test in tests for word in ("--test", test)]
    command += [] if case is None else ["--case", str(case)]
    limit = max(SHORTEST, PARTS[part] * scale) + STARTUP
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RIDGELINE_")}
    with emptied(keep=case is not None) as folder, (folder / "rows").open("w") as output:
        # All files are below one folder, which goes even if the part is killed.
        environment |= {"TMPDIR": str(folder), "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis"}
        with (folder / "errors").open("w") as errors, (folder / "rows").open() as rows:
            end = time.monotonic() + limit
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=errors, start_new_session=True)
            try:
                running, text = True, ""
                while running and time.monotonic() < end:
                    running = process.poll() is None
                    *whole, text = (text + rows.read()).split("\n")
                    for row in [json.loads(found) for found in whole if found.startswith("{")]:
                        yield Row(**row | {"failures": tuple(row["failures"])})
                    time.sleep(0.1)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if process.returncode:
            problem = f"no end after {limit:.0f} s" if running else f"exit code {process.returncode}"
            failures = [text for text in (folder / "errors").read_text().splitlines() if text.strip()]
            yield Row(part, 0, problem, "an end", False, tuple(failures[-SHOWN_FAILURES:]))


if __name__ == "__main__":
    sys.exit(main())
