"""Sweep: trains under many penalties in one process, and lets validation choose one."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from components import sweep_report
from components.engine import Engine, Recipe
from components.train import Params as TrainParams
from components.train import Penalty, Training, build_model, fit
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.sweep_result import KernelFacts, SweepResult, SweepResultFacts, Trial
from ridgeline.component import Params as StepParams
from ridgeline.component import component

log = logging.getLogger(__name__)

MAX_POINTS = 200
MAX_LANES = 4  # threads that train at a time: one training keeps one core busy, and each has its own compiled code
EDGES = np.linspace(-1.0, 1.0, 801)  # the same for every sweep, so that histograms can be compared and merged

Strength = Annotated[float, Field(gt=0.0)]


class Params(StepParams):
    """The grid, and what its trainings have in common."""

    dense: bool = Field(
        True, title="Dense", description="Also train without a penalty: what the others are compared with."
    )
    l1: tuple[Strength, ...] = Field(
        (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), title="L1 strengths", description="A training each."
    )
    l2: tuple[Strength, ...] = Field(
        (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), title="L2 strengths", description="A training each."
    )
    l1_l2: tuple[tuple[Strength, Strength], ...] = Field(
        (), title="L1 and L2 strengths", description="Pairs of an L1 and an L2 strength; a training each."
    )
    tolerance: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        title="Tolerance",
        description="Validation accuracies that are lower than the best by no more than this count as equal to it; "
        "among equals the sparsest wins, then the most strongly penalized.",
    )
    train: Training = Training()

    @model_validator(mode="after")
    def _is_a_grid(self) -> Self:
        for name, values in {"l1": self.l1, "l2": self.l2, "l1_l2": self.l1_l2}.items():
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise ValueError(f"{name}: expected each point once; received {twice[0]!r} twice. Leave one out.")
        if (total := len(self.points)) > MAX_POINTS:
            raise ValueError(
                f"l1: expected a grid of at most {MAX_POINTS} points in all (dense, l1, l2, l1_l2); received {total}. "
                "Leave some out, or run several sweeps."
            )
        if not total:
            raise ValueError("l1: expected a grid of at least 1 point; received none. Add a strength, or set dense.")
        return self

    @property
    def points(self) -> list[Penalty]:
        """The grid's points, in the order in which they are tried."""
        return [
            *([Penalty(kind="none", l1=0.0, l2=0.0)] if self.dense else []),
            *(Penalty(kind="l1", l1=l1, l2=0.0) for l1 in self.l1),
            *(Penalty(kind="l2", l1=0.0, l2=l2) for l2 in self.l2),
            *(Penalty(kind="l1_l2", l1=l1, l2=l2) for l1, l2 in self.l1_l2),
        ]

    def split(self, parts: int) -> list[dict[str, Any]]:
        """Deal the grid out, so that several sweeps can share it; none gets nothing.

        Args:
            parts: How many parts are wanted, at least 1.

        Returns:
            For each part, the parameters that replace this grid's.
        """
        dealt = (self.points[start::parts] for start in range(min(parts, len(self.points))))
        return [
            {
                "dense": any(point.kind == "none" for point in points),
                "l1": [point.l1 for point in points if point.kind == "l1"],
                "l2": [point.l2 for point in points if point.kind == "l2"],
                "l1_l2": [[point.l1, point.l2] for point in points if point.kind == "l1_l2"],
            }
            for points in dealt
        ]

    def params_at(self, point: Penalty) -> TrainParams:
        """Return the training's parameters at a point of the grid: L1 is proximal wherever `train` allows it."""
        proximal = point.l1 and self.train.optimizer == "sgd" and not self.train.average
        solver = "proximal" if proximal else "subgradient"
        # The profile has done its part in `train`; it would replace strengths that equal train's default.
        return TrainParams(**{**dict(self.train), "profile": "seed", "penalty": point, "solver": solver})


