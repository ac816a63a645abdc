"""Train: fits a regularized network."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from components.training.checkpoint import Checkpoint
from components.training.engine import Fit
from components.training.fit import fit, make_engine
from components.training.network import build_model
from components.training.network_check import check_network
from components.training.params import Params, Regularization, network_code
from components.training.several_workers import join, make_shared_engine
from ridgeline.artifacts.example_anomalies import ExampleAnomalies
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import LayerSparsity, Model, ModelFacts, eliminated_pixels, eliminated_units, kernels
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.component import Champion, StepError, Workers, component

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)


@component(output=Model, after=(ExampleAnomalies,), uses_champion=lambda params: params.warm_start, code=network_code)
def train(
    examples: Examples,
    params: Params,
    output: Path,
    scratch: Path | None,
    workers: Workers | None,
    sweep: SweepResult | None = None,
    champion: Champion[Model] | None = None,
) -> ModelFacts:
    """Fit a regularized network on the training split; report on the validation split.

    Args:
        examples: The splits; the test split is not read.
        params: Network, penalty and training.
        output: Empty directory to write a `Model` into.
        scratch: Folder of the checkpoint, from which a killed or failed training resumes; None for no checkpoint.
        workers: The processes that share each batch; None for this one alone.
        sweep: A sweep on the same examples: the penalty and the solver that it chose replace those of `params`.
        champion: The model to start from under ``warm_start``; None if there is none.

    Returns:
        The model's facts.

    Raises:
        FloatingPointError: If the loss becomes NaN or infinite.
        CheckpointError: If the checkpoint in `scratch` belongs to another training.
        ValueError: If the sweep used other examples.
        StepError: If the network can't be trained, or not be served, or the training can't start from the champion.
        TransientStepError: If a worker is lost, or missing.
    """
    if workers:
        join(workers)
    if sweep:
        _expect_same_examples(sweep, examples)
        params = choose_penalty(params, sweep)
        log.info("the penalty that the sweep chose: %r, solver %s", params.penalty, params.solver)
    check_network(examples, params)
    identity = {"params": params.model_dump(mode="json"), "examples": examples.digest}
    initial = None
    if champion:
        initial = champion_weights(champion, examples, params)
        identity["started_from"] = champion.artifact_digest
        log.info("starting from the weights of the champion, model %s", champion.artifact_digest)
    elif params.warm_start:
        log.info("there is no champion to start from: the weights are random")
    checkpoint = Checkpoint(scratch / "checkpoint", identity) if scratch else None
    engine = make_engine(examples, params) if workers is None else make_shared_engine(examples, params, workers)
    result = fit(engine, params, checkpoint, initial)
    facts = write_model(output, examples, params, result, engine.penalized(result.weights).values())
    return facts.model_copy(update={"started_from": champion.artifact_digest}) if champion else facts


def champion_weights(champion: Champion[Model], examples: Examples, params: Params) -> list[np.ndarray]:
    """Return the weights of the champion, for a training that starts from them.

    Args:
        champion: The champion.
        examples: What is to be trained on.
        params: The training.

    Returns:
        The values of the model's ``weights``, in their order.

    Raises:
        StepError: If the champion can't be read, or has another image shape, other classes or another network.
    """
    start = f"the champion, model {champion.artifact_digest[:12]}"
    advice = "Train with warm_start=false."
    if champion.artifact is None:
        raise StepError(f"Cannot start from {start}: it can't be read ({champion.problem}). Restore it. {advice}")
    if misfit := champion.artifact.facts.misfit(examples.facts):
        raise StepError(f"Expected {start}, to have the examples' {misfit}. {advice}")
    weights = [np.asarray(weight) for weight in champion.artifact.load_keras().weights]
    shapes = [tuple(weight.shape) for weight in build_model(examples, params).weights]
    if shapes != [weight.shape for weight in weights]:
        raise StepError(
            f"Expected {start}, to have weights of the shapes {shapes}; received "
            f"{[weight.shape for weight in weights]}. Set train.network and its options to the champion's. {advice}"
        )
    return weights


def choose_penalty(params: Params, sweep: SweepResult) -> Params:
    """Return training parameters with the penalty and the solver of a sweep's winner.

    Args:
        params: The training's own parameters.
        sweep: The sweep.

    Raises:
        ValueError: If the winner's solver does not fit the training.
    """
    winner = sweep.facts.winner_params
    chosen = {name: winner[name] for name in Regularization.model_fields}
    return Params(**{**dict(params), **chosen})


def _expect_same_examples(sweep: SweepResult, examples: Examples) -> None:
    if sweep.facts.examples_digest != examples.digest:
        raise ValueError(
            f"Expected a sweep on the examples {examples.digest}; received one on {sweep.facts.examples_digest} of "
            f"{sweep.facts.dataset}. Sweep on these examples."
        )


def write_model(
    output: Path, examples: Examples, params: Params, result: Fit, penalized: Iterable[np.ndarray]
) -> ModelFacts:
    """Write a `Model`'s files.

    Args:
        output: An empty directory.
        examples: What it was trained on.
        params: Its training.
        result: The training's result.
        penalized: Those of its weights that have the penalty.

    Returns:
        The model's facts.
    """
    model = build_model(examples, params)  # with ordinary Keras regularizers, without the optimizer's state
    for weight, value in zip(model.weights, result.weights, strict=True):
        weight.assign(value)
    (output / "history.json").write_text(json.dumps(result.history, indent=1) + "\n", encoding="utf-8")
    (output / "architecture.json").write_text(model.to_json(indent=1) + "\n", encoding="utf-8")
    (output / "summary.txt").write_text(summary(model), encoding="utf-8")
    model.save_weights(output / "model.weights.h5")
    eliminated = eliminated_pixels(model)
    saved = params.penalty.keras_regularizer() is not None or not any(params.penalty.strengths.values())
    return ModelFacts(
        dataset=examples.facts.dataset,
        image_shape=examples.facts.image_shape,
        class_names=examples.facts.class_names,
        normalization=examples.facts.normalization,
        params=params.model_dump(mode="json"),
        num_parameters=sum(math.prod(weight.shape) for weight in model.trainable_weights),
        metrics=result.metrics,
        sparsity=sparsity(model),
        num_eliminated_pixels=None if eliminated is None else int(np.count_nonzero(eliminated)),
        num_eliminated_units=eliminated_units(model),
        unsaved_penalty=0.0 if saved else sum(map(params.penalty.value, penalized)),
        synthetic=examples.facts.synthetic,
    )


def summary(model: keras.Model) -> str:
    """Return Keras's summary of a model as plain text."""
    text = io.StringIO()
    with redirect_stdout(io.StringIO()):
        model.summary(line_length=100, print_fn=lambda line: text.write(f"{line}\n"))
    return text.getvalue()


def sparsity(model: keras.Model) -> tuple[LayerSparsity, ...]:
    """Count the weights of each kernel that are exactly zero, from input to output."""
    return tuple(
        LayerSparsity(name=name, num_weights=kernel.size, num_zeros=int(np.count_nonzero(kernel == 0.0)))
        for name, kernel in kernels(model).items()
    )
