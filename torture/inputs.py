"""Parameter sets through the form's schema and the steps, odd values on the command line, odd settings."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import hypothesis
from hypothesis import strategies as st

from ridgeline import pipeline
from ridgeline.artifacts.base import canonical_json
from ridgeline.component import ParameterError
from ridgeline.settings import Settings
from torture.report import Options, Row, run_cases, skipped

ODD: list[Any] = [
    None, True, False, "", " ", "nan", "inf", "-inf", "1e400", "-0", "0x10", "1_000", "٣", "½", "null", "true", "[]",
    0, -1, 1, 2**31, 2**63, 2**200, -(2**63), 0.1, 1.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"),
    [], [[]], [None], [0], [[1, 2]], ["a"], {}, {"a": 1}, [{}], "\0", "\ud800", "\u202e", "a" * 5000, "\n", "😀",
    "<script>alert(1)</script>", "../../etc/passwd", "{{ 1 + 1 }}", "%s%n", "$(id)", "'; DROP TABLE dag; --",
]  # fmt: skip
SETS = 10_000
ODD_VALUES = 3_000
SETTINGS = 400
SHARE = 0.6  # of the remaining time, for each of the first two rows
NO_OTHER = "0 other exceptions; each refusal names the field"


def run(options: Options) -> Iterator[Row]:
    """Yield the rows of the form, of the command line and of the settings."""
    os.environ["AIRFLOW_HOME"] = str(options.folder / "airflow")  # read at Airflow's first import
    os.chdir(options.folder)
    yield _form(options)
    yield _command_line(options)
    yield _settings(options)


def _row(options: Options, test: str, count: int, strategy: Any, judge: Callable[[Any], str], goal: str) -> Row:
    """Try generated examples and count the problems; an example is its own replay.

    Args:
        options: Seed, scale and deadline.
        test: The row's name.
        count: Number of examples at full scale.
        strategy: Yields the examples.
        judge: Returns what is wrong with the outcome of an example; empty if nothing is.
        goal: The goal in words.
    """
    if not options.wants(test):
        return skipped(test, goal, "not asked for")
    problems: Counter[str] = Counter()
    examples: dict[str, str] = {}
    number, start = 0, time.monotonic()
    deadline = start + SHARE * (options.deadline - start)

    @hypothesis.seed(options.seed)
    @hypothesis.settings(
        max_examples=options.count(count),
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def tried(example: Any) -> None:
        nonlocal number
        if time.monotonic() > deadline:
            return
        number += 1
        try:
            problem = judge(example)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            kind = problem.split(":")[0]
            problems[kind] += 1
            examples.setdefault(kind, f"{example!r}: {problem}")

    tried()
    found = ", ".join(f"{count} {kind}" for kind, count in problems.most_common(5))
    short = f" (of {options.count(count)}: out of time)" if number < 0.9 * options.count(count) else ""
    return Row(
        test, number, f"{found or '0 problems'}{short}", goal, not problems and number > 0, tuple(examples.values())
    )


def _values(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for a field of the form: mostly values that look right."""
    kinds = schema.get("type", [])
    strategies: list[st.SearchStrategy[Any]] = [st.sampled_from(ODD)]
    if "enum" in schema:
        strategies += [st.sampled_from(schema["enum"])] * 3
    if "integer" in kinds:
        strategies += [st.integers(0, 200), st.integers(-(2**70), 2**70)]
    if "boolean" in kinds:
        strategies += [st.booleans()] * 2
    if "pattern" in schema:
        strategies += [
            st.floats(0, 1).map(str),
            st.floats().map(str),
            st.from_regex(r"^[0-9.]{0,6}([eE][-+]?[0-9]{1,4})?$"),
        ]
    elif "string" in kinds:
        strategies += [st.text(max_size=20)] * 2
    if "array" in kinds:
        items = st.one_of(st.integers(-5, 500), st.floats(), st.text(max_size=3), st.sampled_from(ODD))
        good = st.lists(st.one_of(st.integers(1, 300), st.floats(1e-6, 1)), max_size=6)
        pairs = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)).map(list), max_size=4)
        strategies += [good, pairs, st.lists(items, max_size=6)]
    return st.one_of(strategies)


