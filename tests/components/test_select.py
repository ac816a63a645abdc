import re

import numpy as np
import pytest

from components.reports.regularization_path import EFFECTS, render
from components.select import choose, select
from components.sweep import EDGES, sweep
from components.train import train
from components.training.params import Params
from components.training.penalties import KINDS
from ridgeline.artifacts.trials import KernelFacts, Trial
from tests.components.conftest import make_bars

TRAINING = {"mlp": {"hidden_units": [6]}, "epochs": 2, "learning_rate": 0.1}
GRID = {
    "l1": [0.001, 0.1],
    "l2": [0.001, 0.03],
    "l1_l2": [[[0.001, 0.01], [0.001, 0.002]]],
    "group": [0.001, 0.1],
    "train": TRAINING,
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return make_bars(tmp_path_factory.mktemp("examples"), {"train": 320, "validation": 64}, noise=250)


@pytest.fixture(scope="module")
def other_examples(tmp_path_factory):
    return make_bars(tmp_path_factory.mktemp("other"), {"train": 32, "validation": 16})


def run_sweep(examples, output, values):
    output.mkdir()
    return sweep(examples=examples, params=sweep.parse(values), output=output)


def run_select(output, *trials, **values):
    output.mkdir()
    return select(params=select.parse(values), output=output, **{f"trials.{i}": part for i, part in enumerate(trials)})


@pytest.fixture(scope="module")
def trials(examples, tmp_path_factory):
    return run_sweep(examples, tmp_path_factory.mktemp("trials") / "whole", GRID)


@pytest.fixture(scope="module")
def swept(trials, tmp_path_factory):
    return run_select(tmp_path_factory.mktemp("swept") / "result", trials)


# --- from trials to a result


def test_the_winner_is_the_most_accurate_and_has_the_parameters_of_train(swept):
    facts = swept.facts
    winner = facts.trials[facts.winner]
    assert winner.metrics["val_accuracy"] == max(trial.metrics["val_accuracy"] for trial in facts.trials)
    params = train.parse(facts.winner_params)
    assert isinstance(params, Params)
    assert (params.penalty.kind, params.penalty.strengths) == (winner.kind, winner.strengths)
    assert params.options.hidden_units == (6,)


def test_the_result_does_not_depend_on_how_the_grid_was_divided(examples, swept, tmp_path):
    grids = [GRID | {"dense": False, "l2": []}, GRID | {"l1": [], "l1_l2": [], "group": []}]
    parts = [run_sweep(examples, tmp_path / str(i), grid) for i, grid in enumerate(grids)]
    assert run_select(tmp_path / "result", *parts).digest == swept.digest


def test_trials_of_another_training_or_of_other_examples_are_refused(examples, other_examples, trials, tmp_path):
    longer = run_sweep(examples, tmp_path / "longer", {"l1": [], "l2": [], "train": TRAINING | {"epochs": 3}})
    with pytest.raises(ValueError, match="Expected trials that all have the training .*'epochs': 2.* received .*: 3"):
        run_select(tmp_path / "a", trials, longer)
    other = run_sweep(other_examples, tmp_path / "other", {"l1": [], "l2": [], "train": TRAINING})
    with pytest.raises(ValueError, match="Expected trials that all have the examples"):
        run_select(tmp_path / "b", trials, other)
    warm = run_sweep(examples, tmp_path / "warm", {"l1": [], "l2": [], "warm_start": True, "train": TRAINING})
    with pytest.raises(ValueError, match="Expected trials that all have the warm_start False; received some with True"):
        run_select(tmp_path / "c", trials, warm)
    report = run_select(tmp_path / "d", warm).report.read_text()
    note = "from the weights of the next stronger strength of its kind, and the strongest from random ones."
    assert note in " ".join(report.split())


def test_a_point_that_occurs_twice_is_refused(trials, tmp_path):
    with pytest.raises(ValueError, match="Expected each point of the grid once; received none twice"):
        run_select(tmp_path / "twice", trials, trials)


def test_a_result_needs_trials(tmp_path):
    with pytest.raises(ValueError, match="Expected the trials of at least 1 sweep; received none"):
        run_select(tmp_path / "none")


def test_a_diverged_trial_is_shown_and_never_chosen(examples, tmp_path):
    result = run_select(
        tmp_path / "result",
        run_sweep(
            examples, tmp_path / "s", {"l1": [], "l2": [1e9], "l1_l2": [[0.1, 1e9], [0.1, 1]], "train": TRAINING}
        ),
    )
    assert not result.facts.trials[result.facts.winner].diverged
    assert re.search(r'<p class="note">L2 1e\+09 diverged: Expected a finite loss', result.report.read_text())


# --- the choice


def trial(accuracy, num_zeros=0, l1=0.0, l2=0.0):
    kernel = KernelFacts(name="output", num_weights=100, num_zeros=num_zeros, l1_norm=1.0, l2_norm=1.0)
    metrics = {} if accuracy is None else {"val_accuracy": accuracy}
    return Trial(
        kind="l1_l2", strengths={"l1": l1, "l2": l2}, solver="proximal", metrics=metrics,
        kernels=(kernel,), diverged="nan" if accuracy is None else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trials", "tolerance", "winner", "reason"),
    [
        ([trial(0.8, 99), trial(0.9), trial(None)], 0.0, 1, "validation accuracy 0.9000, the highest of 2"),
        ([trial(0.9, 1), trial(0.9, 2), trial(0.9, 0, l2=9)], 0.0, 1, "the sparsest of 3 with this highest accuracy"),
        ([trial(0.9, 1, l2=1), trial(0.9, 1, l1=3), trial(0.9, 1)], 0.0, 1, "the most strongly penalized of 3"),
        ([trial(0.9), trial(0.9)], 0.0, 0, "the most strongly penalized of 2"),
        ([trial(0.9), trial(0.895, 80), trial(0.88, 99)], 0.01, 1, "the sparsest of 2 within 0.01 of the highest, 0.9"),
        # the tolerance is a difference of accuracies, not a share of the highest
        ([trial(0.5), trial(0.4925, 80)], 0.01, 1, "the sparsest of 2 within 0.01 of the highest, 0.5"),
        ([trial(0.5), trial(0.4875, 80)], 0.01, 0, "validation accuracy 0.5000, the highest of 2"),
        ([trial(0.75), trial(0.5, 80)], 0.25, 1, "the sparsest of 2 within 0.25"),  # the bound itself counts
    ],
)
def test_validation_chooses_and_ties_go_to_the_sparser_then_to_the_simpler(trials, tolerance, winner, reason):
    index, why = choose(trials, tolerance)
    assert index == winner
    assert reason in why


def test_a_sweep_fails_if_every_trial_diverges():
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
        "distributions under group lasso",
        "Eliminated pixels",
        "L1 + L2 by both strengths. Validation accuracy, %:",
    ):
        assert words in alternatives


