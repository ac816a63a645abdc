"""Runs of the toy steps, for tests of what reads their records."""

import importlib

import pytest

from ridgeline.artifacts.pushed_model import PushedModel, PushedModelFacts
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


@pytest.fixture
def publish_servable():
    """The function that publishes a servable model of a few bytes, one for each number, and returns it."""

    def publish(store, number, **facts):
        with store.stage() as folder:
            for file in ("saved_model/saved_model.pb", "saved_model/variables/variables.index", "check/images.npy"):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(f"{file} {number}")
            values = {
                "model_name": "shoes",
                "model_digest": f"{number:064x}",
                "evaluation_digest": "",
                "accuracy": number / 10,
                "image_shape": (1, 1),
                "class_names": ("a", "b"),
                "synthetic": True,
                "champion": f"{number - 1:064x}" if number > 1 else None,
            }
            return store.open(store.publish(PushedModel.seal(folder, PushedModelFacts(**values | facts))), PushedModel)

    return publish
