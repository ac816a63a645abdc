"""The parameters of a training: network, optimizer, data augmentation, penalty, seed."""

from __future__ import annotations

import importlib.metadata
import json
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from components.training.engine import Recipe
from components.training.installed_networks import load_networks
from components.training.penalties import KINDS
from components.training.penalty import Penalty
from ridgeline.component import Params as StepParams
from ridgeline.component import applies, applies_with, describe_problem, shown_as, with_option

SPARSE = [name for name, kind in KINDS.items() if kind.sparse]
MAX_SHIFT = 64


class Regularization(StepParams):
    """The penalty and how it acts."""

    penalty: Penalty = Penalty()
    solver: Literal["subgradient", "proximal"] = Field(
        "subgradient",
        title="Solver",
        description="How a penalty that is not smooth acts. subgradient: in the loss, as in Keras; weights become "
        "small, none zero. proximal: by thresholding after each update; weights become exactly zero; needs one of the "
        f"penalties {', '.join(SPARSE)}, sgd, no averaging.",
        json_schema_extra=shown_as(subgradient="subgradient, as in Keras", proximal="proximal: exact zeros")
        | applies_with(optimizer=["sgd"], average=[0.0], **{"penalty.kind": SPARSE}),
    )


class Optimization(StepParams):
    """How the network is trained."""

    profile: Literal["seed", "tuned"] = Field(
        "seed",
        title="Profile",
        description="tuned: the network's tuned values replace the defaults of the training and of the network's "
        "options. On the form, they replace each field that shows its default.",
        json_schema_extra=shown_as(seed="seed: the small default model", tuned="tuned: the best values of a search")
        | with_option("--profile"),
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
        0.0,
        ge=0.0,
        lt=1.0,
        title="Momentum",
        description="Share of the last step, 0 to below 1; for sgd.",
        json_schema_extra=applies_with(optimizer=["sgd"]),
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant",
        title="Schedule",
        description="Learning rate over the epochs; cosine falls to zero.",
        json_schema_extra=shown_as(constant="constant", cosine="cosine, to zero"),
    )
    batch_size: int = Field(32, ge=1, le=65_536, title="Batch size", description="Images per update, 1 to 65536.")
    epochs: int = Field(2, ge=1, le=10_000, title="Epochs", description="Passes over the training split, 1 to 10000.")
    patience: int | None = Field(
        None,
        ge=1,
        title="Patience",
        description="Number of epochs without better validation accuracy after which training stops and keeps the best "
        "epoch's weights. Empty: train all epochs and keep the last weights.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        title="Label smoothing",
        description="Share of each label spread over all classes, 0 to below 1.",
    )
    shift: int = Field(
        0,
        ge=0,
        le=MAX_SHIFT,
        title="Shift",
        description=f"Largest shift of a training image in each direction, 0 to {MAX_SHIFT} pixels.",
    )
    shift_share: float = Field(
        1.0,
        ge=0.0,
        le=1.0,
        title="Shifted share",
        description="Share of the training images that is shifted, 0 to 1.",
        json_schema_extra=applies_with(shift=range(1, MAX_SHIFT + 1)),
    )
    flip: bool = Field(False, title="Flip", description="Half of the training images are mirrored left to right.")
    average: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        title="Weight averaging",
        description="Decay of the moving average of the weights, which replaces the last ones; 0 (none) to below 1.",
    )
    weight_decay: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        title="Weight decay",
        description="Decoupled weight decay of adam (AdamW): each update first multiplies the penalized weights by 1 - "
        "learning rate * this; 0 (none) to below 1. Not the same as an L2 penalty.",
        json_schema_extra=applies_with(optimizer=["adam"]),
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**31,
        title="Seed",
        description="Decides initial weights, order of images, augmentation; 0 to 2147483647.",
    )


# A network can't have the name of another parameter, nor of a step: that would be the parameters of the step.
RESERVED = {
    *(name for part in (Regularization, Optimization) for name in part.model_fields),
    *importlib.metadata.entry_points(group="ridgeline.components").names,
    *("network", "options", "warm_start", "examples", "champion", "output", "recipe"),
}
NETWORKS = load_networks(RESERVED)
DEFAULT_NETWORK = "mlp"
if DEFAULT_NETWORK not in NETWORKS:
    raise ImportError(
        f"Expected an entry point {DEFAULT_NETWORK} in the group ridgeline.networks; received "
        f"{', '.join(NETWORKS) or 'none'}. Install Ridgeline again."
    )

if TYPE_CHECKING:

    class NetworkChoice(StepParams):
        """The network, and its options."""

        network: str = DEFAULT_NETWORK

else:
    NetworkChoice = create_model(
        "NetworkChoice",
        __base__=StepParams,
        __module__=__name__,
        __doc__="The network, and its options under its own name.",
        network=(
            Literal[*NETWORKS],
            Field(
                DEFAULT_NETWORK,
                title="Network",
                description="The network; its options have names that begin with its own.",
                json_schema_extra=shown_as(**{name: network.label for name, network in NETWORKS.items()}),
            ),
        ),
        **{
            name: (network.options, Field(network.options(), json_schema_extra=applies_with(network=[name])))
            for name, network in NETWORKS.items()
            if not network.problem
        },
    )


