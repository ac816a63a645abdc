import importlib
from pathlib import Path

import pytest

from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model
from ridgeline.component import ParameterError


def test_signature_is_the_declaration():
    train = importlib.import_module("components.train").train
    assert train.name == "train"
    assert train.inputs == {"examples": Examples}
    assert train.output is Model
    assert train.module == "components.train"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 2}, "Unknown parameter train.epoch. Did you mean train.epochs."),
        ({"q": 2}, "Unknown parameter train.q. Expected one of .*train.penalty.kind.*train.hidden_units"),
        ({"epochs": True}, "train.epochs: expected a valid integer; received True"),
        ({"epochs": "5"}, "train.epochs: expected a valid integer; received '5'"),
        ({"penalty": {"l2": True}}, "train.penalty.l2: expected a valid number; received True"),
        ({"epochs": 0}, "train.epochs: expected greater than or equal to 1; received 0"),
        ({"epochs": "two"}, "train.epochs: expected a valid integer.* received 'two'"),
        ({"penalty": {"l2": -1}}, "train.penalty.l2: expected greater than or equal to 0; received -1"),
        ({"penalty": {"kind": "l3"}}, "train.penalty.kind: expected 'none', 'l1', 'l2' or 'l1_l2'; received 'l3'"),
        ({"penalty": {"l1": float("nan")}}, "train.penalty.l1: expected a finite number"),
        ({"learning_rate": float("inf")}, "train.learning_rate: expected"),
        ({"hidden_units": [100, 0]}, "train.hidden_units.1: expected greater than or equal to 1"),
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


def test_main_writes_a_whole_artifact(toy_steps, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VALUE", "99")
    monkeypatch.setenv("value", "98")  # the environment decides nothing
    seed = importlib.import_module("toy_steps.seed").seed
    double = importlib.import_module("toy_steps.double").double
    seed.main(["--value", "4", "--output", str(tmp_path / "four")])
    double.main(["--number", str(tmp_path / "four"), "--output", str(tmp_path / "eight")])
    assert (tmp_path / "eight" / "number.txt").read_text() == "8"
    assert double.output.load(tmp_path / "eight").facts.digits == 1
    assert "Doubled/" in capsys.readouterr().out
    seed.main(["--output", str(tmp_path / "default")])
    assert (tmp_path / "default" / "number.txt").read_text() == "21"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--value", "x"], "Parameter seed.value: expected a valid integer"),
        (["--fail"], "asked to fail"),
        (["--output", "."], "exists"),
    ],
)
def test_main_refuses_and_leaves_nothing(toy_steps, tmp_path, monkeypatch, arguments, message):
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    seed = importlib.import_module("toy_steps.seed").seed
    with pytest.raises((SystemExit, ArithmeticError), match=message):
        seed.main([*(["--output", "new"] if "--output" not in arguments else []), *arguments])
    assert list(Path().iterdir()) == []
