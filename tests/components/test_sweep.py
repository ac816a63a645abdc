from typing import Any

import numpy as np
import pytest

from components.sweep import EDGES, Params, sweep
from components.train import train
from ridgeline.artifacts.model import Model
from ridgeline.component import ParameterError
from tests.components.conftest import make_bars

TRAINING = {"mlp": {"hidden_units": [6]}, "epochs": 2, "learning_rate": 0.1}
GRID = {"l1": [0.001, 0.1], "l2": [0.001, 0.03], "l1_l2": [[0.001, 0.001]], "train": TRAINING}


def parse(values: dict[str, Any]) -> Params:
    params = sweep.parse(values)
    assert isinstance(params, Params)
    return params


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Noisy bars without a test split, so that reading it would fail."""
    return make_bars(tmp_path_factory.mktemp("examples"), {"train": 320, "validation": 64}, noise=250)


def run(examples, output, values):
    output.mkdir()
    return sweep(examples=examples, params=sweep.parse(values), output=output)


@pytest.fixture(scope="module")
def swept(examples, tmp_path_factory):
    return run(examples, tmp_path_factory.mktemp("swept") / "whole", GRID)


# --- the grid


def test_the_default_grid_is_a_dense_training_and_eight_strengths_of_each_penalty():
    points = parse({}).points
    assert [point.kind for point in points] == ["none"] + ["l1"] * 8 + ["l2"] * 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"l1": [], "l2": [], "dense": False}, "sweep.l1: expected a grid of at least 1 point; received none"),
        ({"l2": [0.1, 0.2, 0.1]}, "sweep.l2: expected each point once; received 0.1 twice"),
        ({"l1_l2": [[1, 2], [1, 2]]}, r"sweep.l1_l2: expected each point once; received \(1.0, 2.0\) twice"),
        ({"l1": [i / 1000 for i in range(1, 193)]}, "sweep.l1: expected a grid of at most 200 .*received 201"),
        ({"l1": [0.0]}, "sweep.l1.0: expected greater than 0"),
        ({"train": {"penalty": {"l2": 1}}}, "Unknown parameter sweep.train.penalty"),
    ],
)
def test_a_bad_grid_is_refused_by_the_fields_name(values, message):
    with pytest.raises(ParameterError, match=message):
        sweep.parse(values)


@pytest.mark.parametrize("count", [1, 2, 3, 99])
def test_a_split_grid_has_the_same_points(count):
    params = parse(GRID)
    parts = [parse({"train": TRAINING} | part) for part in params.split(count)]
    assert len(parts) == min(count, len(params.points))
    assert {point for part in parts for point in part.points} == set(params.points)
    assert sum(len(part.points) for part in parts) == len(params.points)


def test_l1_is_proximal_wherever_the_training_allows_it():
    solvers = {
        name: [params.params_at(point).solver for point in params.points]
        for name, params in {
            "sgd": parse({"l1": [1], "l2": [1], "l1_l2": [[1, 1]]}),
            "adam": parse({"l1": [1], "l2": [1], "train": {"optimizer": "adam"}}),
            "average": parse({"l1": [1], "l2": [1], "train": {"average": 0.9}}),
        }.items()
    }
    assert solvers["sgd"] == ["subgradient", "proximal", "subgradient", "proximal"]
    assert set(solvers["adam"] + solvers["average"]) == {"subgradient"}


def test_the_tuned_profile_leaves_the_grids_strengths_alone():
    params = parse({"l2": [0.01], "train": {"profile": "tuned"}})
    assert params.train.epochs > 2
    assert params.params_at(params.points[-1]).penalty == params.points[-1]


# --- the trials


def test_each_trial_is_the_training_that_train_would_make(examples, swept, tmp_path):
    assert [str(trial) for trial in swept.facts.trials] == [
        "none", "l1 0.001", "l1 0.1", "l2 0.001", "l2 0.03", "l1_l2 0.001 + 0.001",
    ]  # fmt: skip
    for index in (2, 4):
        trial = swept.facts.trials[index]
        values = TRAINING | {"penalty": {"kind": trial.kind, "l1": trial.l1, "l2": trial.l2}, "solver": trial.solver}
        output = tmp_path / str(index)
        output.mkdir()
        model = train(examples=examples, params=train.parse(values), output=output)
        assert isinstance(model, Model)
        assert model.facts.metrics == trial.metrics
        assert [s.num_zeros for s in model.facts.sparsity] == [k.num_zeros for k in trial.kernels]
        kernels = [layer.get_weights()[0].astype(float) for layer in model.load_keras().layers if layer.weights]
        assert trial.l1_norm == pytest.approx(sum(np.abs(kernel).sum() for kernel in kernels))
        assert trial.l2_norm == pytest.approx(np.sqrt(sum((kernel**2).sum() for kernel in kernels)))
        counts = [np.histogram(np.clip(kernel[kernel != 0], -1, 1), EDGES)[0] for kernel in kernels]
        np.testing.assert_array_equal(swept.histograms()[index], counts)


def test_l1_zeros_and_l2_does_not(swept):
    dense, weak, l1, _, l2, _ = swept.facts.trials
    assert weak.zero_share < l1.zero_share
    assert l1.zero_share > 0.1
    assert dense.zero_share == l2.zero_share == 0
    assert l2.l2_norm < dense.l2_norm


def test_cross_entropy_is_the_loss_less_the_penalty(swept):
    trial = swept.facts.trials[5]
    penalty = 0.001 * trial.l1_norm + 0.001 * trial.l2_norm**2
    assert trial.cross_entropy == pytest.approx(trial.metrics["val_loss"] - penalty)


def test_a_diverging_trial_is_recorded_and_the_others_continue(examples, tmp_path):
    result = run(examples, tmp_path / "some", {"l1": [], "l2": [1e9], "train": TRAINING})
    assert result.facts.trials[0].metrics["val_accuracy"] > 0
    assert result.facts.trials[1].metrics == {}
    assert "in epoch 1" in result.facts.trials[1].diverged
    assert not result.histograms()[1].any()