class Training(Optimization, NetworkChoice):
    """The network and its training, without the penalty."""

    @property
    def options(self) -> Any:
        """The options of the network."""
        return getattr(self, self.network)

    @field_validator("network", mode="before")
    @classmethod
    def _network_is_known(cls, value: Any) -> Any:
        if not isinstance(value, str) or value not in NETWORKS:  # by default, those that can't be used are named, too
            *others, last = [repr(name) for name, network in NETWORKS.items() if not network.problem]
            expected = " or ".join(filter(None, [", ".join(others), last]))
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return value

    @model_validator(mode="after")
    def _network_is_usable(self) -> Self:
        if problem := NETWORKS[self.network].problem:
            raise ValueError(f"network: cannot use {self.network}: {problem}")
        return self

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Set parameters and options that were not given to the network's tuned values, where they apply.

        The penalty is one value: it was given if a part of it was.
        """
        if self.profile != "tuned":
            return self
        network = NETWORKS[self.network]
        if not network.tuned:
            raise ValueError(
                f"profile: expected 'seed' with network={self.network!r}, which has no tuned values; received 'tuned'. "
                "Leave profile out and set the parameters."
            )
        elsewhere = Regularization.model_fields.keys() - type(self).model_fields.keys()  # a sweep has its own penalties
        named = {name: value for name, value in network.tuned.items() if name not in elsewhere}
        required = {name: getattr(self, name) for name, field in type(self).model_fields.items() if field.is_required()}
        try:
            tuned = type(self).model_validate({"network": self.network, **required, **named})
        except ValidationError as error:
            raise ValueError(
                f"profile: cannot use the tuned values of network={self.network!r}: {_problems(error)} Correct `tuned` "
                "of its options, or leave profile out."
            ) from error
        values = {name: getattr(tuned, name) for name in named.keys() - self.model_fields_set}
        self.__dict__.update(values, **{self.network: self._tuned_options(tuned.options)})  # the model is frozen
        for name in [name for name in values if not applies(self, name)]:
            self.__dict__[name] = type(self).model_fields[name].default
        return self

    def _tuned_options(self, tuned: StepParams) -> StepParams:
        """Return the network's options: those that were given, and the tuned ones."""
        given = self.options.model_dump(mode="json", exclude_unset=True)
        try:
            return type(tuned).model_validate_json(json.dumps(tuned.model_dump(mode="json") | given), strict=True)
        except ValidationError as error:
            raise ValueError(
                f"{self.network}: expected options that fit the tuned values of the others; received {given}: "
                f"{_problems(error)} Set the others, too, or profile=seed."
            ) from error

    @model_validator(mode="after")
    def _shares_apply(self) -> Self:
        if not self.shift and self.shift_share != type(self).model_fields["shift_share"].default:
            raise ValueError(
                f"shift_share: expected its default with shift=0, under which no image is shifted; received "
                f"{self.shift_share!r}. Set shift, or leave shift_share out."
            )
        return self

    @model_validator(mode="after")
    def _momentum_needs_sgd(self) -> Self:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"momentum: expected 0 with the optimizer {self.optimizer}, which has its own; received "
                f"{self.momentum!r}. Set momentum=0 or optimizer=sgd."
            )
        return self

    @model_validator(mode="after")
    def _weight_decay_needs_adam(self) -> Self:
        if self.weight_decay and self.optimizer != "adam":
            raise ValueError(
                f"weight_decay: expected 0 with the optimizer {self.optimizer}, which takes an L2 penalty instead; "
                f"received {self.weight_decay!r}. Set weight_decay=0 or optimizer=adam."
            )
        return self

    @model_validator(mode="after")
    def _options_apply(self) -> Self:
        for name in [name for name in NETWORKS if name != self.network]:
            given, defaults = dict(getattr(self, name, ())), dict(NETWORKS[name].options())
            for option in given:
                if given[option] != defaults[option]:
                    raise ValueError(
                        f"{name}.{option}: expected its default {defaults[option]!r} with network={self.network!r}, "
                        f"under which it does not apply; received {given[option]!r}. Set network={name}, or leave "
                        f"{name}.{option} out."
                    )
        return self

    @model_serializer(mode="wrap")
    def _without_other_networks(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the options of the other networks: they are in no key, so an installation changes none."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name not in NETWORKS or name == self.network}


def _problems(error: ValidationError) -> str:
    return " ".join(describe_problem(".".join(map(str, item["loc"])), item) for item in error.errors())


def network_code(training: Training | None) -> tuple[str, ...]:
    """Return the module of the network that is trained, or those of all networks if None.

    Args:
        training: The training.
    """
    names = NETWORKS if training is None else (training.network,)
    return tuple(NETWORKS[name].module for name in names if not NETWORKS[name].problem)


class Params(Training, Regularization):
    """The penalty, the network and its training; the defaults are the seed model."""

    warm_start: bool = Field(
        False,
        title="Warm start",
        description="Start from the weights of the champion, the model that is served, instead of random ones. Its "
        "network and classes must be the same. Without a champion, the weights are random.",
    )

    @model_validator(mode="after")
    def _solver_fits(self) -> Self:
        if self.solver == "proximal" and not KINDS[self.penalty.kind].sparse:
            raise ValueError(
                "solver: expected subgradient with a penalty that is smooth, so that nothing is to be thresholded; "
                f"received 'proximal' with penalty.kind={self.penalty.kind!r}. Set penalty.kind to one of "
                f"{', '.join(SPARSE)}, or solver=subgradient."
            )
        if self.solver == "proximal" and self.optimizer != "sgd":
            raise ValueError(
                f"solver: expected subgradient with the optimizer {self.optimizer}, whose step size differs between "
                "weights, so that no single threshold fits a kernel or a group; received 'proximal'. Set "
                "optimizer=sgd or solver=subgradient."
            )
        if self.solver == "proximal" and self.average:
            raise ValueError(
                "solver: expected subgradient with weight averaging, since an average of sparse weights is not sparse; "
                f"received 'proximal' with average={self.average!r}. Set average=0 or solver=subgradient."
            )
        return self

    @property
    def recipe(self) -> Recipe:
        """The settings that are fixed in the compiled code."""
        return Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})
