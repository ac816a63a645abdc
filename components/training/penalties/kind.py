"""What a penalty declares: its names, its strengths, its term of the loss and its proximal operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Strength:
    """A factor of a penalty: a parameter of `train`.

    Attributes:
        name: The parameter's name: ``train.penalty.<name>``.
        default: Its default, above 0.
        title: Its name on the form.
        description: Its help text.
    """

    name: str
    default: float
    title: str
    description: str


def _no_reason(shape: tuple[int, ...], layer: str) -> str | None:
    return None


@dataclass(frozen=True)
class Formula:
    """A term of the loss, as TensorFlow operations. Trainings with the same formula share compiled code.

    Attributes:
        strengths: Names of the factors. They are variables: a new value needs no compilation.
        value: Returns the term of one kernel, from the kernel, each factor by name, and whether the part that is not
            smooth must have no gradient.
        proximal_step: Returns the kernel to which the proximal operator of the part that is not smooth was applied,
            from the kernel, the step size of the preceding update, and each factor by name. None for a smooth term.
        keras_regularizer: Returns Keras's own regularizer for these factors, which a saved model gets; None if there
            is none.
        unfit: Returns why a weight of this shape, in a layer of this class, can't have the penalty; None if it can.
    """

    strengths: tuple[str, ...]
    value: Callable[[Any, Mapping[str, Any], bool], Any]
    proximal_step: Callable[[Any, Any, Mapping[str, Any]], Any] | None = None
    keras_regularizer: Callable[[Mapping[str, float]], keras.Regularizer | None] = lambda strengths: None
    unfit: Callable[[tuple[int, ...], str], str | None] = _no_reason


@dataclass(frozen=True)
class Kind:
    """A kind of penalty.

    Attributes:
        name: Its value of ``train.penalty.kind``. With a strength, also the parameter of `sweep` that lists strengths.
        label: Its name in reports.
        choice: Its name on the form.
        formula: Its term of the loss.
        strengths: The factors that apply; the formula's others are 0.
        sparse: Whether its proximal operator sets weights to zero. Otherwise the solver `proximal` has nothing to do.
        path: Strengths that a sweep tries by default; only for a kind with one strength.
    """

    name: str
    label: str
    choice: str
    formula: Formula
    strengths: tuple[Strength, ...] = ()
    sparse: bool = False
    path: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        names = {strength.name for strength in self.strengths}
        if unknown := sorted(names - {*self.formula.strengths}):
            raise ValueError(
                f"Expected the strengths of the penalty {self.name} to be among those of its formula, "
                f"{', '.join(self.formula.strengths) or 'none'}; received {', '.join(unknown)}. Use one name."
            )
        if self.sparse and self.formula.proximal_step is None:
            raise ValueError(
                f"Expected a proximal_step in the formula of the penalty {self.name}, which is sparse; received none. "
                "Give its formula one, or set sparse=False."
            )


def group_size(shape: tuple[int, ...], axis: int) -> int:
    """Return how many weights share one index of an axis.

    Example:
        >>> group_size((3, 3, 8, 16), -2)
        144
    """
    return math.prod(shape) // shape[axis]
