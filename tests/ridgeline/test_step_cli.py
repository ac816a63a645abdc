import importlib
from pathlib import Path

import pytest

from ridgeline.step_cli import run_step


def test_a_step_writes_a_whole_artifact(toy_steps, tmp_path, monkeypatch):
    monkeypatch.setenv("VALUE", "99")
    monkeypatch.setenv("value", "98")  # the environment decides nothing
    seed = importlib.import_module("toy_steps.seed").seed
    double = importlib.import_module("toy_steps.double").double
    run_step(seed, ["--value", "4", "--output", str(tmp_path / "four")])
    run_step(double, ["--number", str(tmp_path / "four"), "--output", str(tmp_path / "eight")])
    assert (tmp_path / "eight" / "number.txt").read_text() == "8"
    assert double.output.load(tmp_path / "eight").facts.digits == 1
    run_step(seed, ["--output", str(tmp_path / "default")])
    assert (tmp_path / "default" / "number.txt").read_text() == "21"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--value", "x"], "Parameter seed.value: expected a valid integer"),
        (["--fail"], "asked to fail"),
        (["--output", "."], "exists"),
    ],
)
def test_a_step_refuses_and_leaves_nothing(toy_steps, tmp_path, monkeypatch, arguments, message):
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    seed = importlib.import_module("toy_steps.seed").seed
    with pytest.raises((SystemExit, ArithmeticError), match=message):
        run_step(seed, [*(["--output", "new"] if "--output" not in arguments else []), *arguments])
    assert list(Path().iterdir()) == []
