"""Trains one network with given parameters, on an engine that trainings of the same recipe can share."""

from __future__ import annotations

import functools

import numpy as np

from components.training.checkpoint import Checkpoint
from components.training.engine import Engine, Fit
from components.training.network import build_model
from components.training.params import Params
from ridgeline.artifacts.examples import Examples


def make_engine(examples: Examples, params: Params) -> Engine:
    """Return an engine for a training, and for all others with the same recipe, formula of the penalty and network.

    Args:
        examples: The splits; the test split is not read.
        params: The training.
    """
    return Engine(functools.partial(build_model, examples, params), examples, params.recipe, params.penalty.formula)


def fit(
    engine: Engine,
    params: Params,
    checkpoint: Checkpoint | None = None,
    initial: list[np.ndarray] | None = None,
) -> Fit:
    """Train with an engine of the same recipe, formula of the penalty, network and examples.

    Args:
        engine: What `make_engine` returned for these parameters, or for others of the same recipe, formula and network.
        params: The training.
        checkpoint: Where its state is kept; None for no checkpoint.
        initial: The weights to start from; those of the seed if None.
    """
    return engine.fit(
        penalty=params.penalty,
        learning_rate=params.learning_rate,
        seed=params.seed,
        epochs=params.epochs,
        patience=params.patience,
        checkpoint=checkpoint,
        initial=initial,
    )
