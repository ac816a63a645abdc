import re

import numpy as np
import pytest

from components.sweep import EDGES, choose, sweep
from components.sweep_report import render
from components.train import train
from ridgeline.artifacts.sweep_result import KernelFacts, Trial
from ridgeline.component import ParameterError
from tests.components.conftest import make_bars

TRAINING = {"hidden_units": [6], "epochs": 2, "learning_rate": 0.1}
GRID = {"l1": [0.001, 0.1], "l2": [0.001, 0.03], "l1_l2": [[0.001, 0.001]], "train": TRAINING}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Noisy bars without a test split, so that reading it would fail."""
    return make_bars(tmp_path_factory.mktemp("examples"), {"train": 320, "validation": 64}, noise=250)


@pytest.fixture(scope="module")
def other_examples(tmp_path_factory):
    return make_bars(tmp_path_factory.mktemp("other"), {"train": 32, "validation": 16})


def run(examples, output, values, **parts):
    output.mkdir()
    return sweep(examples=examples, params=sweep.parse(values), output=output, **parts)


@pytest.fixture(scope="module")
def swept(examples, tmp_path_factory):
    return run(examples, tmp_path_factory.mktemp("swept") / "whole", GRID)


# --- the grid


def test_the_default_grid_is_a_dense_training_and_eight_strengths_of_each_penalty():
    points = sweep.parse({}).points
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
    params = sweep.parse(GRID)
    parts = [sweep.parse({"train": TRAINING} | part) for part in params.split(count)]
    assert len(parts) == min(count, len(params.points))
    assert {point for part in parts for point in part.points} == set(params.points)
    assert sum(len(part.points) for part in parts) == len(params.points)


def test_l1_is_proximal_wherever_the_training_allows_it():
    solvers = {
        name: [params.params_at(point).solver for point in params.points]
        for name, params in {
            "sgd": sweep.parse({"l1": [1], "l2": [1], "l1_l2": [[1, 1]]}),
            "adam": sweep.parse({"l1": [1], "l2": [1], "train": {"optimizer": "adam"}}),
            "average": sweep.parse({"l1": [1], "l2": [1], "train": {"average": 0.9}}),
        }.items()
    }
    assert solvers["sgd"] == ["subgradient", "proximal", "subgradient", "proximal"]
    assert set(solvers["adam"] + solvers["average"]) == {"subgradient"}


def test_the_tuned_profile_leaves_the_grids_strengths_alone():
    params = sweep.parse({"l2": [0.01], "train": {"profile": "tuned"}})
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


def test_the_winner_is_the_most_accurate_and_its_parameters_are_trains(examples, swept, tmp_path):
    facts = swept.facts
    winner = facts.trials[facts.winner]
    assert winner.metrics["val_accuracy"] == max(trial.metrics["val_accuracy"] for trial in facts.trials)
    params = train.parse(facts.winner_params)
    assert (params.penalty.kind, params.penalty.l1, params.penalty.l2) == (winner.kind, winner.l1, winner.l2)
    assert params.hidden_units == (6,)


def test_a_sweep_put_together_from_parts_equals_the_whole_and_trains_nothing(examples, swept, tmp_path, monkeypatch):
    grids = [GRID | {"l1": [], "l1_l2": []}, GRID | {"dense": False, "l2": []}]
    parts = [run(examples, tmp_path / str(i), grid) for i, grid in enumerate(grids)]
    monkeypatch.setattr("components.sweep.Engine", None)
    named = {f"parts.{i}": part for i, part in enumerate(parts)}
    assert run(examples, tmp_path / "whole", GRID, **named).digest == swept.digest


def test_parts_of_another_sweep_are_refused(examples, other_examples, swept, tmp_path):
    with pytest.raises(ValueError, match="Expected a part of this sweep, of the training .*'epochs': 3.* received"):
        run(examples, tmp_path / "a", GRID | {"train": TRAINING | {"epochs": 3}}, **{"parts.0": swept})
    with pytest.raises(ValueError, match="of the examples"):
        run(other_examples, tmp_path / "b", GRID, **{"parts.0": swept})


def test_a_diverging_trial_is_recorded_and_the_others_go_on(examples, tmp_path):
    result = run(examples, tmp_path / "some", {"l1": [], "l2": [1e9], "train": TRAINING})
    assert result.facts.winner == 0
    assert result.facts.trials[1].metrics == {}
    assert "in epoch 1" in result.facts.trials[1].diverged
    assert not result.histograms()[1].any()
    assert "diverged" in result.report.read_text()


# --- the choice


def trial(accuracy, num_zeros=0, l1=0.0, l2=0.0):
    kernel = KernelFacts(name="output", num_weights=100, num_zeros=num_zeros, l1_norm=1.0, l2_norm=1.0)
    metrics = {} if accuracy is None else {"val_accuracy": accuracy}
    return Trial(
        kind="l1_l2", l1=l1, l2=l2, solver="proximal", metrics=metrics, kernels=(kernel,),
        diverged="nan" if accuracy is None else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trials", "tolerance", "winner", "reason"),
    [
        ([trial(0.8, 99), trial(0.9), trial(None)], 0.0, 1, "validation accuracy 0.9000, the highest of 2"),
        ([trial(0.9, 1), trial(0.9, 2), trial(0.9, 0, l2=9)], 0.0, 1, "the sparsest of 3 with this, the highest"),
        ([trial(0.9, 1, l2=1), trial(0.9, 1, l1=3), trial(0.9, 1)], 0.0, 1, "the most strongly penalized of 3"),
        ([trial(0.9), trial(0.9)], 0.0, 0, "the most strongly penalized of 2"),
        ([trial(0.9), trial(0.895, 80), trial(0.88, 99)], 0.01, 1, "the sparsest of 2 within 0.01 of the highest, 0.9"),
    ],
)
def test_validation_chooses_and_ties_go_to_the_sparser_then_to_the_simpler(trials, tolerance, winner, reason):
    index, why = choose(trials, tolerance)
    assert index == winner
    assert reason in why


def test_a_sweep_of_which_every_trial_diverges_fails():
    with pytest.raises(FloatingPointError, match="received 2 that all diverged. The first: nan"):
        choose([trial(None), trial(None)], 0.0)


# --- the report


def test_the_report_is_self_contained_and_marks_the_winner(swept):
    html = swept.report.read_text()
    assert "SYNTHETIC" in html
    assert "Regularization path on bars:1.0.0" in html
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", html)
    assert html.count('<tr class="chosen">') == 1
    assert html.count('<tr><th scope="row">L1 0.0') >= 1
    alternatives = " ".join(re.findall(r'alt="([^"]*)"', html))
    for words in (
        "Validation accuracy",
        "cross-entropy",
        "exactly zero",
        "L1 norm",
        "L2 norm",
        "distributions under L1",
    ):
        assert words in alternatives


def test_equal_sweeps_give_equal_reports(swept):
    assert render(swept.facts, swept.histograms(), EDGES) == swept.report.read_text()


@pytest.mark.parametrize("index", range(6))
def test_a_grid_of_one_point_has_a_report(swept, index):
    one = slice(index, index + 1)
    facts = swept.facts.model_copy(update={"trials": swept.facts.trials[one], "winner": 0})
    assert "1 trainings" not in render(facts, swept.histograms()[one], EDGES)


# --- what train takes from it


def test_train_takes_the_winners_penalty_and_solver(examples, swept, tmp_path):
    (tmp_path / "model").mkdir()
    values = TRAINING | {"penalty": {"kind": "l2", "l2": 5.0}}
    model = train(examples=examples, params=train.parse(values), output=tmp_path / "model", **{"sweeps.0": swept})
    winner = swept.facts.trials[swept.facts.winner]
    assert model.facts.metrics == winner.metrics
    assert model.facts.params == swept.facts.winner_params


def test_train_refuses_a_sweep_on_other_examples_and_several_sweeps(swept, examples, other_examples, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="Expected a sweep on the examples .* Sweep on these examples"):
        train(examples=other_examples, params=train.parse(TRAINING), output=tmp_path / "model", **{"sweeps.0": swept})
    several = {"sweeps.0": swept, "sweeps.1": swept}
    with pytest.raises(ValueError, match="Expected at most one sweep; received 2"):
        train(examples=examples, params=train.parse(TRAINING), output=tmp_path / "model", **several)
