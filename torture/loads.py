"""Readers that load the champion, as a server does, while versions are pushed, rolled back and pruned."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from torture.report import Options, Row, skipped
from torture.toys import MODEL_NAME
from torture.world import World, fork, leave_out_the_serving_check, wait

READERS = 4
LOADS = 1000
CHANGES = 100
GOAL = "0 failures, no recent champion pruned"
STILL_LOADED = timedelta(minutes=1)  # less than the time for which a former champion is kept


def run(options: Options) -> Iterator[Row]:
    """Yield a row for a registry that keeps one version, and one for a registry that keeps ten."""
    leave_out_the_serving_check()
    for keep in (1, 10):
        yield _loads(options, keep)


def _loads(options: Options, keep: int) -> Row:
    test = f"model loads during pushes and rollbacks, keep {keep}"
    if not options.wants(test):
        return skipped(test, GOAL, "not asked for")
    world = World.template(options.folder / f"keep {keep}")
    world.settings = world.settings.model_copy(update={"keep_versions": keep})
    loads, changes = options.count(LOADS), options.count(CHANGES)
    end = world.folder / "end"
    found = world.folder / "loads"

    def change() -> None:
        rng = options.rng("change", keep)
        for number in range(changes):
            if number % 4 == 3:
                world.rollback(f"rollback {number}")
            else:
                world.run(1000 + number, f"push {number}")
            time.sleep(rng.uniform(0.0, 0.03))
        end.touch()

    def read(reader: int) -> None:
        rng, number, failures = options.rng("read", reader), 0, []
        while not end.exists() or number < loads / READERS:
            number += 1
            try:
                _load(world, rng)
            except Exception as error:
                failures.append(f"failure: load {number} of reader {reader}: {type(error).__name__}: {error}")
        with found.open("a") as file:
            file.write(json.dumps([number, failures]) + "\n")

    errors = world.folder / "errors"
    processes = [fork(world, change, errors)]
    processes += [fork(world, lambda: read(reader), errors) for reader in range(READERS)]  # noqa: B023
    codes = [wait(process, 300) for process in processes]
    results = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    failures = [failure for _, some in results for failure in some]
    failures += errors.read_text().splitlines() if errors.exists() else []
    failures += [f"exit code: {code}" for code in codes if code]
    total = sum(number for number, _ in results)
    registry = world.settings.open_registry()
    versions = registry.versions(MODEL_NAME)
    for entry, successor in itertools.pairwise(registry.history(MODEL_NAME)):
        if entry.version not in versions and successor.at > datetime.now(UTC) - STILL_LOADED:
            failures.append(f"pruned too early: version {entry.version} was the champion until {successor.at}")
    measured = f"{len(failures)} failures in {total} loads during {changes} changes; {len(versions)} versions left"
    return Row(test, total, measured, GOAL, not failures and total >= loads, tuple(failures))


def _load(world: World, rng: random.Random) -> None:
    """Read the champion's number, then its files one after the other, and compare them with each other."""
    folder = world.settings.serving_dir() / MODEL_NAME
    version = json.loads((folder / "champion.json").read_text())["version"]
    number = (folder / str(version) / "saved_model.pb").read_text()
    time.sleep(rng.uniform(0.0, 0.05))  # a server takes its time to load
    data = (folder / str(version) / "variables" / "variables.data-00000-of-00001").read_text()
    time.sleep(rng.uniform(0.0, 0.05))
    index = (folder / str(version) / "variables" / "variables.index").read_text()
    if not number or data != number * 500 or index != number * 5:
        raise ValueError(f"version {version} has files of different models")
