"""Runs of the toy steps, for tests of what reads their records."""

import importlib

import pytest

from ridgeline.executor import execute


@pytest.fixture
def runs(toy_steps, store):
    """Three runs with another number each; their outputs by run."""
    seed = importlib.import_module("toy_steps.seed").seed
    double = importlib.import_module("toy_steps.double").double
    outputs = {}
    for value in (1, 2, 3):
        first = execute(store, seed, {}, seed.parse({"value": value}), f"run {value}").output or ""
        second = execute(store, double, {"number": first}, double.parse({}), f"run {value}").output
        outputs[value] = (first, second)
    return outputs