def test_equal_sweeps_give_equal_reports(swept):
    assert render(swept.facts, swept.histograms(), EDGES) == swept.report.read_text()


@pytest.mark.parametrize("index", range(11))
def test_a_grid_of_one_point_has_a_report(swept, index):
    one = slice(index, index + 1)
    facts = swept.facts.model_copy(update={"trials": swept.facts.trials[one], "winner": 0})
    assert "1 trainings" not in render(facts, swept.histograms()[one], EDGES)


def shown(result, trials):
    """Return the report of other trials, made from some of a result; any histograms do."""
    facts = result.facts.model_copy(update={"trials": tuple(trials), "winner": 0})
    return render(facts, np.resize(result.histograms()[:1], (len(trials), 2, len(EDGES) - 1)), EDGES)


def test_each_penalty_is_in_every_picture_and_what_is_left_out_is_said(swept):
    def at(kind, strength, accuracy):
        like = next(trial for trial in swept.facts.trials if trial.kind == kind)
        metrics = like.metrics | {"val_accuracy": accuracy}
        return like.model_copy(update={"strengths": {kind: strength} if strength else {}, "metrics": metrics})

    accurate = [at("none", 0, 0.9), *(at("l1", 0.1 * i, 0.85) for i in range(1, 6)), at("l2", 0.1, 0.9)]
    html = shown(swept, [*accurate, at("group", 0.1, 0.5), at("group", 0.2, 0.4)])  # group: no useful model
    spread = re.findall(r'alt="(Overlaid weight distributions[^"]*)"', html)
    assert [re.findall(r"% at (\d[.\d]*\d)", text) for text in spread] == [
        ["0.2", "0.3", "0.4", "0.5"],
        ["0.1"],
        ["0.1"],
    ]
    (contrast,) = re.findall(r'alt="(Share of the weights by size[^"]*)"', html)
    assert "group lasso 0.1" in contrast
    table = html.partition("if none is:")[2].partition("</table>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["no penalty", "L1 0.5", "L2 0.1", "group lasso 0.1"]
    assert "Not shown: 1 of 5 with L1, 1 of 2 with group lasso." in html
    assert "Not shown" not in shown(swept, accurate[:2])


def test_what_a_network_has_no_count_of_is_no_column(swept):
    columns = {"pixels": "Eliminated<br>pixels", "units": "Eliminated<br>units"}
    for unknown in ((), ("pixels",), ("pixels", "units")):
        none = dict.fromkeys(f"num_eliminated_{what}" for what in unknown)
        diverged = swept.facts.trials[1].model_copy(update={"metrics": {}, "kernels": (), "diverged": "nan"})
        html = shown(swept, [t.model_copy(update=none) for t in (*swept.facts.trials, diverged)])
        assert {what for what in columns if columns[what] in html} == columns.keys() - set(unknown)
        assert ("unit is eliminated" in html) == (len(unknown) < 2)
        head, *rows = re.findall(r"<tr.*?</tr>", html.partition("All trainings</h2>")[2].partition("</table>")[0], re.S)
        widths = {row.count("<td") + int((re.findall(r'colspan="(\d+)"', row) or ["1"])[0]) - 1 for row in rows}
        assert widths == {head.count("<th") - 1}
        assert "unknown" not in html
    some = [*swept.facts.trials[:-1], swept.facts.trials[-1].model_copy(update={"num_eliminated_pixels": None})]
    assert "<td>unknown</td>" in shown(swept, some)


@pytest.mark.parametrize(
    ("points", "drawn"),
    [
        ([(1, 1), (1, 2), (2, 1), (2, 2)], True),
        ([(1, 1), (1, 2), (2, 1), (2, 2), (3, 3)], True),
        ([(1, 1)], True),
        ([(1, 1), (1, 2), (1, 3)], True),
        ([(1, 1), (2, 2)], False),
        ([(1, 1), (2, 2), (3, 3), (4, 1)], False),
    ],
)
def test_only_a_grid_of_two_strengths_is_a_heat_map(swept, points, drawn):
    pair = next(trial for trial in swept.facts.trials if trial.kind == "l1_l2")
    trials = [pair.model_copy(update={"strengths": {"l1": l1, "l2": l2}}) for l1, l2 in points]
    html = shown(swept, trials)
    assert ("L1 + L2 by both strengths" in html) is drawn
    assert ("Against strength" in html) is drawn  # nothing else to draw there
    assert all(f"L1 + L2 {l1} and {l2}" in html for l1, l2 in points)


def test_each_penalty_of_the_sweep_is_described(swept):
    assert EFFECTS.keys() == KINDS.keys() - {"none"}
    html = swept.report.read_text()
    for kind, effect in EFFECTS.items():
        name = KINDS[kind].label
        assert f"<strong>{name[0].upper()}{name[1:]}</strong> {effect}" in html


# --- what train takes from it


def test_train_takes_the_winners_penalty_and_solver(examples, swept, tmp_path):
    (tmp_path / "model").mkdir()
    values = TRAINING | {"penalty": {"kind": "l2", "l2": 5.0}}
    model = train(examples=examples, params=train.parse(values), output=tmp_path / "model", sweep=swept)
    winner = swept.facts.trials[swept.facts.winner]
    assert model.facts.metrics == winner.metrics
    assert model.facts.params == swept.facts.winner_params | {"warm_start": False}


def test_train_refuses_a_sweep_on_other_examples(swept, other_examples, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="Expected a sweep on the examples .* Sweep on these examples"):
        train(examples=other_examples, params=train.parse(TRAINING), output=tmp_path / "model", sweep=swept)
