"""L1 and L2, the elastic net: ``l1 * sum(abs(w)) + l2 * sum(w ** 2)``, in Keras's convention.

Zou and Hastie, "Regularization and Variable Selection via the Elastic Net", J. Royal Statistical Society B 67(2), 2005.
No penalty, L1 alone and L2 alone are the same formula with strengths of 0, so all four share compiled code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.training.penalties.kind import Formula, Kind, Strength

if TYPE_CHECKING:
    import keras

L1_STRENGTH = Strength(
    "l1", 1e-4, "L1 strength", "Factor of the sum of absolute weights, at least 0, such as 1e-4; for l1 and l1_l2."
)
L2_STRENGTH = Strength(
    "l2", 0.01, "L2 strength", "Factor of the sum of squared weights, at least 0, such as 0.01; for l2 and l1_l2."
)


def value(weights: Any, strengths: Mapping[str, Any], smooth_only: bool) -> Any:
    """Return ``l1 * sum(abs(w)) + l2 * sum(w ** 2)``; L1 is the part that is not smooth."""
    import tensorflow as tf

    absolute = tf.abs(tf.stop_gradient(weights) if smooth_only else weights)
    # One sum, not two: XLA sums sequentially, and a sum takes as long as the rest of a small step.
    return tf.reduce_sum(strengths["l1"] * absolute + strengths["l2"] * tf.square(weights))


def proximal_step(weights: Any, rate: Any, strengths: Mapping[str, Any]) -> Any:
    """Return ``sign(w) * max(abs(w) - rate * l1, 0)``: soft-thresholding."""
    import tensorflow as tf

    threshold = rate * strengths["l1"]
    return weights - tf.clip_by_value(weights, -threshold, threshold)


def keras_regularizer(strengths: Mapping[str, float]) -> keras.Regularizer | None:
    """Return Keras's `L1L2`; None if both strengths are 0."""
    import keras

    return keras.regularizers.L1L2(**strengths) if any(strengths.values()) else None


ELASTIC_NET = Formula(("l1", "l2"), value, proximal_step, keras_regularizer)
L1_L2 = Kind(
    "l1_l2",
    label="L1 + L2",
    choice="L1 and L2",
    formula=ELASTIC_NET,
    strengths=(L1_STRENGTH, L2_STRENGTH),
    sparse=True,
)
