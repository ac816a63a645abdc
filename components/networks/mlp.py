"""A multilayer perceptron: dense layers on all pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ridgeline.component import Params

if TYPE_CHECKING:
    import keras


class Options(Params):
    """The size of the network."""

    hidden_units: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field(
        (100, 100),
        max_length=10,
        title="Hidden units",
        description="Units of each hidden layer (relu, he_normal), from input to output; empty for softmax regression.",
    )


def mlp(
    image_shape: tuple[int, ...], num_classes: int, regularizer: keras.Regularizer | None, options: Options
) -> keras.Model:
    """Multilayer perceptron.

    Args:
        image_shape: ``(h, w)`` or ``(h, w, c)``.
        num_classes: Number of classes.
        regularizer: Regularizer of every kernel.
        options: Its size.

    Returns:
        The network, from normalized float images to probabilities.
    """
    import keras

    def dense(units: int, name: str, activation: str, initializer: str) -> keras.layers.Dense:
        return keras.layers.Dense(
            units, activation, kernel_initializer=initializer, kernel_regularizer=regularizer, name=name
        )

    return keras.Sequential(
        [
            keras.Input(image_shape),
            keras.layers.Flatten(name="flatten"),
            *(dense(n, f"hidden_{i}", "relu", "he_normal") for i, n in enumerate(options.hidden_units, start=1)),
            dense(num_classes, "output", "softmax", "glorot_uniform"),
        ]
    )
