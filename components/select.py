"""Select: chooses a trial of a sweep by validation accuracy, and draws the regularization path."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from components.reports import regularization_path
from components.training.penalties import KINDS
from components.training.penalty import Penalty
from ridgeline.artifacts.sweep_result import SweepResult, SweepResultFacts
from ridgeline.artifacts.trials import Trial, Trials
from ridgeline.component import Params as StepParams
from ridgeline.component import component

log = logging.getLogger(__name__)


class Params(StepParams):
    """How to choose."""

    tolerance: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        title="Tolerance",
        description="Validation accuracies at most this far below the best count as equal to it. Among equals the "
        "sparsest wins, then the most strongly penalized.",
    )


@component(output=SweepResult)
def select(trials: tuple[Trials, ...], params: Params, output: Path) -> SweepResultFacts:
    """Choose the penalty with the highest validation accuracy, and write the report of all trials.

    Args:
        trials: The trials of one sweep, or of several that share a grid; all of the same training and examples.
            The result does not depend on how the grid was divided.
        params: How to choose.
        output: Empty directory to write a `SweepResult` into.

    Returns:
        All trials and the winner.

    Raises:
        FloatingPointError: If every training diverged.
        ValueError: If there are no trials, a point occurs twice, or they differ in their training or examples.
    """
    _expect_one_training(trials)
    common, edges = trials[0].facts, trials[0].edges()
    found = [pair for part in trials for pair in zip(part.facts.trials, part.histograms(), strict=True)]
    found.sort(key=lambda pair: _order(pair[0]))
    for (one, _), (other, _) in itertools.pairwise(found):
        if _order(one) == _order(other):
            raise ValueError(f"Expected each point of the grid once; received {one} twice. Leave one of them out.")
    all_trials = tuple(trial for trial, _ in found)
    histograms = np.stack([counts for _, counts in found])
    winner, reason = choose(all_trials, params.tolerance)
    log.info("winner: %s, %s", all_trials[winner], reason)
    facts = SweepResultFacts(
        dataset=common.dataset,
        examples_digest=common.examples_digest,
        training=common.training,
        trials=all_trials,
        winner=winner,
        winner_params=_training_params(common.training, all_trials[winner]),
        reason=reason,
        warm_start=common.warm_start,
        synthetic=common.synthetic,
    )
    np.save(output / "histograms.npy", histograms, allow_pickle=False)
    np.save(output / "edges.npy", edges, allow_pickle=False)
    (output / "report.html").write_text(regularization_path.render(facts, histograms, edges), encoding="utf-8")
    return facts


def _expect_one_training(trials: tuple[Trials, ...]) -> None:
    if not trials:
        raise ValueError("Expected the trials of at least 1 sweep; received none. Run the sweep first.")
    for part in trials[1:]:
        for what in ("examples_digest", "training", "warm_start"):
            expected, received = getattr(trials[0].facts, what), getattr(part.facts, what)
            if received != expected:
                raise ValueError(
                    f"Expected trials that all have the {what.removesuffix('_digest')} {expected}; received some with "
                    f"{received}. Sweep that part of the grid again, or leave it out."
                )


def _order(trial: Trial) -> tuple[int, list[float]]:
    """Return a trial's sort key: kind of penalty, then strengths."""
    return list(KINDS).index(trial.kind), list(trial.strengths.values())


def _training_params(training: dict[str, Any], trial: Trial) -> dict[str, Any]:
    """Return a trial's training parameters; the profile is `seed`, since it has been applied."""
    penalty = Penalty.at(trial.kind, *trial.strengths.values()).model_dump()
    return {**training, "profile": "seed", "penalty": penalty, "solver": trial.solver}


def choose(trials: Sequence[Trial], tolerance: float) -> tuple[int, str]:
    """Return the index of the best trial, and why it is the best.

    The highest validation accuracy wins; among equals the sparsest, then the most strongly penalized.

    Args:
        trials: The trials.
        tolerance: Accuracies at most this far below the best count as equal to it.

    Raises:
        FloatingPointError: If all trials diverged.
    """
    accuracies = {i: trial.metrics["val_accuracy"] for i, trial in enumerate(trials) if not trial.diverged}
    if not accuracies:
        raise FloatingPointError(
            f"Expected at least 1 trial that does not diverge; received {len(trials)} that all diverged. The first: "
            f"{trials[0].diverged}"
        )
    best = max(accuracies.values())
    equals = [i for i, accuracy in accuracies.items() if accuracy >= best - tolerance]
    winner = max(equals, key=lambda i: (trials[i].zero_share, trials[i].strength))
    reason = f"validation accuracy {accuracies[winner]:.4f}, "
    if len(equals) == 1:
        return winner, f"{reason}the highest of {len(accuracies)}"
    sparsest = all(trials[i].zero_share < trials[winner].zero_share for i in equals if i != winner)
    within = f" within {tolerance:g} of the highest, {best:.4f}" if tolerance else " with this highest accuracy"
    return winner, f"{reason}the {'sparsest' if sparsest else 'most strongly penalized'} of {len(equals)}{within}"
