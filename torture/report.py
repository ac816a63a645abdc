"""What a part receives, the rows that it yields, and the cases that it counts."""

from __future__ import annotations

import dataclasses
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run a part.

    Attributes:
        part: The part's name.
        seed: Decides every random choice.
        scale: Factor of the number of cases and of durations; 1 is the full size.
        case: The only case to run; all if None.
        tests: Parts of the names of the only rows to run; all if empty.
        folder: An empty folder to work in.
        deadline: `time.monotonic` at which to stop starting cases.
    """

    part: str
    seed: int
    scale: float
    case: int | None
    tests: tuple[str, ...]
    folder: Path
    deadline: float

    def count(self, full: int) -> int:
        """Return how many cases to run, of a full number."""
        return max(1, round(full * self.scale))

    def wants(self, test: str) -> bool:
        """Return whether a row is to be run."""
        return not self.tests or any(part in test for part in self.tests)

    def rng(self, test: str, case: int) -> random.Random:
        """Return the source of a case's random choices: the same for the same seed, test and case."""
        return random.Random(f"{self.seed} {test} {case}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        test: What was tried.
        cases: How many cases were tried.
        measured: What came out.
        goal: What was expected.
        ok: Whether the goal is met.
        failures: One example of each kind of failure, with the number of its case.
        skipped: Why nothing was tried; empty if something was.
        first_failed: Number of the first failed case; None if there is none.
    """

    test: str
    cases: int
    measured: str
    goal: str
    ok: bool
    failures: tuple[str, ...] = ()
    skipped: str = ""
    first_failed: int | None = None


def skipped(test: str, goal: str, reason: str) -> Row:
    """Return the row of a test that cannot run here."""
    return Row(test, 0, "skipped", goal, True, skipped=reason)


def run_cases(
    options: Options,
    test: str,
    count: int,
    goal: str,
    run: Callable[[int, random.Random], list[str]],
    share: float = 1.0,
) -> Row:
    """Run numbered cases until all are done or the time is up, and count what was found.

    Args:
        options: Seed, scale and deadline.
        test: The row's name; with the seed and a case's number it decides the case's random choices.
        count: Number of cases at full scale.
        goal: The goal in words; it is met if no case finds a problem.
        run: Takes a case's number and its source of random choices; returns the problems that it found, each as
            ``kind: details``.
        share: Share of the remaining time that the cases may take.
    """
    if not options.wants(test):
        return skipped(test, goal, "not asked for")
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    failed: list[int] = []
    done = 0
    start = time.monotonic()
    deadline = start + share * (options.deadline - start)
    for case in range(options.count(count)) if options.case is None else [options.case]:
        if time.monotonic() > deadline:
            break
        try:
            problems = run(case, options.rng(test, case))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            problems = [f"check fails: {type(error).__name__}: {error}, in {Path(where.filename).name}:{where.lineno}"]
        done += 1
        kinds.update({problem.split(":")[0] for problem in problems})
        for problem in problems:
            examples.setdefault(problem.split(":")[0], f"case {case}: {problem}")
        failed += [case] if problems else []
    found = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    wanted = options.count(count) if options.case is None else 1
    short = f" (of {wanted}: out of time)" if done < wanted else ""
    measured = f"{len(failed)} failed{short}{f': {found}' if found else ''}"
    return Row(
        test, done, measured, goal, not failed and done > 0, tuple(examples.values()), "", failed[0] if failed else None
    )


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds of this process's CPU time that a call takes: other processes do not disturb it."""
    start = time.process_time()
    function()
    return time.process_time() - start
