"""Sweep: trains the same network under many penalties, in one process."""

from __future__ import annotations

import bisect
import functools
import itertools
import logging
import os
from collections import Counter
from collections.abc import Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import Field, create_model, model_validator

from components.training.engine import Engine, Recipe
from components.training.fit import fit, make_engine
from components.training.network_check import check_network
from components.training.params import Params as TrainParams
from components.training.params import Training, network_code
from components.training.penalties import KINDS
from components.training.penalties.kind import Formula
from components.training.penalty import Penalty
from ridgeline.artifacts.example_anomalies import ExampleAnomalies
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import eliminated_pixels, eliminated_units
from ridgeline.artifacts.trials import KernelFacts, Trial, Trials, TrialsFacts
from ridgeline.component import Params as StepParams
from ridgeline.component import component

log = logging.getLogger(__name__)

MAX_POINTS = 200
MAX_LANES = 4  # threads that train at a time: each uses one core and has its own compiled code
EDGES = np.linspace(-1.0, 1.0, 801)  # the same for every sweep, so that histograms can be compared and merged

Strength = Annotated[float, Field(gt=0.0)]
Strengths = Annotated[tuple[Strength, ...], Field(min_length=1, max_length=MAX_POINTS)]
SWEPT = {name: kind for name, kind in KINDS.items() if kind.strengths}


def _lists() -> Any:
    """Return a model with a list of strengths for each kind of penalty that has some."""
    fields: dict[str, Any] = {
        "dense": (bool, Field(True, title="Dense", description="Also train without a penalty, as the baseline."))
    }
    for name, kind in SWEPT.items():
        if len(kind.strengths) == 1:
            point: Any = Strength
            description = "One training per strength."
        else:
            names = " and of ".join(strength.name for strength in kind.strengths)
            point = tuple[(Strength | Strengths,) * len(kind.strengths)]  # type: ignore[misc]
            description = f"Strengths of {names}, one training each. Lists in place of strengths: each combination."
        field = Field(kind.path, title=f"{kind.label[0].upper()}{kind.label[1:]} strengths", description=description)
        fields[name] = (tuple[point, ...], field)
    return create_model("Lists", __base__=StepParams, **fields)


class Params(_lists()):  # type: ignore[misc]
    """The grid, and what its trainings have in common."""

    decided: ClassVar[Mapping[str, str]] = {
        "train.solver": "the sweep chooses the solver: proximal for sparse penalties under sgd without averaging, else "
        "subgradient",
        "train.penalty": f"the sweep tries the penalties that its lists {', '.join(SWEPT)} name",
    }

    warm_start: bool = Field(
        False,
        title="Warm start",
        description="Each training starts from the weights of the next stronger strength of its kind instead of random "
        "ones; the strongest starts from random ones.",
    )
    train: Training = Training()

    @model_validator(mode="after")
    def _is_a_grid(self) -> Self:
        first, points = next(iter(SWEPT)), self.points
        for point, count in Counter(points).items():
            if count > 1:
                strengths = tuple(point.strengths.values())
                raise ValueError(
                    f"{point.kind}: expected each point once; received "
                    f"{strengths[0] if len(strengths) == 1 else strengths} twice. Leave one out."
                )
        if len(points) > MAX_POINTS:
            raise ValueError(
                f"{first}: expected a grid of at most {MAX_POINTS} points in all ({', '.join(['dense', *SWEPT])}); "
                f"received {len(points)}. Leave some out, or run several sweeps."
            )
        if not points:
            raise ValueError(
                f"{first}: expected a grid of at least 1 point; received none. Add a strength, or set dense."
            )
        return self

    @property
    def points(self) -> list[Penalty]:
        """The grid's points, in the order in which they are listed."""
        points = [Penalty.at("none")] if self.dense else []
        for kind in SWEPT:
            for entry in getattr(self, kind):
                axes = [_as_tuple(value) for value in _as_tuple(entry)]
                points += [Penalty.at(kind, *strengths) for strengths in itertools.product(*axes)]
        return points

    def chains(self) -> list[list[Penalty]]:
        """Return the grid's points in lists: those of one list are trained in its order, by one thread.

        Under ``warm_start``, a list holds the points of one kind that differ in their last strength alone, from strong
        to weak, as the paths of glmnet (Friedman, Hastie and Tibshirani, J. Statistical Software 33(1), 2010). Large
        weights shrink slowly, so a start from small ones saves epochs.
        """
        if not self.warm_start:
            return [[point] for point in self.points]
        chains: dict[Any, list[Penalty]] = {}
        for point in self.points:
            chains.setdefault((point.kind, *list(point.strengths.values())[:-1]), []).append(point)
        return [sorted(chain, key=lambda point: -sum(point.strengths.values())) for chain in chains.values()]

    def split(self, parts: int) -> list[dict[str, Any]]:
        """Divide the grid among several sweeps; a chain of warm starts is not divided.

        Args:
            parts: Number of parts, at least 1; there are never more parts than chains.

        Returns:
            For each part, the parameters that replace this grid's.
        """
        chains, divided = self.chains(), []
        for start in range(min(parts, len(chains))):
            part: dict[str, Any] = {"dense": False, **{kind: [] for kind in SWEPT}}
            for point in itertools.chain(*chains[start::parts]):
                strengths = list(point.strengths.values())
                if strengths:
                    part[point.kind].append(strengths if len(strengths) > 1 else strengths[0])
                else:
                    part["dense"] = True
            divided.append(part)
        return divided

    def params_at(self, point: Penalty) -> TrainParams:
        """Return the training's parameters at a point of the grid; the solver is `proximal` where it is possible."""
        proximal = KINDS[point.kind].sparse and self.train.optimizer == "sgd" and not self.train.average
        solver = "proximal" if proximal else "subgradient"
        # `train` has applied its profile.
        return TrainParams(**{**dict(self.train), "profile": "seed", "penalty": point, "solver": solver})


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


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
    for point in {point.formula: point for point in params.points}.values():
        check_network(examples, params.params_at(point))
    import keras  # noqa: F401 - once, before several threads import it

    lanes = _lanes([[params.params_at(point) for point in chain] for chain in params.chains()])
    with ThreadPool(len(lanes)) as pool:
        outcomes = {
            point: outcome for lane in pool.map(functools.partial(_try_all, examples), lanes) for point, outcome in lane
        }
    results = [outcomes[point] for point in params.points]
    np.save(output / "histograms.npy", np.stack([counts for _, counts in results]), allow_pickle=False)
    np.save(output / "edges.npy", EDGES, allow_pickle=False)
    return TrialsFacts(
        dataset=examples.facts.dataset,
        examples_digest=examples.digest,
        training=params.train.model_dump(mode="json"),
        trials=tuple(trial for trial, _ in results),
        warm_start=params.warm_start,
        synthetic=examples.facts.synthetic,
    )