def _form(options: Options) -> Row:
    from airflow.sdk.exceptions import AirflowException

    from ridgeline.airflow.form import form, parse_form

    errors: tuple[type[Exception], ...] = (AirflowException, ValueError)
    declared = form(*pipeline.load_components().values())
    names = [name for name in declared if name != "rerun"]
    settings = Settings()
    defaults = {name: param.value for name, param in declared.items()}
    admitted = 0

    def judge(values: list[tuple[str, Any]]) -> str:
        nonlocal admitted
        given = dict(values)
        for name, value in given.items():
            try:
                copy.copy(declared[name]).resolve(value)
            except errors:
                return ""  # refused by the form
        admitted += 1
        try:
            params = parse_form(declared, defaults | given, settings)
        except ParameterError as error:
            shown = any(name in str(error) or name.split(".", 1)[1] in str(error) for name in given)
            return "" if shown else f"refusal names no field: {error}"
        for step in params.values():
            canonical_json(step.model_dump(mode="json")).encode()  # as the key does
        return ""

    pairs = st.one_of([st.tuples(st.just(name), _values(declared[name].schema)) for name in names])
    row = _row(
        options, "parameter sets through the form", SETS, st.lists(pairs, min_size=1, max_size=4), judge, NO_OTHER
    )
    measured = row.measured if row.skipped else f"{row.measured}; the form admitted {admitted}"
    return Row(row.test, row.cases, measured, row.goal, row.ok, row.failures, row.skipped)


def _command_line(options: Options) -> Row:
    steps = list(pipeline.load_components().values())
    settings = Settings()

    names = [f"{step.name}.{name}" for step in steps for name in step.defaults()]

    def judge(example: tuple[str, str]) -> str:
        name, text = example
        try:
            params = pipeline.parse_params(steps, pipeline.parse_assignments([f"{name}={text}"]), settings)
        except ParameterError as error:
            return "" if name in str(error) or name.split(".")[-1] in str(error) else f"names no field: {error}"
        for step in params.values():
            canonical_json(step.model_dump(mode="json")).encode()
        return ""

    texts = st.one_of(
        st.sampled_from(ODD).map(lambda value: value if isinstance(value, str) else json.dumps(value)),
        st.text(max_size=30),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5
        ).map(json.dumps),
    )
    odd_names = st.one_of(st.sampled_from(names), st.sampled_from(names).map(lambda name: f"{name}.x"))
    return _row(options, "odd values after --set", ODD_VALUES, st.tuples(odd_names, texts), judge, NO_OTHER)


def _settings(options: Options) -> Row:
    from typer.testing import CliRunner

    from ridgeline.cli import app

    commands = (["gc", "--dry-run"], ["models", "list"], ["explain", "ingest"])
    texts = [
        *("abc", "-1", "0", "1e9", "[1", "{}", "[]", "null", '{"a": 1}', '{"train.epochs": "x"}', "nan", "inf", " "),
        *("/proc/none", "/dev/null", "s4://nowhere/x", "file:///proc/none", "ftp://", "\udc80", "a" * 300),
        "https://user:geheim@[/x",
    ]
    names = [f"RIDGELINE_{name.upper()}" for name in Settings.model_fields]

    def judge(case: int, rng: random.Random) -> list[str]:
        name, text, command = rng.choice(names), rng.choice(texts), rng.choice(commands)
        result = CliRunner().invoke(app, command, env={name: text})
        what = f"{name}={text[:40]!r} ridgeline {' '.join(command)}"
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            return [f"{type(result.exception).__name__}: {what}: {str(result.exception)[:200]}"]
        shown = result.output
        with contextlib.suppress(ValueError):
            shown += result.stderr
        if result.exit_code and name not in shown:
            return [f"names no setting: {what}: {shown[:200]}"]
        if "geheim" in shown:
            return [f"shows a password: {what}: {shown[:200]}"]
        return []

    return run_cases(options, "odd settings", SETTINGS, "0 tracebacks; each refusal names the setting", judge)
