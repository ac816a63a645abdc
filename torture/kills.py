"""SIGKILL at random moments: toy runs, pushes, rollbacks and clean-ups; and whole runs on drawn images."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from torture import whole_runs
from torture.report import Options, Row, run_cases
from torture.world import World, die_at, fork, kill_after, leave_out_the_serving_check, wait

GOAL = "0 lost, 0 half-visible, 0 damaged, 0 leftovers"
MOST_CHANGES = 250  # of the file system, in the actions of one case
ACTIONS = 4


def run(options: Options) -> Iterator[Row]:
    """Yield the row of the toy steps and the row of whole runs."""
    leave_out_the_serving_check()
    template = World.template(options.folder / "template")

    def kill(case: int, rng: random.Random) -> list[str]:
        world = template.copy(options.folder / f"case {case}")
        at_change = rng.random() < 0.7  # exactly repeatable; else after a time, also in the middle of a write
        change, delay = rng.randrange(1, MOST_CHANGES), rng.uniform(0.0, 0.3)

        def act() -> None:
            if at_change:
                die_at(change)
            world.act(rng, ACTIONS)

        process = fork(world, act, world.folder / "errors")
        if at_change:
            wait(process)
        else:
            kill_after(process, delay)
        problems = [f"action fails: {line}" for line in _lines(world.folder / "errors")]
        problems += [*world.lost(), *world.damaged()]
        problems += world.after_the_next_start(rng)
        if options.case is None:
            shutil.rmtree(world.folder)
        return list(dict.fromkeys(problems))

    yield run_cases(options, "kills: steps, push, rollback, gc", 1000, GOAL, kill, share=0.4)
    yield from whole_runs.kills(options)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
