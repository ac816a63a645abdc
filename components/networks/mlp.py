"""A multilayer perceptron: dense layers on all pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ridgeline.component import Params

if TYPE_CHECKING:
    import keras


class Options(Params):
    """The size of the network."""

    # Found by searches on the validation split of Fashion-MNIST, see docs/regularization.md.
    tuned: ClassVar[Mapping[str, Any]] = {
        "mlp": {"hidden_units": (256, 128)},
        "penalty": {"kind": "none"},
        "optimizer": "adam",
        "learning_rate": 0.001,
        "batch_size": 128,
        "epochs": 120,
        "label_smoothing": 0.1,
        "shift": 1,
        "shift_share": 0.5,
        "flip": True,
        "average": 0.9995,
    }

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
