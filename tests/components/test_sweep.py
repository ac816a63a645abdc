from typing import Any

import numpy as np
import pytest

from components.sweep import EDGES, Params, _lanes, sweep
from components.train import train
from components.training.fit import fit, make_engine
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.trials import Trial
from ridgeline.component import ParameterError
from tests.components.conftest import make_bars

TRAINING = {"mlp": {"hidden_units": [6]}, "epochs": 2, "learning_rate": 0.1}
GRID = {"l1": [0.001, 0.1], "l2": [0.001, 0.03], "l1_l2": [[0.001, 0.001]], "group": [0.1], "train": TRAINING}


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
        ({"l1_l2": [[1, [1, 2]], [1, 2]]}, r"sweep.l1_l2: expected each point once; received \(1.0, 2.0\) twice"),
        ({"l1": [0.0]}, "sweep.l1.0: expected greater than 0"),
        ({"l1_l2": [[1, -2]]}, "sweep.l1_l2.0.1.*: expected greater than 0"),
        ({"l1_l2": [0.1]}, "sweep.l1_l2.0: expected a valid array"),
        ({"group": [0.1, "strong"]}, "sweep.group.1: expected a valid number"),
        ({"train": {"penalty": {"l2": 1}}}, "Cannot set sweep.train.penalty: the sweep tries .* lists l1, l2"),
        ({"train": {"solver": "proximal"}}, "Cannot set sweep.train.solver: the sweep chooses the solver: prox"),
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


def test_lists_in_place_of_strengths_are_every_combination():
    points = parse({"l1": [], "l2": [], "l1_l2": [[[1, 2], [3, 4]], [5, 6]], "dense": False}).points
    assert [tuple(point.strengths.values()) for point in points] == [(1, 3), (1, 4), (2, 3), (2, 4), (5, 6)]


def test_a_sparse_penalty_is_proximal_wherever_the_training_allows_it():
    solvers = {
        name: [params.params_at(point).solver for point in params.points]
        for name, params in {
            "sgd": parse({"l1": [1], "l2": [1], "l1_l2": [[1, 1]], "group": [1]}),
            "adam": parse({"l1": [1], "l2": [1], "train": {"optimizer": "adam"}}),
            "average": parse({"l1": [1], "l2": [1], "train": {"average": 0.9}}),
        }.items()
    }
    assert solvers["sgd"] == ["subgradient", "proximal", "subgradient", "proximal", "proximal"]
    assert set(solvers["adam"] + solvers["average"]) == {"subgradient"}


def test_the_tuned_profile_leaves_the_grids_strengths_alone():
    params = parse({"l2": [0.01], "train": {"profile": "tuned"}})
    assert params.train.epochs > 2
    assert params.params_at(params.points[-1]).penalty == params.points[-1]


# --- the trials


def test_each_trial_is_the_training_that_train_would_make(examples, swept, tmp_path):
    assert [str(trial) for trial in swept.facts.trials] == [
        "none", "l1 0.001", "l1 0.1", "l2 0.001", "l2 0.03", "l1_l2 0.001 + 0.001", "group 0.1",
    ]  # fmt: skip
    for index in (2, 4, 6):
        trial = swept.facts.trials[index]
        values = TRAINING | {"penalty": {"kind": trial.kind, **trial.strengths}, "solver": trial.solver}
        output = tmp_path / str(index)
        output.mkdir()
        model = train(examples=examples, params=train.parse(values), output=output)
        assert isinstance(model, Model)
        assert model.facts.metrics == trial.metrics
        assert [s.num_zeros for s in model.facts.sparsity] == [k.num_zeros for k in trial.kernels]
        assert trial.num_eliminated_pixels == model.facts.num_eliminated_pixels
        assert trial.num_eliminated_units == model.facts.num_eliminated_units
        kernels = [layer.get_weights()[0].astype(float) for layer in model.load_keras().layers if layer.weights]
        assert trial.l1_norm == pytest.approx(sum(np.abs(kernel).sum() for kernel in kernels))
        assert trial.l2_norm == pytest.approx(np.sqrt(sum((kernel**2).sum() for kernel in kernels)))
        counts = [np.histogram(np.clip(kernel[kernel != 0], -1, 1), EDGES)[0] for kernel in kernels]
        np.testing.assert_array_equal(swept.histograms()[index], counts)


def test_l1_zeros_and_l2_does_not(swept):
    dense, weak, l1, _, l2, _, group = swept.facts.trials
    assert weak.zero_share < l1.zero_share
    assert l1.zero_share > 0.1
    assert dense.zero_share == l2.zero_share == 0
    assert group.num_eliminated_pixels > 0
    assert l2.l2_norm < dense.l2_norm


def test_cross_entropy_is_the_loss_less_the_penalty(swept):
    trial = swept.facts.trials[5]
    penalty = 0.001 * trial.l1_norm + 0.001 * trial.l2_norm**2
    assert trial.metrics["val_cross_entropy"] == pytest.approx(trial.metrics["val_loss"] - penalty)


