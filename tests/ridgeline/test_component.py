import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ridgeline.artifacts.base import Facts
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.artifacts.trials import Trials
from ridgeline.component import STEP_ENVIRONMENT, Champion, ParameterError, Params, component


def test_signature_is_the_declaration():
    train = importlib.import_module("components.train").train
    assert train.name == "train"
    assert train.inputs == {"examples": Examples}
    assert train.output is Model
    assert train.module == "components.train"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 2}, r"Unknown parameter train.epoch. Did you mean train.epochs\?$"),
        (
            {"cnn": {"units": 2}},
            r"Unknown parameter train.cnn.units. Expected one of train.cnn.filters, train.cnn.\w+.$",
        ),
        ({"mlp": {"hidden_unit": [2]}}, r"Unknown parameter train.mlp.hidden_unit. Did you mean .*mlp.hidden_units\?$"),
        ({"q": 2}, "Unknown parameter train.q. Expected one of .*train.penalty.kind.*cnn.filters.*mlp.hidden_units"),
        ({"epochs": True}, "train.epochs: expected a valid integer; received True"),
        ({"epochs": "5"}, "train.epochs: expected a valid integer; received '5'"),
        ({"penalty": {"l2": True}}, "train.penalty.l2: expected a valid number; received True"),
        ({"epochs": 0}, "train.epochs: expected greater than or equal to 1; received 0"),
        ({"epochs": "two"}, "train.epochs: expected a valid integer.* received 'two'"),
        ({"penalty": {"l2": -1}}, "train.penalty.l2: expected greater than or equal to 0; received -1"),
        ({"penalty": {"kind": "l3"}}, "train.penalty.kind: expected 'none', 'l1', .* or 'group'; received 'l3'"),
        ({"penalty": {"l1": float("nan")}}, "train.penalty.l1: expected a finite number"),
        ({"learning_rate": float("inf")}, "train.learning_rate: expected"),
        ({"mlp": {"hidden_units": [100, 0]}}, "train.mlp.hidden_units.1: expected greater than or equal to 1"),
        ({"seed": -1}, "train.seed"),
    ],
)
def test_bad_parameters_are_refused_by_name(values, message):
    train = importlib.import_module("components.train").train
    with pytest.raises(ParameterError, match=message):
        train.parse(values)


def test_params_are_frozen():
    train = importlib.import_module("components.train").train
    with pytest.raises(ValueError, match="frozen"):
        train.parse({}).epochs = 3


def test_every_kind_of_input_is_declared_by_its_annotation():
    steps = {
        name: importlib.import_module(f"components.{name}").__dict__[name] for name in ("train", "select", "evaluate")
    }
    assert (steps["train"].optional, steps["train"].resumes) == ({"sweep": SweepResult}, True)
    assert (steps["select"].inputs, steps["select"].groups) == ({}, {"trials": Trials})
    assert steps["evaluate"].champions == {"champion": Model}
    assert steps["evaluate"].inputs == {"examples": Examples, "model": Model}


def test_a_champion_that_cannot_be_read_is_marked_in_keys():
    assert Champion("ab", None).digest == "unreadable (it is missing or damaged) ab"


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"champion": Champion[Model]}, "Expected `champion: X | None = None` for an input of step"),
        ({"model": Model, "champion": Champion[Model] | None}, "received .* without a default"),
        ({"examples": Examples | None}, "Expected `examples: X | None = None`"),
    ],
)
def test_an_input_that_may_be_left_out_needs_its_default(annotations, message):
    names = ", ".join([*annotations, "params", "output"])
    namespace: dict[str, Any] = {}
    exec(f"def step({names}): ...", namespace)
    namespace["step"].__annotations__ = {**annotations, "params": Params, "output": Path}
    with pytest.raises(TypeError, match=message):
        component(output=Model)(namespace["step"])


def test_a_champion_needs_an_input_to_compare_it_with():
    def step(examples: Examples, params: Params, output: Path, champion: Champion[Model] | None = None) -> Facts:
        raise NotImplementedError

    with pytest.raises(TypeError, match="Expected an input of the type of champion in step.*Add one of type Model"):
        component(output=Model)(step)


USES_KERAS = """
import json, os
from pathlib import Path
from ridgeline.artifacts.base import Artifact, Facts
from ridgeline.component import Params, component

class Numbers(Artifact[Facts]):
    facts_type = Facts

@component(output=Numbers)
def probe(params: Params, output: Path) -> Facts:
    import keras

    found = [keras.config.backend(), keras.config.floatx(), keras.config.epsilon(), keras.config.image_data_format()]
    print(json.dumps([*found, os.environ["TF_NUM_INTRAOP_THREADS"]]))
    return Facts()

Path("output").mkdir()
probe(params=Params(), output=Path("output"))
"""


@pytest.mark.fresh_process
def test_a_step_computes_alike_whatever_the_user_has_set_for_keras_and_tensorflow(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in STEP_ENVIRONMENT}
    (tmp_path / ".keras").mkdir()
    settings = {"floatx": "float16", "epsilon": 0.1, "backend": "jax", "image_data_format": "channels_first"}
    (tmp_path / ".keras" / "keras.json").write_text(json.dumps(settings))
    env |= {"HOME": str(tmp_path), "KERAS_BACKEND": "jax", "TF_NUM_INTRAOP_THREADS": "7"}
    command = [sys.executable, "-P", "-c", USES_KERAS]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["tensorflow", "float32", 1e-7, "channels_last", "1"]
