"""A clock that is set back by an hour, and two hosts whose clocks differ by ten minutes."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, tzinfo
from typing import Any

from torture.report import Options, Row, run_cases
from torture.toys import MODEL_NAME
from torture.world import World, leave_out_the_serving_check

GOAL = "order of history and records kept"


@contextmanager
def clock_off_by(offset: timedelta) -> Iterator[None]:
    """Let all of ridgeline read a clock that is wrong by an offset."""
    real_time, real_time_ns = time.time, time.time_ns

    class Datetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + offset

    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "ridgeline"]
    patched = [module for module in modules if getattr(module, "datetime", None) is datetime]
    time.time = lambda: real_time() + offset.total_seconds()
    time.time_ns = lambda: real_time_ns() + int(offset.total_seconds() * 1e9)
    for module in patched:
        module.datetime = Datetime  # type: ignore[attr-defined]
    try:
        yield
    finally:
        time.time, time.time_ns = real_time, real_time_ns
        for module in patched:
            module.datetime = datetime  # type: ignore[attr-defined]


def run(options: Options) -> Iterator[Row]:
    """Yield a row for each kind of wrong clock."""
    leave_out_the_serving_check()
    template = World.template(options.folder / "template")
    hour, minutes = timedelta(hours=1), timedelta(minutes=10)

    def stepping(rng: random.Random, number: int) -> timedelta:
        return -hour if number >= 3 else timedelta(0)

    def two_hosts(rng: random.Random, number: int) -> timedelta:
        return rng.choice((timedelta(0), minutes))

    for test, offset in (("clock set back by an hour", stepping), ("two hosts 10 minutes apart", two_hosts)):

        def case(case: int, rng: random.Random, offset: Any = offset) -> list[str]:
            world = template.copy(options.folder / f"clock {case}")
            before = len(world.settings.open_registry().history(MODEL_NAME))
            done: list[tuple[str, str]] = []
            runs: list[str] = []
            for number in range(6):
                with clock_off_by(offset(rng, number)):
                    if rng.random() < 0.3 and world.rollback(f"rollback {number}"):
                        done.append(("rollback", f"rollback {number}"))
                    else:
                        pushed = world.run(100 + number, f"run {number}")[-1].pushed
                        done += [("push", f"run {number}")] if pushed.new else []
                        runs.append(f"run {number}")
            with clock_off_by(offset(rng, 6)):
                kept = list(dict.fromkeys(record.run_id for record in world.settings.open_store().executions()))
                history = world.settings.open_registry().history(MODEL_NAME)[before:]
                problems = []
                if [(entry.action, entry.run_id) for entry in history] != done:
                    problems.append(f"order of the history: {history}")
                found = [run_id for run_id in reversed(kept) if run_id in runs]
                if found != runs or (runs and kept[0] != runs[-1]):
                    problems.append(f"order of records: expected {runs}; received {found} of {list(reversed(kept))}")
                world.gc(keep_runs=2)
                problems += [*world.damaged(), *world.not_served()]
                left = {record.run_id for record in world.settings.open_store().executions()}
                if not set(runs[-2:]) <= left:
                    problems.append(f"gc deletes a latest run: keeps {sorted(left)} of {runs}")
            shutil.rmtree(world.folder)
            return problems

        yield run_cases(options, test, 30, GOAL, case)
