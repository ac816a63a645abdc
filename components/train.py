"""Train: fits a regularized multilayer perceptron."""

from __future__ import annotations

import functools
import io
import json
import logging
import math
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from components.checkpoint import Checkpoint
from components.engine import Engine, Fit, Recipe
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import LayerSparsity, Model, ModelFacts, eliminated_pixels, kernels
from ridgeline.artifacts.sweep_result import SweepResult
from ridgeline.component import Params as StepParams
from ridgeline.component import component, shown_as

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

# The profile `tuned`: found by sweeps and searches on the validation split of Fashion-MNIST, for the seed's network.
# Last, over 3 seeds: 160 epochs 0.9171; with the cosine schedule 0.9155, at twice the rate 0.9146; 80 epochs 0.9151.
TUNED: Mapping[str, Any] = {
    "penalty": {"kind": "l2", "l2": 1e-5},
    "optimizer": "adam",
    "learning_rate": 0.001,
    "batch_size": 128,
    "epochs": 160,
    "label_smoothing": 0.1,
    "shift": 1,
    "shift_share": 0.5,
    "flip": True,
    "average": 0.9995,
}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples


class Penalty(BaseModel):
    """What is added to the loss for each kernel ``w``: ``l1 * sum(abs(w)) + l2 * sum(w ** 2)``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["none", "l1", "l2", "l1_l2"] = Field(
        "l2",
        title="Penalty",
        description="Which strengths apply: none, l1, l2, or both (l1_l2).",
        json_schema_extra=shown_as(none="none", l1="L1: zeros weights", l2="L2: spreads weights", l1_l2="L1 and L2"),
    )
    l1: float = Field(
        1e-4,
        ge=0.0,
        title="L1 strength",
        description="Factor of the sum of absolute weights, at least 0, such as 1e-4; for l1 and l1_l2.",
    )
    l2: float = Field(
        0.01,
        ge=0.0,
        title="L2 strength",
        description="Factor of the sum of squared weights, at least 0, such as 0.01; for l2 and l1_l2.",
    )

    @model_validator(mode="after")
    def _strengths_apply(self) -> Self:
        for name in ("l1", "l2"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if name not in self.kind.split("_") and value not in (default, 0.0):
                raise ValueError(
                    f"{name}: expected 0 or the default {default!r} with kind={self.kind!r}, under which it does not "
                    f"apply; received {value!r}. Set kind={name} or l1_l2, or leave {name} out."
                )
        return self

    @property
    def strengths(self) -> tuple[float, float]:
        """The L1 and the L2 strength that apply."""
        return (
            self.l1 if self.kind in ("l1", "l1_l2") else 0.0,
            self.l2 if self.kind in ("l2", "l1_l2") else 0.0,
        )


class Regularization(StepParams):
    """The penalty and how it acts."""

    penalty: Penalty = Penalty()
    solver: Literal["subgradient", "proximal"] = Field(
        "subgradient",
        title="Solver",
        description="How L1 acts: by its subgradient in the loss, as in Keras (small weights, none zero), or proximal: "
        "soft-thresholding after each update (exact zeros; needs l1 or l1_l2 with sgd, without averaging).",
        json_schema_extra=shown_as(subgradient="subgradient, as in Keras", proximal="proximal: L1 gives exact zeros"),
    )


class Training(StepParams):
    """The network and its training, whatever its penalty."""

    profile: Literal["seed", "tuned"] = Field(
        "seed",
        title="Profile",
        description="tuned: each training parameter that is left at its default gets the value that reached the best "
        "validation accuracy in our own search.",
        json_schema_extra=shown_as(seed="seed: the small default model", tuned="tuned: the best of our search"),
    )
    hidden_units: Annotated[tuple[Annotated[int, Field(ge=1, le=10_000)], ...], BeforeValidator(_as_tuple)] = Field(
        (100, 100),
        max_length=10,
        title="Hidden units",
        description="Units of each hidden layer (relu, he_normal), from input to output; empty for softmax regression.",
    )
    optimizer: Literal["sgd", "adam"] = Field(
        "sgd",
        title="Optimizer",
        description="Keras optimizer.",
        json_schema_extra=shown_as(sgd="SGD: stochastic gradient descent", adam="Adam"),
    )
    learning_rate: float = Field(
        0.02, gt=0.0, le=10.0, title="Learning rate", description="Step size of each update, above 0, at most 10."
    )
    momentum: float = Field(
        0.0, ge=0.0, lt=1.0, title="Momentum", description="Share of the last step, 0 to below 1; for sgd."
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant",
        title="Schedule",
        description="Learning rate over the epochs; cosine falls to zero.",
        json_schema_extra=shown_as(constant="constant", cosine="cosine, to zero"),
    )
    batch_size: int = Field(32, ge=1, le=65_536, title="Batch size", description="Images an update, 1 to 65536.")
    epochs: int = Field(2, ge=1, le=10_000, title="Epochs", description="Passes over the training split, 1 to 10000.")
    patience: int | None = Field(
        None,
        ge=1,
        title="Patience",
        description="Stop after so many epochs without better validation accuracy, and keep the best epoch's weights; "
        "empty: train all epochs and keep the last.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        title="Label smoothing",
        description="Share of each label spread over all classes, 0 to below 1.",
    )
    shift: int = Field(
        0, ge=0, le=64, title="Shift", description="Training images are moved by up to so many pixels each way."
    )
    shift_share: float = Field(
        1.0, ge=0.0, le=1.0, title="Shifted share", description="Share of the training images that is shifted, 0 to 1."
    )
    flip: bool = Field(False, title="Flip", description="Half of the training images are mirrored left to right.")
    average: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        title="Weight averaging",
        description="Decay of the moving average of the weights, kept instead of the last ones; 0 (none) to below 1.",
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**31,
        title="Seed",
        description="Decides initial weights, order of images, augmentation; 0 to 2147483647.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("profile") != "tuned":
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return _tuned(values, {name: value for name, value in TUNED.items() if name in defaults}, defaults)

    @model_validator(mode="after")
    def _shares_apply(self) -> Self:
        if not self.shift and self.shift_share != type(self).model_fields["shift_share"].default:
            raise ValueError(
                f"shift_share: expected its default with shift=0, under which no image is shifted; received "
                f"{self.shift_share!r}. Set shift, or leave shift_share out."
            )
        return self

    @model_validator(mode="after")
    def _momentum_is_sgds(self) -> Self:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"momentum: expected 0 with the optimizer {self.optimizer}, which has its own; received "
                f"{self.momentum!r}. Set momentum=0 or optimizer=sgd."
            )
        return self


class Params(Training, Regularization):
    """The penalty, the network and its training; the defaults are the seed model."""

    @model_validator(mode="after")
    def _solver_fits(self) -> Self:
        if self.solver == "proximal" and self.penalty.kind not in ("l1", "l1_l2"):
            raise ValueError(
                "solver: expected subgradient with a penalty that has no L1 part; received 'proximal' with "
                f"penalty.kind={self.penalty.kind!r}. Set penalty.kind=l1 or l1_l2, or solver=subgradient."
            )
        if self.solver == "proximal" and self.optimizer != "sgd":
            raise ValueError(
                f"solver: expected subgradient with the optimizer {self.optimizer}, whose step size differs by "
                "weight, so that one threshold is wrong; received 'proximal'. Set optimizer=sgd or solver=subgradient."
            )
        if self.solver == "proximal" and self.average:
            raise ValueError(
                "solver: expected subgradient with weight averaging, since an average of sparse weights is not sparse; "
                f"received 'proximal' with average={self.average!r}. Set average=0 or solver=subgradient."
            )
        return self

    @property
    def recipe(self) -> Recipe:
        """What is fixed in the compiled code."""
        return Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})


def _tuned(given: Mapping[str, Any], tuned: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given values, of which those that equal the default are replaced by the tuned ones.

    The penalty is one value: where any part of it is given, none of it is replaced.
    """
    result = {**defaults, **given}
    for name, value in tuned.items():
        received, default = result[name], defaults[name]
        if isinstance(received, Mapping):
            received, default = {**dict(default), **received}, dict(default)
        if received == default:
            result[name] = value
    return result