@component(output=SweepResult)
def sweep(examples: Examples, parts: tuple[SweepResult, ...], params: Params, output: Path) -> SweepResultFacts:
    """Train at each point of a grid of penalties, on shared data and compiled code; validation chooses.

    Args:
        examples: The splits; the test split is not read.
        parts: Sweeps of parts of the grid with the same training: their trials are taken over, not repeated.
        params: The grid and the training.
        output: Empty directory to write a `SweepResult` into.

    Returns:
        The trials and the winner.

    Raises:
        FloatingPointError: If every training diverges.
        ValueError: If a part is of another training or of other examples.
    """
    done = _trials_of(parts, examples, params)
    todo = [(number, params.params_at(point)) for number, point in enumerate(params.points) if point not in done]
    todo.sort(key=lambda item: item[1].solver)
    num_lanes = max(1, min(MAX_LANES, os.cpu_count() or 1, len(todo)))
    lanes = [todo[len(todo) * i // num_lanes : len(todo) * (i + 1) // num_lanes] for i in range(num_lanes)]
    import keras  # noqa: F401 - in one thread, before several want it

    with ThreadPool(num_lanes) as pool:
        outcomes = dict(item for lane in pool.map(functools.partial(_try_all, examples), lanes) for item in lane)
    results = [done[point] if point in done else outcomes[number] for number, point in enumerate(params.points)]
    trials = [trial for trial, _ in results]
    histograms = np.stack([counts for _, counts in results])
    winner, reason = choose(trials, params.tolerance)
    log.info("winner: %s, %s", trials[winner], reason)
    facts = SweepResultFacts(
        dataset=examples.facts.dataset,
        examples_digest=examples.digest,
        training=params.train.model_dump(mode="json"),
        trials=tuple(trials),
        winner=winner,
        winner_params=params.params_at(params.points[winner]).model_dump(mode="json"),
        reason=reason,
        synthetic=examples.facts.synthetic,
    )
    np.save(output / "histograms.npy", histograms, allow_pickle=False)
    np.save(output / "edges.npy", EDGES, allow_pickle=False)
    (output / "report.html").write_text(sweep_report.render(facts, histograms, EDGES), encoding="utf-8")
    return facts


def _trials_of(
    parts: tuple[SweepResult, ...], examples: Examples, params: Params
) -> dict[Penalty, tuple[Trial, np.ndarray]]:
    """Return the trials of sweeps of the same training, with their histograms, by penalty."""
    done = {}
    for part in parts:
        for what, expected, received in (
            ("examples", examples.digest, part.facts.examples_digest),
            ("training", params.train.model_dump(mode="json"), part.facts.training),
        ):
            if received != expected:
                raise ValueError(
                    f"Expected a part of this sweep, of the {what} {expected}; received one of {received}. "
                    "Sweep that part of the grid again, or leave it out."
                )
        for trial, counts in zip(part.facts.trials, part.histograms(), strict=True):
            done[Penalty(kind=trial.kind, l1=trial.l1, l2=trial.l2)] = (trial, np.array(counts))
    return done


def _try_all(examples: Examples, points: list[tuple[int, TrainParams]]) -> list[tuple[int, tuple[Trial, np.ndarray]]]:
    """Train at some of the points, one after another; return what came of each, by its number."""
    engines: dict[Recipe, Engine] = {}
    outcomes = []
    for number, params in points:
        if params.recipe not in engines:
            engines[params.recipe] = Engine(functools.partial(build_model, examples, params), examples, params.recipe)
        trial, counts = _try(engines[params.recipe], params)
        log.info("trial %d: %s", number + 1, _outcome(trial))
        outcomes.append((number, (trial, counts)))
    return outcomes


def _try(engine: Engine, params: TrainParams) -> tuple[Trial, np.ndarray]:
    """Train once; return what came of it, and its histogram, int64 ``[kernels, bins]``."""
    point: dict[str, Any] = {**params.penalty.model_dump(), "solver": params.solver}
    names = [*(f"hidden_{i}" for i, _ in enumerate(params.hidden_units, start=1)), "output"]
    try:
        result = fit(engine, params)
    except FloatingPointError as error:
        no_weights = np.zeros((len(names), len(EDGES) - 1), np.int64)
        return Trial(**point, metrics={}, kernels=(), diverged=str(error)), no_weights
    kernels = [weights for weights in result.weights if weights.ndim > 1]
    facts = tuple(_kernel_facts(name, kernel) for name, kernel in zip(names, kernels, strict=True))
    trial = Trial(**point, metrics=result.metrics, kernels=facts, diverged=None)
    return trial, np.stack([_histogram(kernel) for kernel in kernels])


def _kernel_facts(name: str, kernel: np.ndarray) -> KernelFacts:
    weights = kernel.astype(np.float64)
    return KernelFacts(
        name=name,
        num_weights=weights.size,
        num_zeros=int(np.count_nonzero(weights == 0.0)),
        l1_norm=float(np.sum(np.abs(weights))),
        l2_norm=float(np.sqrt(np.sum(weights**2))),
    )


def _histogram(kernel: np.ndarray) -> np.ndarray:
    return np.histogram(np.clip(kernel[kernel != 0.0], EDGES[0], EDGES[-1]), EDGES)[0]


def _outcome(trial: Trial) -> str:
    if trial.diverged:
        return f"{trial} diverged"
    accuracy = trial.metrics["val_accuracy"]
    return f"{trial}: val_accuracy {accuracy:.4f}, {100 * trial.zero_share:.1f} % of the weights zero"


def choose(trials: list[Trial], tolerance: float) -> tuple[int, str]:
    """Return the index of the best trial, and why it is the best.

    The highest validation accuracy wins; among equals the sparsest, then the most strongly penalized.

    Args:
        trials: The trials.
        tolerance: Accuracies that are lower than the best by no more than this count as equal to it.

    Raises:
        FloatingPointError: If all trials diverged.
    """
    accuracies = {i: trial.metrics["val_accuracy"] for i, trial in enumerate(trials) if not trial.diverged}
    if not accuracies:
        raise FloatingPointError(
            f"Expected a grid with a training that stays finite; received {len(trials)} that all diverged. The first: "
            f"{trials[0].diverged}"
        )
    best = max(accuracies.values())
    equals = [i for i, accuracy in accuracies.items() if accuracy >= best - tolerance]
    winner = max(equals, key=lambda i: (trials[i].zero_share, trials[i].l1 + trials[i].l2))
    reason = f"validation accuracy {accuracies[winner]:.4f}, "
    if len(equals) == 1:
        return winner, f"{reason}the highest of {len(accuracies)}"
    sparsest = all(trials[i].zero_share < trials[winner].zero_share for i in equals if i != winner)
    within = f" within {tolerance:g} of the highest, {best:.4f}" if tolerance else " with this, the highest"
    return winner, f"{reason}the {'sparsest' if sparsest else 'most strongly penalized'} of {len(equals)}{within}"


if __name__ == "__main__":
    sweep.main()
