import importlib

import pytest

from ridgeline.executor import execute
from ridgeline.lineage import lineage


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


def test_lineage_leads_back_to_the_first_step(store, runs):
    origin = lineage(store, runs[2][1])
    assert origin.execution.component == "double"
    assert origin.inputs["number"].ref == runs[2][0]
    assert origin.inputs["number"].execution.parts.params == {"value": 2, "fail": False}


def test_lineage_of_an_unrecorded_artifact_is_empty(store):
    assert lineage(store, f"Number/{'0' * 64}").execution is None