def test_a_trial_of_version_0_2_is_read(swept):
    trial = swept.facts.trials[5]
    values = trial.model_dump(mode="json")
    values["metrics"].pop("val_cross_entropy")
    old = {name: values[name] for name in ("kind", "solver", "metrics", "kernels", "diverged")}
    read = Trial.model_validate({**old, "l1": 0.001, "l2": 0.001})
    assert read.strengths == trial.strengths
    assert read.metrics == pytest.approx(trial.metrics)
    diverged = Trial.model_validate({**old, "l1": 0.001, "l2": 0, "metrics": {}, "kernels": [], "diverged": "nan"})
    assert (diverged.strengths, diverged.metrics) == ({"l1": 0.001}, {})
    assert (read.num_eliminated_pixels, read.num_eliminated_units) == (None, None)


def test_a_trial_that_states_its_penalty_is_read(swept):
    trial = swept.facts.trials[5]
    values = trial.model_dump(mode="json")
    values["penalty"] = values["metrics"]["val_loss"] - values["metrics"].pop("val_cross_entropy")
    read = Trial.model_validate(values)
    assert read.metrics == pytest.approx(trial.metrics)
    assert read.model_copy(update={"metrics": trial.metrics}) == trial
    diverged = Trial.model_validate({**values, "penalty": 0.0, "metrics": {}, "kernels": [], "diverged": "nan"})
    assert (diverged.strengths, diverged.metrics) == (trial.strengths, {})


def test_a_diverging_trial_is_recorded_and_the_others_continue(examples, tmp_path):
    grid = {"l1": [], "l2": [1e9], "group": [1e-3, 1e38], "train": TRAINING}
    result = run(examples, tmp_path / "some", grid)
    dense, l2, weak, group = result.facts.trials
    for trial in (dense, weak):
        assert trial.metrics["val_accuracy"] > 0
        assert trial.diverged is None
    for trial, counts in ((l2, result.histograms()[1]), (group, result.histograms()[3])):
        assert trial.metrics == {}
        assert "in epoch 1" in trial.diverged
        assert not counts.any()


# --- warm starts

CHAINS = {"l1": [0.001, 0.01], "l2": [0.001], "l1_l2": [[[0.002, 0.001], [0.02, 0.01]]], "warm_start": True}


def test_chains_go_from_strong_to_weak_and_are_not_divided():
    params = parse(CHAINS)
    chains = [[point.label for point in chain] for chain in params.chains()]
    assert chains == [
        ["no penalty"],
        ["L1 0.01", "L1 0.001"],
        ["L2 0.001"],
        ["L1 + L2 0.002 and 0.02", "L1 + L2 0.002 and 0.01"],
        ["L1 + L2 0.001 and 0.02", "L1 + L2 0.001 and 0.01"],
    ]
    parts = [parse({"warm_start": True} | part) for part in params.split(9)]
    assert [[[point.label for point in chain] for chain in part.chains()] for part in parts] == [[c] for c in chains]


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4])
def test_lanes_hold_whole_chains_and_each_once(monkeypatch, num_lanes):
    monkeypatch.setattr("components.sweep.os.cpu_count", lambda: num_lanes)
    params = parse(CHAINS)
    chains = [[params.params_at(point) for point in chain] for chain in params.chains()]
    lanes = _lanes(chains)
    assert 1 <= len(lanes) <= num_lanes
    assert sorted(map(str, (chain for lane in lanes for chain in lane))) == sorted(map(str, chains))


def test_each_training_starts_from_the_next_stronger_ones_weights(examples, tmp_path):
    grid = {"dense": False, "l1": [9.0, 0.01, 0.001], "l2": [], "warm_start": True, "train": TRAINING}
    lost, strong, weak = run(examples, tmp_path / "warm", grid).facts.trials
    assert lost.zero_share == 1  # nothing is learned from there
    params = parse(grid)
    _, strong_params, weak_params = (params.params_at(point) for point in params.chains()[0])
    engine = make_engine(examples, weak_params)
    first = fit(engine, strong_params)
    second = fit(engine, weak_params, initial=first.weights)
    assert (strong.metrics, weak.metrics) == (first.metrics, second.metrics)
    assert weak.metrics != fit(engine, weak_params).metrics


def test_a_warm_result_does_not_depend_on_how_the_grid_is_divided(examples, tmp_path):
    grid = CHAINS | {"l2": [1e9, 0.001, 0.01], "train": TRAINING}  # one diverges: the next start is not affected
    whole = run(examples, tmp_path / "whole", grid).facts
    parts = [
        run(examples, tmp_path / str(i), {"warm_start": True, "train": TRAINING} | part).facts
        for i, part in enumerate(parse(grid).split(3))
    ]
    assert whole.warm_start
    assert all(part.warm_start for part in parts)
    assert {str(t): t for part in parts for t in part.trials} == {str(trial): trial for trial in whole.trials}
    assert [trial for trial in whole.trials if trial.diverged]