@component(output=Model)
def train(
    examples: Examples, sweeps: tuple[SweepResult, ...], params: Params, output: Path, scratch: Path | None
) -> ModelFacts:
    """Fit a regularized multilayer perceptron on the training split; report on the validation split.

    Args:
        examples: The splits; the test split is not read.
        sweeps: At most one, on the same examples: the penalty and the solver that it chose replace those of `params`.
        params: Network, penalty and training.
        output: Empty directory to write a `Model` into.
        scratch: Folder of the checkpoint, from which a killed or failed training resumes; None for no checkpoint.

    Returns:
        The model's facts.

    Raises:
        FloatingPointError: If the loss becomes NaN or infinite.
        CheckpointError: If the checkpoint in `scratch` is another training's.
        ValueError: If there are several sweeps, or the sweep chose on other examples.
    """
    for sweep in _at_most_one(sweeps, examples):
        params = choose_penalty(params, sweep)
        log.info("the penalty that the sweep chose: %r, solver %s", params.penalty, params.solver)
    identity = {"params": params.model_dump(mode="json"), "examples": examples.digest}
    checkpoint = Checkpoint(scratch / "checkpoint", identity) if scratch else None
    engine = Engine(functools.partial(build_model, examples, params), examples, params.recipe)
    return write_model(output, examples, params, fit(engine, params, checkpoint))


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
    fitting = Params(**{**dict(params), **chosen, "profile": "seed"})  # where no value is replaced
    return fitting.model_copy(update={"profile": params.profile})


