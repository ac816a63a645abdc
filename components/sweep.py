"""Sweep: trains the same network under many penalties, in one process."""

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

from components.training.engine import Engine, Recipe
from components.training.fit import fit, make_engine
from components.training.network_check import check_network
from components.training.params import Params as TrainParams
from components.training.params import Training, network_code
from components.training.penalty import KINDS, Penalty
from ridgeline.artifacts.example_anomalies import ExampleAnomalies
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.trials import KernelFacts, Trial, Trials, TrialsFacts
from ridgeline.component import Params as StepParams
from ridgeline.component import component

log = logging.getLogger(__name__)

MAX_POINTS = 200
MAX_LANES = 4  # threads that train at a time: each uses one core and has its own compiled code
EDGES = np.linspace(-1.0, 1.0, 801)  # the same for every sweep, so that histograms can be compared and merged

Strength = Annotated[float, Field(gt=0.0)]


class Params(StepParams):
    """The grid, and what its trainings have in common."""

    dense: bool = Field(True, title="Dense", description="Also train without a penalty, as the baseline.")
    l1: tuple[Strength, ...] = Field(
        (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), title="L1 strengths", description="One training per strength."
    )
    l2: tuple[Strength, ...] = Field(
        (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), title="L2 strengths", description="One training per strength."
    )
    l1_l2: tuple[tuple[Strength, Strength], ...] = Field(
        (), title="L1 and L2 strengths", description="Pairs of an L1 and an L2 strength; one training per pair."
    )
    train: Training = Training()

    @model_validator(mode="after")
    def _is_a_grid(self) -> Self:
        for kind in self._kinds():
            if repeated := [value for value, count in Counter(getattr(self, kind)).items() if count > 1]:
                raise ValueError(f"{kind}: expected each point once; received {repeated[0]!r} twice. Leave one out.")
        if (total := len(self.points)) > MAX_POINTS:
            raise ValueError(
                f"l1: expected a grid of at most {MAX_POINTS} points in all ({', '.join(['dense', *self._kinds()])}); "
                f"received {total}. Leave some out, or run several sweeps."
            )
        if not total:
            raise ValueError("l1: expected a grid of at least 1 point; received none. Add a strength, or set dense.")
        return self

    @classmethod
    def _kinds(cls) -> list[str]:
        """Return the kinds of penalty for which there is a list of strengths."""
        return [kind for kind in KINDS if kind in cls.model_fields]

    @property
    def points(self) -> list[Penalty]:
        """The grid's points, in the order in which they are tried."""
        points = [Penalty.at("none")] if self.dense else []
        for kind in self._kinds():
            for value in getattr(self, kind):
                points.append(Penalty.at(kind, *(value if isinstance(value, tuple) else (value,))))
        return points

    def split(self, parts: int) -> list[dict[str, Any]]:
        """Divide the grid among several sweeps.

        Args:
            parts: Number of parts, at least 1; there are never more parts than points.

        Returns:
            For each part, the parameters that replace this grid's.
        """
        points = [("dense", True), *((kind, value) for kind in self._kinds() for value in getattr(self, kind))]
        points = points if self.dense else points[1:]
        empty: dict[str, Any] = {"dense": False, **{kind: [] for kind in self._kinds()}}
        divided = []
        for start in range(min(parts, len(points))):
            part = points[start::parts]
            lists = {kind: [value for name, value in part if name == kind] for kind in self._kinds()}
            divided.append(empty | lists | {"dense": ("dense", True) in part})
        return divided

    def params_at(self, point: Penalty) -> TrainParams:
        """Return the training's parameters at a point of the grid: L1 uses `proximal` if `train` allows it."""
        proximal = point.l1 and self.train.optimizer == "sgd" and not self.train.average
        solver = "proximal" if proximal else "subgradient"
        # `train` has applied its profile.
        return TrainParams(**{**dict(self.train), "profile": "seed", "penalty": point, "solver": solver})


@component(output=Trials, after=(ExampleAnomalies,), code=lambda params: network_code(params.train if params else None))
def sweep(examples: Examples, params: Params, output: Path) -> TrialsFacts:
    """Train at each point of a grid of penalties, on shared data and compiled code.

    A training that diverges is recorded as such; the others continue.

    Args:
        examples: The splits; the test split is not read.
        params: The grid and the training.
        output: Empty directory to write `Trials` into.

    Returns:
        The trials.

    Raises:
        StepError: If the network can't be trained, or not be served.
    """
    check_network(examples, params.params_at(params.points[0]))
    points = sorted(enumerate(map(params.params_at, params.points)), key=lambda item: item[1].solver)
    num_lanes = max(1, min(MAX_LANES, os.cpu_count() or 1, len(points)))
    lanes = [points[len(points) * i // num_lanes : len(points) * (i + 1) // num_lanes] for i in range(num_lanes)]
    import keras  # noqa: F401 - once, before several threads import it

    with ThreadPool(num_lanes) as pool:
        outcomes = dict(item for lane in pool.map(functools.partial(_try_all, examples), lanes) for item in lane)
    results = [outcomes[number] for number in range(len(points))]
    np.save(output / "histograms.npy", np.stack([counts for _, counts in results]), allow_pickle=False)
    np.save(output / "edges.npy", EDGES, allow_pickle=False)
    return TrialsFacts(
        dataset=examples.facts.dataset,
        examples_digest=examples.digest,
        training=params.train.model_dump(mode="json"),
        trials=tuple(trial for trial, _ in results),
        synthetic=examples.facts.synthetic,
    )


def _try_all(examples: Examples, points: list[tuple[int, TrainParams]]) -> list[tuple[int, tuple[Trial, np.ndarray]]]:
    """Train at some of the points, one after another; return the number and outcome of each."""
    engines: dict[Recipe, Engine] = {}
    outcomes = []
    for number, params in points:
        if params.recipe not in engines:
            engines[params.recipe] = make_engine(examples, params)
        trial, counts = _try(engines[params.recipe], params)
        log.info("trial %d: %s", number + 1, _outcome(trial))
        outcomes.append((number, (trial, counts)))
    return outcomes


def _try(engine: Engine, params: TrainParams) -> tuple[Trial, np.ndarray]:
    """Train once; return the trial and its histogram, int64 ``[kernels, bins]``."""
    point: dict[str, Any] = params.penalty.model_dump(include=set(Trial.model_fields)) | {"solver": params.solver}
    try:
        result = fit(engine, params)
    except FloatingPointError as error:
        no_weights = np.zeros((len(engine.penalized_names), len(EDGES) - 1), np.int64)
        return Trial(**point, metrics={}, kernels=(), diverged=str(error)), no_weights
    kernels = engine.penalized(result.weights)
    facts = tuple(_kernel_facts(name, kernel) for name, kernel in kernels.items())
    trial = Trial(**point, metrics=result.metrics, kernels=facts, diverged=None)
    return trial, np.stack([_histogram(kernel) for kernel in kernels.values()])


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
