"""Two hundred scheduled runs with changing data, and a store with 20,000 records."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from ridgeline import registry
from ridgeline.gc import collect_garbage
from ridgeline.lineage import lineage
from torture.report import Options, Row, skipped, timed
from torture.toys import STEPS
from torture.world import KEEP_RUNS, World, files_in, leave_out_the_serving_check

RUNS = 200
RECORDS = 20_000
FEW_RECORDS = 1_000
GC_EVERY = 10
ENTRY_MB = 0.002  # of the history and its copy, for each push


def run(options: Options) -> Iterator[Row]:
    """Yield the row of the runs and the row of the records."""
    leave_out_the_serving_check()
    yield _runs(options)
    yield _records(options)


def _runs(options: Options) -> Row:
    test = "scheduled runs with changing data"
    if not options.wants(test):
        return skipped(test, "flat", "not asked for")
    registry.STILL_LOADED = timedelta(0)  # else all versions are kept: the runs take less than its minutes
    world = World.template(options.folder / "runs")
    number_of_runs = max(40, options.count(RUNS))
    seconds, memory, disk, files = [], [], [], []
    for number in range(number_of_runs):
        seconds.append(timed(lambda: world.run(number, f"scheduled {number}", by="")))  # noqa: B023
        if number % GC_EVERY == GC_EVERY - 1:
            world.gc(KEEP_RUNS)
            memory.append(_memory_mb())
            disk.append(sum(path.stat().st_size for path in files_in(world.folder)) / 1e6)
            files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
    part = len(seconds) // 4
    early, late = statistics.median(seconds[part : 2 * part]), statistics.median(seconds[-part:])
    quarter = max(1, len(memory) // 4)
    checks = {
        "memory": memory[-1] <= memory[quarter] * 1.05,
        "disk": disk[-1] <= disk[quarter] * 1.2 + number_of_runs * ENTRY_MB,
        "open files": files[-1] <= files[quarter],
        "time": late <= early * 1.25,
    }
    measured = (
        f"per run CPU {early * 1000:.0f} → {late * 1000:.0f} ms, memory {memory[quarter]:.0f} → {memory[-1]:.0f} MB, "
        f"disk {disk[quarter]:.2f} → {disk[-1]:.2f} MB, open files {files[quarter]} → {files[-1]}"
    )
    failures = tuple(f"not flat: {name}" for name, flat in checks.items() if not flat)
    return Row(
        test,
        number_of_runs,
        measured,
        "flat but for the history",
        not failures,
        failures,
    )


def _records(options: Options) -> Row:
    """Compare a store with many records with one with few: only a clean-up may take longer, and at most linearly."""
    many = max(2 * FEW_RECORDS, options.count(RECORDS))
    test = f"{FEW_RECORDS} → {many} records"
    if not options.wants(test):
        return skipped(test, "flat", "not asked for")
    world = World.template(options.folder / "records")
    store = world.settings.open_store()
    template = list(store.executions())
    ref = next(record.output for record in template if record.component == STEPS[-1].name and record.output)
    flush, os.fsync = os.fsync, lambda fd: None
    store._newest_start = lambda component: ""  # type: ignore[method-assign] # the times below are in order already
    times: list[tuple[float, float, float]] = []
    try:
        count = 0
        for wanted in (FEW_RECORDS, many):
            while count < wanted:
                old = template[count % len(template)]
                key = f"{count:064x}"
                started_at = old.started_at + timedelta(seconds=count)
                store.record(old.model_copy(update={"key": key, "run_id": f"old {count}", "started_at": started_at}))
                count += 1
            world.run(3, "warm up")
            look_up = min(timed(lambda: world.run(3, "look up")) for _ in range(3)) / len(STEPS)
            trace = min(timed(lambda: lineage(world.settings.open_store(), ref)) for _ in range(2))
            clean = timed(lambda: _dry(world))
            times.append((look_up, trace, clean))
    finally:
        os.fsync = flush
    (few_look_up, few_trace, few_clean), (look_up, trace, clean) = times
    checks = {
        "look-up": look_up <= few_look_up + 0.1,
        "lineage": trace <= few_trace + 0.25,
        "gc": clean <= 1.5 * few_clean * many / FEW_RECORDS + 0.5,
    }
    measured = (
        f"CPU of a step's look-up {few_look_up * 1000:.0f} → {look_up * 1000:.0f} ms, lineage {few_trace * 1000:.0f} → "
        f"{trace * 1000:.0f} ms, gc dry run {few_clean:.1f} → {clean:.1f} s"
    )
    failures = tuple(f"not flat: {name}" for name, flat in checks.items() if not flat)
    goal = "look-up + 0.1 s, lineage + 0.25 s at most; gc at most linear"
    return Row(test, many, measured, goal, not failures, failures)


def _dry(world: World) -> None:
    collect_garbage(world.settings.open_store(), world.settings.open_registry(), 50, dry_run=True, recent=timedelta(0))


def _memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
