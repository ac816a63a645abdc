"""Eight processes on one store: one key, different keys, clean-up, pushes and rollbacks."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torture.report import Options, Row, run_cases, skipped
from torture.world import World, fork, leave_out_the_serving_check, wait

PROCESSES = 8
SECONDS = 60.0


def run(options: Options) -> Iterator[Row]:
    """Yield the row of one key in all processes, and the row of everything at once."""
    leave_out_the_serving_check()
    template = World.template(options.folder / "template")

    def same_key(case: int, rng: random.Random) -> list[str]:
        world = template.copy(options.folder / f"key {case}")
        value, start = 1000 + case, time.time() + 0.1

        def act(number: int) -> Callable[[], Any]:
            def run_once() -> None:
                time.sleep(max(0.0, start - time.time()))
                world.run(value, f"run {number}", seconds=0.1)

            return run_once

        problems = _together(world, [act(number) for number in range(PROCESSES)], 120)
        counts = Counter(
            record.component
            for record in world.settings.open_store().executions()
            if record.run_id.startswith("run ") and record.state == "complete"
        )
        for name in ("seed", "double"):  # what the last one yields depends on the champion
            if counts[name] != 1:
                problems.append(f"more than one real run: {name} ran {counts[name]} times")
        return problems

    yield run_cases(options, "8 processes, one key", 20, "0 failures, 1 real run per key", same_key)
    yield _everything(options, template)


def _everything(options: Options, template: World) -> Row:
    test = "8 processes: runs, gc keeps 1, push, rollback"
    if not options.wants(test):
        return skipped(test, "0 failures", "not asked for")
    world = template.copy(options.folder / "everything")
    seconds = max(3.0, SECONDS * options.scale)
    end = time.monotonic() + seconds
    counts = world.folder / "counts"

    def repeat(role: str, action: Callable[[random.Random, int], object]) -> Callable[[], Any]:
        def act() -> None:
            rng, number = options.rng(role, 0), 0
            while time.monotonic() < end:
                try:
                    action(rng, number)
                except Exception as error:
                    with (world.folder / "errors").open("a") as file:
                        text = " ".join(f"{role}: {type(error).__name__}: {error}".split())
                        file.write(f"{text[:500]}\n")
                number += 1
                time.sleep(0.1 if role == "rollback" else 0.02)
            with counts.open("a") as file:
                file.write(f"{role} {number}\n")

        return act

    roles: dict[str, Callable[[random.Random, int], object]] = {
        f"runner {i}": lambda rng, n, i=i: world.run(rng.randrange(30), f"runner {i} {n}", seconds=0.05)  # type: ignore[misc]
        for i in range(3)
    }
    roles |= {
        f"one key {i}": lambda rng, n, i=i: world.run(n // 3, f"one key {i} {n}", seconds=0.02)  # type: ignore[misc]
        for i in range(2)
    }
    roles["pusher"] = lambda rng, n: world.run(2000 + n, f"pusher {n}")
    roles["rollback"] = lambda rng, n: world.rollback(f"rollback {n}")
    roles["gc"] = lambda rng, n: world.gc(keep_runs=1)
    problems = _together(world, [repeat(role, action) for role, action in roles.items()], seconds + 120)
    problems += [*world.damaged(), *world.after_the_next_start(options.rng("next", 0))]
    done = Counter[str]()
    with suppress(OSError):
        for line in counts.read_text().splitlines():
            done[line.split()[0]] += int(line.split()[-1])
    number = sum(done.values())
    kinds = Counter(" ".join(problem.split(":")[:2]) for problem in problems)
    found = f", {len(problems)} failures: {dict(kinds.most_common(4))}" if problems else ", 0 failures"
    measured = f"{', '.join(f'{n} × {role}' for role, n in done.items())} in {seconds:.0f} s{found}"
    return Row(test, number, measured, "0 failures", not problems, tuple(problems))


def _together(world: World, actions: list[Callable[[], Any]], seconds: float) -> list[str]:
    errors: Path = world.folder / "errors"
    os.sync()
    processes = [fork(world, action, errors) for action in actions]
    codes = [wait(process, seconds) for process in processes]
    lines = errors.read_text().splitlines() if errors.exists() else []
    return [f"failure: {line}" for line in lines] + [f"exit code: {code}" for code in codes if code not in (0, 1)]
