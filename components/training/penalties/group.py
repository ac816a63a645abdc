"""Group lasso: ``group * sum over groups of sqrt(size of the group) * norm(group)``.

The outgoing weights of one input pixel, unit or channel form a group: a row of a dense kernel ``[inputs, units]``, all
weights of one input channel of a convolution kernel ``[height, width, inputs, channels]``.

Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", J. Royal Statistical Society B
68(1), 2006. Its proximal operator is block soft-thresholding (Parikh and Boyd, "Proximal Algorithms", 2014, section
6.5.4).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from components.training.penalties.kind import Formula, Kind, Strength, group_size

INPUTS = -2  # the axis of the inputs in a kernel of these layers
LAYERS = re.compile(r"Dense|(Separable|Depthwise)?Conv[123]D|(SimpleRNN|LSTM|GRU)Cell")  # Keras's classes

STRENGTH = Strength(
    "group",
    1e-3,
    "Group strength",
    "Factor of the sum of sqrt(size) * norm over the groups, at least 0, such as 1e-3; for group. The outgoing weights "
    "of one pixel, unit or channel form a group.",
)


def _norms(weights: Any) -> Any:
    """Return each group's norm; its gradient at zero is zero, not NaN."""
    import tensorflow as tf

    others = [axis for axis in range(weights.shape.rank) if axis != weights.shape.rank + INPUTS]
    squares = tf.reduce_sum(tf.square(weights), others, keepdims=True)
    return tf.where(squares > 0, tf.sqrt(tf.where(squares > 0, squares, 1.0)), 0.0)


def value(weights: Any, strengths: Mapping[str, Any], smooth_only: bool) -> Any:
    """Return the penalty of one kernel; no part of it is smooth."""
    import tensorflow as tf

    weights = tf.convert_to_tensor(weights)
    scale = strengths["group"] * math.sqrt(group_size(weights.shape, INPUTS))
    return scale * tf.reduce_sum(_norms(tf.stop_gradient(weights) if smooth_only else weights))


def proximal_step(weights: Any, rate: Any, strengths: Mapping[str, Any]) -> Any:
    """Return ``w * max(1 - rate * group * sqrt(size) / norm(w), 0)`` for each group."""
    import tensorflow as tf

    weights = tf.convert_to_tensor(weights)
    threshold = rate * strengths["group"] * math.sqrt(group_size(weights.shape, INPUTS))
    norms = _norms(weights)
    return tf.where(norms > threshold, weights * (1.0 - threshold / tf.where(norms > 0, norms, 1.0)), 0.0)


def unfit(shape: tuple[int, ...], layer: str) -> str | None:
    """Return why a weight has no groups: it needs an axis of inputs and one of outputs, the last two."""
    if len(shape) < 2:
        return "it has no groups: expected a kernel with an axis of inputs and one of outputs"
    return (
        None if LAYERS.fullmatch(layer) else f"in a layer {layer}, the axis before the last is not that of the inputs"
    )


GROUP = Kind(
    "group",
    label="group lasso",
    choice="Group lasso: removes inputs and units",
    formula=Formula(("group",), value, proximal_step, unfit=unfit),
    strengths=(STRENGTH,),
    sparse=True,
)
