"""Damage to every file of every artifact type, of the registry and of the records."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ridgeline import pipeline
from ridgeline.artifacts.base import MANIFEST, ArtifactError
from ridgeline.executor import decide, open_inputs
from ridgeline.registry import RegistryError
from ridgeline.store import StoreError
from torture import whole_runs
from torture.report import Options, Row, run_cases
from torture.toys import MODEL_NAME
from torture.world import World, files_in, in_new_process, leave_out_the_serving_check

DAMAGES = ("flipped", "truncated", "deleted", "extra file", "other manifest")
DROPPINGS = (".DS_Store", "Thumbs.db", ".nfs000000000001")
SWEEP = {"sweep.l1": [1e-4], "sweep.l2": [1e-3]}


Case = Callable[[int, random.Random], list[str]]


def damage(path: Path, kind: str, other_manifest: Path, rng: random.Random) -> None:
    """Damage one file of an artifact.

    Args:
        path: The file.
        kind: One of `DAMAGES`.
        other_manifest: A manifest that takes the place of the artifact's own.
        rng: Chooses the byte.
    """
    content = path.read_bytes()
    if kind == "flipped" and content:
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
    elif kind == "truncated" and content:
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "extra file":
        path.with_name(f"{path.name}.copy").write_bytes(content)
    elif kind == "other manifest":
        folder = next(parent for parent in path.parents if (parent / MANIFEST).exists())
        shutil.copy(other_manifest, folder / MANIFEST)
    else:
        path.unlink()


def run(options: Options) -> Iterator[Row]:
    """Yield the rows of artifacts, what operating systems drop, records, the history and served files."""
    leave_out_the_serving_check()
    template = World.template(options.folder / "template")
    yield from _artifacts(options)
    yield run_cases(options, "corruption: .DS_Store and the like", 40, "ignored", _dropping(options, template), 0.2)
    yield run_cases(
        options, "corruption: a record's bit", 1000, "0 believed, 0 refusals", _record(options, template), 0.2
    )
    goal = "0 believed; repaired or one command named"
    yield run_cases(options, "corruption: a history's bit", 1000, goal, _history(options, template), 0.8)
    yield run_cases(options, "corruption: other files served", 150, goal, _served(options, template))


def _artifacts(options: Options) -> Iterator[Row]:
    """Damage the files of all artifact types: each is detected before use, named, and made again by its step alone."""
    test = "corruption: files of artifacts"
    if not options.wants(test):
        return
    values = whole_runs.SYNTHETIC | SWEEP
    world, problem = whole_runs.make(options.folder / "whole", values)
    if problem:
        yield Row(test, 0, problem, "detected", False, (problem,))
        return
    steps = pipeline.plan("export", ["sweep"])
    params = pipeline.parse_params(steps, values, world.settings)
    store = world.settings.open_store()
    records = {record.component: record for record in store.executions() if record.output}
    places = [
        (step, path, kind)
        for step in steps
        for path in sorted(files_in(store.path(records[step.name].output or "")))
        for kind in DAMAGES
    ]
    random.Random(options.seed).shuffle(places)
    made_again: set[str] = set()

    def damaged(case: int, rng: random.Random) -> list[str]:
        step, path, kind = places[case]
        ref = records[step.name].output or ""
        other = store.path(next(r.output for r in records.values() if r.output and r.output != ref)) / MANIFEST
        kept = options.folder / "kept"
        shutil.copytree(store.path(ref), kept)
        what = f"{step.name}'s {path.name} {kind}"
        problems = []
        try:
            damage(path, kind, other, rng)
            try:
                store.open(ref, step.output)
                problems.append(f"not detected: {what}")
            except ArtifactError as error:
                if str(store.path(ref)) not in str(error):
                    problems.append(f"not named: {what}: {error}")
            inputs = open_inputs(store, step, records[step.name].inputs)
            decision = decide(store, step, inputs, params[step.name])
            if decision.output is not None or "missing or damaged" not in decision.reason:
                problems.append(f"would not run again: {what}: {decision}")
            for later in steps:
                if ref in records[later.name].inputs.values() and later.champions == {}:
                    try:
                        open_inputs(store, later, records[later.name].inputs)
                        problems.append(f"used by {later.name}: {what}")
                    except ArtifactError:
                        pass
            if step.name not in made_again and not problems:
                made_again.add(step.name)
                problems += _repair(world, values, step.name, ref)
        except Exception as error:
            problems.append(f"other error: {what}: {type(error).__name__}: {error}")
        finally:
            shutil.rmtree(store.path(ref), ignore_errors=True)
            kept.rename(store.path(ref))
        return problems

    goal = "detected, named, made again by its step alone"
    yield run_cases(options, test, len(places), goal, damaged, share=0.5)


def _repair(world: World, values: dict[str, object], step: str, ref: str) -> list[str]:
    before = {record.started_at for record in world.settings.open_store().executions()}
    if problem := in_new_process(world, lambda: whole_runs.run_all(world, "repair", values), 300):
        return [f"repair fails: {step}: {problem}"]
    ran = [
        record.component
        for record in world.settings.open_store().executions()
        if record.started_at not in before and record.state == "complete"
    ]
    problems = [] if ran == [step] else [f"repair runs more than the step: {step}: {ran}"]
    try:
        world.settings.open_store().open(ref, pipeline.load_components()[step].output)
    except ArtifactError as error:
        problems.append(f"not repaired: {step}: {error}")
    return problems


def _dropping(options: Options, template: World) -> Case:
    def drop(case: int, rng: random.Random) -> list[str]:
        world = template.copy(options.folder / f"dropping {case}")
        store, registry = world.settings.open_store(), world.settings.open_registry()
        name = DROPPINGS[case % len(DROPPINGS)]
        folders = [path for path in store.local.glob("artifacts/*/*")]
        folders += [registry.root / MODEL_NAME / str(version) for version in registry.versions(MODEL_NAME)]
        folder = sorted(folders)[rng.randrange(len(folders))]
        inside = rng.choice([folder, *(path for path in folder.rglob("*") if path.is_dir())])
        (inside / name).write_bytes(b"\0\0\0\1Bud1")
        where = f"{name} in {inside.relative_to(store.local)}"
        history = registry.history(MODEL_NAME)
        problems = []
        try:
            for value in (0, 1, 2, 3):
                states = [result.execution.state for result in world.run(value, f"again {value}", by="")][:2]
                if states != ["cached"] * 2:
                    problems.append(f"damage: {where}: run {value} is {states}")
            if [entry.version for entry in registry.history(MODEL_NAME)] != [entry.version for entry in history]:
                problems.append(f"pushed again: {where}")
            if not world.run(100 + case, "new")[-1].pushed.new:
                problems.append(f"a new model is not pushed: {where}")
        except Exception as error:
            problems.append(f"error: {where}: {type(error).__name__}: {error}")
        shutil.rmtree(world.folder)
        return problems

    return drop


def flip(path: Path, rng: random.Random) -> bytes:
    """Flip one bit of a file, and return the content before."""
    content = bytearray(path.read_bytes())
    before = bytes(content)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return before


def _record(options: Options, template: World) -> Case:
    world = template.copy(options.folder / "records")
    store = world.settings.open_store()
    true = {record.model_dump_json() for record in store.executions()}
    paths = sorted(store.local.glob("executions/*/*/[0-9]*.json"))

    def damaged(case: int, rng: random.Random) -> list[str]:
        path = rng.choice(paths)
        before = flip(path, rng)
        try:
            found = {record.model_dump_json() for record in store.executions()}
        except Exception as error:
            return [f"refused: {path.name}: {type(error).__name__}: {error}"]
        finally:
            path.write_bytes(before)
        return [f"believed: {path.name}"] if found - true else []

    return damaged


def _history(options: Options, template: World) -> Case:
    def damaged(case: int, rng: random.Random) -> list[str]:
        world = template.copy(options.folder / "history")
        registry = world.settings.open_registry()
        path = registry.root / MODEL_NAME / "history.jsonl"
        true = _essence(registry.history(MODEL_NAME))
        kind = ("flipped", "flipped", "flipped", "truncated", "line missing", "empty")[case % 6]
        if kind == "flipped":
            flip(path, rng)
        elif kind == "truncated":
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        elif kind == "line missing":
            lines = path.read_bytes().splitlines(keepends=True)
            del lines[rng.randrange(len(lines))]
            path.write_bytes(b"".join(lines))
        else:
            path.write_bytes(b"")
        try:
            return [*_believed(world, true, kind), *_next_push(world, true, kind)]
        finally:
            shutil.rmtree(world.folder)

    return damaged


def _essence(history: list[Any]) -> list[Any]:
    return [(entry.version, entry.action, entry.artifact, entry.model_digest, entry.run_id) for entry in history]


def _believed(world: World, true: list[Any], kind: str) -> Iterator[str]:
    try:
        found = _essence(world.settings.open_registry().history(MODEL_NAME))
    except (StoreError, RegistryError):
        return
    except Exception as error:
        yield f"other error: {kind}: {type(error).__name__}: {error}"
        return
    if found != true:
        yield f"believed: {kind}: {len(found)} of {len(true)} entries"


def _next_push(world: World, true: list[Any], kind: str) -> Iterator[str]:
    """A push on a damaged history repairs it, or names a command of ridgeline that does."""
    try:
        world.run(900, "next")
    except (StoreError, RegistryError) as error:
        if "`ridgeline " not in str(error):
            yield f"no command named: {kind}: {error}"
        return
    except Exception as error:
        yield f"other error: {kind}: {type(error).__name__}: {error}"
        return
    history = _essence(world.settings.open_registry().history(MODEL_NAME))
    versions = [entry[0] for entry in history]
    if history[-1][4] != "next" or not {entry[0] for entry in true} <= set(versions):
        yield f"not repaired: {kind}: versions {versions}"
    elif versions[-1] <= max(entry[0] for entry in true):
        yield f"a version's number was given twice: {kind}: {versions}"


def _served(options: Options, template: World) -> Case:
    """Damage champion.json, models.config or a file of the served version: the next run serves the right one."""

    def damaged(case: int, rng: random.Random) -> list[str]:
        world = template.copy(options.folder / "served")
        registry = world.settings.open_registry()
        folder = registry.root / MODEL_NAME
        champion = registry.history(MODEL_NAME)[-1]
        version = sorted(files_in(folder / str(champion.version)))
        path = [folder / "champion.json", registry.root / "models.config", *version][case % (2 + len(version))]
        kind = rng.choice(("flipped", "truncated", "deleted"))
        damage(path, kind, path, rng)
        what = f"{path.relative_to(registry.root)} {kind}"
        try:
            value = next(v for v in range(4) if _is_model(world, v, champion.artifact))
            world.run(value, "again")
            problems = list(world.not_served(champion_only=True))
        except Exception as error:
            problems = [f"error: {what}: {type(error).__name__}: {error}"]
        shutil.rmtree(world.folder)
        return [f"{problem} after {what}" for problem in problems]

    return damaged


def _is_model(world: World, value: int, artifact: str) -> bool:
    text = world.settings.open_store().path(artifact).joinpath("saved_model", "saved_model.pb").read_text()
    return json.loads(text) == 2 * value
