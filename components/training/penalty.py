"""The penalties: their strengths, their names, their term in the loss and their proximal step.

To add a penalty to `train`, change this module alone: add an entry to `KINDS`, and its term to `Penalty`, `regularizer`
and `proximal_step`. The form and the evaluation's report read the rest from `KINDS`. A sweep tries the strengths that
`components.sweep` lists, L1 and L2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ridgeline.component import shown_as

if TYPE_CHECKING:
    import keras

STRENGTHS = ("l1", "l2")


@dataclass(frozen=True)
class Kind:
    """A kind of penalty.

    Attributes:
        strengths: Names of the strengths that apply.
        label: Its name in reports.
        choice: Its name on the form.
    """

    strengths: tuple[str, ...]
    label: str
    choice: str


# In the order in which a sweep tries them and a report lists them.
KINDS: Mapping[str, Kind] = {
    "none": Kind((), "no penalty", "none"),
    "l1": Kind(("l1",), "L1", "L1: zeros weights"),
    "l2": Kind(("l2",), "L2", "L2: spreads weights"),
    "l1_l2": Kind(("l1", "l2"), "L1 + L2", "L1 and L2"),
}


class Penalty(BaseModel):
    """What is added to the loss for each kernel ``w``: ``l1 * sum(abs(w)) + l2 * sum(w ** 2)``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal[*KINDS] = Field(  # type: ignore[valid-type]
        "l2",
        title="Penalty",
        description="Which strengths apply: none, l1, l2, or both (l1_l2).",
        json_schema_extra=shown_as(**{name: kind.choice for name, kind in KINDS.items()}),
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

    @classmethod
    def at(cls, kind: str, *strengths: float) -> Self:
        """Return a penalty of a kind, with the strengths that apply to it in the order of `KINDS`.

        Example:
            >>> Penalty.at("l1_l2", 0.001, 0.01).strengths
            {'l1': 0.001, 'l2': 0.01}
            >>> Penalty.at("l1", 0.001).label
            'L1 0.001'
        """
        given = dict(zip(KINDS[kind].strengths, strengths, strict=True))
        return cls(kind=kind, **{**dict.fromkeys(STRENGTHS, 0.0), **given})

    @model_validator(mode="after")
    def _strengths_apply(self) -> Self:
        for name in STRENGTHS:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if name not in KINDS[self.kind].strengths and value not in (default, 0.0):
                kinds = [kind for kind, facts in KINDS.items() if name in facts.strengths]
                raise ValueError(
                    f"{name}: expected 0 or the default {default!r} with kind={self.kind!r}, under which it does not "
                    f"apply; received {value!r}. Set kind={' or '.join(kinds)}, or leave {name} out."
                )
        return self

    @property
    def strengths(self) -> dict[str, float]:
        """Each strength by name; 0 where it does not apply."""
        return {name: getattr(self, name) if name in KINDS[self.kind].strengths else 0.0 for name in STRENGTHS}

    def keras_regularizer(self) -> keras.Regularizer | None:
        """Return the part of the penalty that Keras's own regularizer expresses, for a saved model; None for none."""
        import keras

        known = {name: self.strengths[name] for name in ("l1", "l2")}
        return keras.regularizers.L1L2(**known) if any(known.values()) else None

    @property
    def label(self) -> str:
        """Its name in reports, with its strengths: ``L1 0.001``."""
        strengths = " and ".join(f"{getattr(self, name):g}" for name in KINDS[self.kind].strengths)
        return f"{KINDS[self.kind].label} {strengths}".strip()


def regularizer(smooth_only: bool) -> Any:
    """Return the penalty as a Keras regularizer whose strengths can be changed after compilation.

    Args:
        smooth_only: Whether L1, the part that is not smooth, is left out of the gradient; it stays in the loss.

    Returns:
        A `keras.Regularizer`; its attribute ``strengths`` holds a variable for each of `STRENGTHS`.
    """
    import keras
    import tensorflow as tf

    class Regularizer(keras.Regularizer):
        def __init__(self) -> None:
            self.strengths = {name: tf.Variable(0.0, trainable=False) for name in STRENGTHS}

        def __call__(self, weights: Any) -> Any:
            absolute = tf.abs(tf.stop_gradient(weights) if smooth_only else weights)
            # One sum, not two: XLA sums sequentially, and a sum takes as long as the rest of a small step.
            return tf.reduce_sum(self.strengths["l1"] * absolute + self.strengths["l2"] * tf.square(weights))

    return Regularizer()


def proximal_step(weights: Any, rate: Any, strengths: Mapping[str, Any]) -> Any:
    """Apply the proximal operator of the part of the penalty that is not smooth: soft-thresholding for L1.

    Args:
        weights: A kernel.
        rate: The step size of the preceding update.
        strengths: Each strength by name.

    Returns:
        ``sign(w) * max(abs(w) - rate * l1, 0)``.
    """
    import tensorflow as tf

    threshold = rate * strengths["l1"]
    return weights - tf.clip_by_value(weights, -threshold, threshold)