def _at_most_one(sweeps: tuple[SweepResult, ...], examples: Examples) -> tuple[SweepResult, ...]:
    if len(sweeps) > 1:
        raise ValueError(f"Expected at most one sweep; received {len(sweeps)}. Sweep once, over the whole grid.")
    for sweep in sweeps:
        if sweep.facts.examples_digest != examples.digest:
            raise ValueError(
                f"Expected a sweep on the examples {examples.digest}; received one on {sweep.facts.examples_digest} of "
                f"{sweep.facts.dataset}. Sweep on these examples."
            )
    return sweeps


def fit(engine: Engine, params: Params, checkpoint: Checkpoint | None = None) -> Fit:
    """Train with an engine made from the same recipe, network and examples.

    Args:
        engine: Any engine of `params.recipe` and `params.hidden_units`: the other parameters compile nothing anew.
        params: The training.
        checkpoint: Where its state is kept; None for nowhere.
    """
    l1, l2 = params.penalty.strengths
    return engine.fit(
        l1=l1,
        l2=l2,
        learning_rate=params.learning_rate,
        seed=params.seed,
        epochs=params.epochs,
        patience=params.patience,
        checkpoint=checkpoint,
    )


def write_model(output: Path, examples: Examples, params: Params, result: Fit) -> ModelFacts:
    """Write a `Model`'s files.

    Args:
        output: An empty directory.
        examples: What it was trained on.
        params: Its training.
        result: The training's result.

    Returns:
        The model's facts.
    """
    model = build_model(examples, params)  # with ordinary Keras regularizers, without the optimizer's state
    for variable, value in zip(model.variables, result.weights, strict=True):
        variable.assign(value)
    (output / "history.json").write_text(json.dumps(result.history, indent=1) + "\n", encoding="utf-8")
    (output / "architecture.json").write_text(model.to_json(indent=1) + "\n", encoding="utf-8")
    (output / "summary.txt").write_text(summary(model), encoding="utf-8")
    model.save_weights(output / "model.weights.h5")
    return ModelFacts(
        dataset=examples.facts.dataset,
        image_shape=examples.facts.image_shape,
        class_names=examples.facts.class_names,
        normalization=examples.facts.normalization,
        params=params.model_dump(mode="json"),
        num_parameters=sum(math.prod(weight.shape) for weight in model.trainable_weights),
        metrics=result.metrics,
        sparsity=sparsity(model),
        num_eliminated_pixels=int(np.count_nonzero(eliminated_pixels(model))),
        synthetic=examples.facts.synthetic,
    )


def build_model(examples: Examples, params: Params, regularizer: keras.Regularizer | None = None) -> keras.Model:
    """Return the untrained network: raw uint8 images ``[n, *image_shape]`` to probabilities ``[n, classes]``.

    Args:
        examples: Gives the image shape, the classes and the normalization, which is the first layer.
        params: The network and its penalty.
        regularizer: Regularizer of every kernel; Keras's own with the penalty's strengths if None.
    """
    import keras

    l1, l2 = params.penalty.strengths
    if regularizer is None and (l1 or l2):
        regularizer = keras.regularizers.L1L2(l1=l1, l2=l2)
    norm = examples.facts.normalization

    def dense(units: int, name: str, activation: str, initializer: str) -> keras.layers.Dense:
        return keras.layers.Dense(
            units, activation, kernel_initializer=initializer, kernel_regularizer=regularizer, name=name
        )

    return keras.Sequential(
        [
            keras.Input(examples.facts.image_shape, dtype="uint8", name="images"),
            keras.layers.Rescaling(1.0 / norm.deviation, -norm.mean / norm.deviation, name="normalization"),
            keras.layers.Flatten(name="flatten"),
            *(dense(units, f"hidden_{i}", "relu", "he_normal") for i, units in enumerate(params.hidden_units, start=1)),
            dense(len(examples.facts.class_names), "output", "softmax", "glorot_uniform"),
        ],
        name="classifier",
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


if __name__ == "__main__":
    train.main()