Outcome = tuple[Trial, np.ndarray]


def _lanes(chains: list[list[TrainParams]]) -> list[list[list[TrainParams]]]:
    """Divide chains among threads: about as many trainings for each, those with the same compiled code together."""
    chains = sorted(chains, key=lambda chain: (chain[0].solver, chain[0].penalty.formula.strengths))
    total = sum(map(len, chains))
    num_lanes = max(1, min(MAX_LANES, os.cpu_count() or 1, len(chains)))
    starts = [total * i // num_lanes for i in range(1, num_lanes)]
    lanes: list[list[list[TrainParams]]] = [[] for _ in range(num_lanes)]
    before = 0
    for chain in chains:
        lanes[bisect.bisect(starts, before)].append(chain)
        before += len(chain)
    return [lane for lane in lanes if lane]


def _try_all(examples: Examples, chains: list[list[TrainParams]]) -> list[tuple[Penalty, Outcome]]:
    """Train at the points of some chains, one after another; return the outcome of each."""
    engines: dict[tuple[Recipe, Formula], Engine] = {}
    outcomes = []
    for chain in chains:
        weights = None
        for params in chain:
            code = params.recipe, params.penalty.formula
            if code not in engines:
                engines[code] = make_engine(examples, params)
            outcome, weights = _try(engines[code], params, weights)
            log.info("trial %s", _described(outcome[0]))
            outcomes.append((params.penalty, outcome))
    return outcomes


def _try(
    engine: Engine, params: TrainParams, initial: list[np.ndarray] | None
) -> tuple[Outcome, list[np.ndarray] | None]:
    """Train once from the given weights, or from the seed's.

    Returns:
        The trial and its histogram, int64 ``[kernels, bins]``; and the weights from which the next one of the chain
        starts: the trained ones. If it diverged, or a kernel is all zero so that nothing is learned from there, they
        are those that it started from.
    """
    point = {"kind": params.penalty.kind, "strengths": params.penalty.strengths, "solver": params.solver}
    try:
        result = fit(engine, params, initial=initial)
    except FloatingPointError as error:
        no_weights = np.zeros((len(engine.penalized_names), len(EDGES) - 1), np.int64)
        trial = Trial(**point, metrics={}, kernels=(), diverged=str(error))
        return (trial, no_weights), initial
    kernels, model = engine.penalized(result.weights), engine.model_with(result.weights)
    pixels = eliminated_pixels(model)
    trial = Trial(
        **point,
        metrics=result.metrics,
        kernels=tuple(_kernel_facts(name, kernel) for name, kernel in kernels.items()),
        num_eliminated_pixels=None if pixels is None else int(np.count_nonzero(pixels)),
        num_eliminated_units=eliminated_units(model),
        diverged=None,
    )
    histograms = np.stack([_histogram(kernel) for kernel in kernels.values()])
    return (trial, histograms), result.weights if all(map(np.any, kernels.values())) else initial


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


def _described(trial: Trial) -> str:
    if trial.diverged:
        return f"{trial} diverged"
    accuracy = trial.metrics["val_accuracy"]
    return f"{trial}: val_accuracy {accuracy:.4f}, {100 * trial.zero_share:.1f} % of the weights zero"
