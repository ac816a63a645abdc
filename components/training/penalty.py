"""The penalty of a training: its parameters, and its term of the loss with strengths that can change.

What each penalty is, `components.training.penalties` declares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, create_model, model_validator

from components.training.penalties import KINDS
from components.training.penalties.kind import Formula, Strength
from ridgeline.component import applies_with, shown_as

if TYPE_CHECKING:
    import keras

STRENGTHS: dict[str, Strength] = {strength.name: strength for kind in KINDS.values() for strength in kind.strengths}


def kinds_with(strength: str) -> list[str]:
    """Return the kinds of penalty to which a strength applies."""
    return [name for name, kind in KINDS.items() if strength in {s.name for s in kind.strengths}]


def _fields() -> Any:
    """Return a model with the kind, and a field for each strength that a penalty declares."""
    kind = Field(
        "l2",
        title="Penalty",
        description=f"Which strengths apply: {', '.join(KINDS)}.",
        json_schema_extra=shown_as(**{name: kind.choice for name, kind in KINDS.items()}),
    )
    strengths = {
        name: (
            float,
            Field(
                strength.default,
                ge=0.0,
                title=strength.title,
                description=strength.description,
                json_schema_extra=applies_with(kind=kinds_with(name)),
            ),
        )
        for name, strength in STRENGTHS.items()
    }
    config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    return create_model("Fields", __config__=config, kind=(Literal[*KINDS], kind), **strengths)  # type: ignore[call-overload]


class Penalty(_fields()):  # type: ignore[misc]
    """What is added to the loss for each kernel: the kind, and a strength for each factor that a kind may have."""

    @classmethod
    def at(cls, kind: str, *strengths: float) -> Self:
        """Return a penalty of a kind, with the strengths that apply to it in the order of its declaration.

        Example:
            >>> Penalty.at("l1_l2", 0.001, 0.01).strengths
            {'l1': 0.001, 'l2': 0.01}
            >>> Penalty.at("l1", 0.001).label
            'L1 0.001'
        """
        names = [strength.name for strength in KINDS[kind].strengths]
        return cls(kind=kind, **dict.fromkeys(STRENGTHS, 0.0) | dict(zip(names, strengths, strict=True)))

    @model_validator(mode="after")
    def _strengths_apply(self) -> Self:
        for name, default in ((name, strength.default) for name, strength in STRENGTHS.items()):
            value = getattr(self, name)
            if name not in self.strengths and value not in (default, 0.0):
                raise ValueError(
                    f"{name}: expected 0 or the default {default!r} with kind={self.kind!r}, under which it does not "
                    f"apply; received {value!r}. Set kind={' or '.join(kinds_with(name))}, or leave {name} out."
                )
        return self

    @property
    def strengths(self) -> dict[str, float]:
        """The strengths that apply, by name."""
        return {strength.name: getattr(self, strength.name) for strength in KINDS[self.kind].strengths}

    @property
    def formula(self) -> Formula:
        """Its term of the loss."""
        return KINDS[self.kind].formula

    @property
    def factors(self) -> dict[str, float]:
        """Each factor of the formula by name; 0 where it does not apply."""
        return {name: self.strengths.get(name, 0.0) for name in self.formula.strengths}

    @property
    def label(self) -> str:
        """Its name in reports, with its strengths: ``L1 0.001``."""
        strengths = " and ".join(f"{value:g}" for value in self.strengths.values())
        return f"{KINDS[self.kind].label} {strengths}".strip()

    def keras_regularizer(self) -> keras.Regularizer | None:
        """Return Keras's own regularizer for it, for a saved model; None if there is none."""
        return self.formula.keras_regularizer(self.factors)

    def value(self, weights: Any) -> float:
        """Return its term of the loss for one kernel."""
        return float(self.formula.value(weights, self.factors, False))


def regularizer(formula: Formula, smooth_only: bool) -> Any:
    """Return a penalty as a Keras regularizer whose strengths can be changed after compilation.

    Args:
        formula: The penalty's term of the loss.
        smooth_only: Whether the part that is not smooth is left out of the gradient; it stays in the loss.

    Returns:
        A `keras.Regularizer`; its attribute ``strengths`` holds a variable for each of the formula's.
    """
    import keras
    import tensorflow as tf

    class Regularizer(keras.Regularizer):
        def __init__(self) -> None:
            self.strengths = {name: tf.Variable(0.0, trainable=False) for name in formula.strengths}

        def __call__(self, weights: Any) -> Any:
            return formula.value(weights, self.strengths, smooth_only)

        def get_config(self) -> dict[str, Any]:
            return {}

        def from_config(self, config: dict[str, Any]) -> Any:
            """Return this regularizer: layers that Keras copies, as `Bidirectional` does, share it."""
            return self

    return Regularizer()
