"""Whole runs on drawn images in forked processes that have TensorFlow imported, but have not used it."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ridgeline import pipeline
from ridgeline.component import STEP_ENVIRONMENT
from ridgeline.store import Store
from torture.report import Options, Row, run_cases
from torture.world import World, fork, in_new_process, kill_after

SYNTHETIC: dict[str, Any] = {"ingest.dataset": "synthetic_garments:1.0.0", "transform.validation_examples": 1_000}
MODEL = "synthetic_garments"
GOAL = "0 lost, 0 damaged, 0 leftovers, final bytes equal"
MOST_KILLS = 8  # in one store
ORPHANS_END = 30.0  # seconds after which no child of a killed run may be left


def import_tensorflow() -> None:
    """Import what steps import inside functions, so that forked processes need not."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.update(STEP_ENVIRONMENT)
    import keras  # noqa: F401
    import tensorflow  # noqa: F401
    import tensorflow_datasets  # noqa: F401

    pipeline.load_components()


def make(folder: Path, values: Mapping[str, Any] = SYNTHETIC, seconds: float = 400) -> tuple[World, str]:
    """Return a new world in which a whole run was made, and what went wrong; empty if nothing did."""
    import_tensorflow()
    world = World(folder)
    (world.folder / "tmp").mkdir(parents=True)
    return world, in_new_process(world, lambda: run_all(world, "run", values), seconds)


def run_all(world: World, run_id: str, values: Mapping[str, Any] = SYNTHETIC, target: str = "export") -> None:
    """Run the pipeline up to a step."""
    steps = pipeline.plan(target, ["sweep"] if any(name.startswith("sweep.") for name in values) else [])
    params = pipeline.parse_params(steps, values, world.settings)
    for result in pipeline.run(world.settings, steps, params, run_id):
        world.acknowledge(run=run_id, step=result.execution.component, output=result.execution.output)


def kills(options: Options) -> Iterator[Row]:
    """Kill whole runs at random moments; each case starts a run on one store again and again, until one survives."""
    test = "kills: whole runs, each until one survives"
    if not options.wants(test):
        return
    import_tensorflow()
    undisturbed = World(options.folder / "undisturbed")
    (undisturbed.folder / "tmp").mkdir(parents=True)
    start = time.monotonic()
    if problem := in_new_process(undisturbed, lambda: run_all(undisturbed, "run"), 300):
        yield Row(test, 0, problem, GOAL, False, (problem,))
        return
    usual = time.monotonic() - start
    expected = outputs(undisturbed)
    kills = 0

    def kill(case: int, rng: random.Random) -> list[str]:
        world = World(options.folder / f"run {case}")
        (world.folder / "tmp").mkdir(parents=True)
        problems: list[str] = []
        nonlocal kills
        for attempt in range(MOST_KILLS):
            process = fork(world, lambda: run_all(world, f"run {attempt}"), world.folder / "errors")  # noqa: B023
            killed = kill_after(process, rng.uniform(0.0, 0.7 * usual))
            kills += killed
            problems += _lost(world)
            if not killed:
                break
        if not _no_process_in(world.folder, ORPHANS_END):
            problems.append("orphan: a child process outlives its killed run")
        if problem := in_new_process(world, lambda: run_all(world, "last"), 300):
            return [*problems, f"next start fails: {problem}"]
        problems += [*_lost(world), *world.damaged(), *world.leftovers()]
        if outputs(world) != expected:
            problems.append(f"other bytes: {outputs(world)} instead of {expected}")
        history = world.settings.open_registry().history(MODEL)
        if len(history) != 1:
            problems.append(f"pushed more than once: {[entry.version for entry in history]}")
        if options.case is None:
            shutil.rmtree(world.folder)
        return list(dict.fromkeys(problems))

    row = run_cases(options, test, 12, GOAL, kill)
    yield dataclasses.replace(row, measured=f"{kills} kills: {row.measured}")


def outputs(world: World) -> dict[str, str]:
    """Return the last output of each step."""
    found: dict[str, str] = {}
    for record in world.settings.open_store().executions():
        if record.output:
            found.setdefault(record.component, record.output)
    return found


def _lost(world: World) -> list[str]:
    store: Store = world.settings.open_store()
    return [
        f"lost result: {fact}"
        for fact in world.acknowledged()
        if fact["output"] and not store.path(fact["output"]).joinpath("manifest.json").exists()
    ]


def _no_process_in(folder: Path, seconds: float) -> bool:
    """Wait until no other process names a folder in its command line; return whether that is so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(_mentions(process, folder) for process in Path("/proc").glob("[0-9]*")):
            return True
        time.sleep(0.2)
    return False


def _mentions(process: Path, folder: Path) -> bool:
    try:
        return process.name != str(os.getpid()) and str(folder).encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False
