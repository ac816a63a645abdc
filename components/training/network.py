"""The network: a multilayer perceptron, with its normalization and its penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.training.params import Params
from ridgeline.artifacts.examples import Examples

if TYPE_CHECKING:
    import keras


def build_model(examples: Examples, params: Params, regularizer: keras.Regularizer | None = None) -> keras.Model:
    """Return the untrained network: raw uint8 images ``[n, *image_shape]`` to probabilities ``[n, classes]``.

    Args:
        examples: Gives the image shape, the classes and the normalization, which is the first layer.
        params: The network and its penalty.
        regularizer: Regularizer of every kernel; Keras's own with the penalty's strengths if None.
    """
    import keras

    if regularizer is None:
        regularizer = params.penalty.keras_regularizer()
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
