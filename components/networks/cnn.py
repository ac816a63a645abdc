"""A small convolutional network with batch normalization and dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ridgeline.component import Params

if TYPE_CHECKING:
    import keras


class Options(Params):
    """The size of the network, and its dropout."""

    # Found by searches on the validation split of Fashion-MNIST, see docs/regularization.md.
    tuned: ClassVar[Mapping[str, Any]] = {
        "cnn": {"filters": (16, 32, 64, 128)},
        "penalty": {"kind": "none"},
        "optimizer": "adam",
        "learning_rate": 0.003,
        "schedule": "cosine",
        "batch_size": 128,
        "epochs": 30,
        "label_smoothing": 0.1,
        "shift": 1,
        "flip": True,
        "weight_decay": 0.05,
    }

    filters: tuple[Annotated[int, Field(ge=1, le=4_096)], ...] = Field(
        (16, 32, 64),
        min_length=1,
        max_length=8,
        title="Filters",
        description="Number of 3 × 3 filters of each convolution, from input to output. Each block halves the image.",
    )
    dropout: float = Field(
        0.3,
        ge=0.0,
        lt=1.0,
        title="Dropout",
        description="Share of the inputs of the last layer that each training step leaves out, 0 to below 1.",
    )


def cnn(
    image_shape: tuple[int, ...], num_classes: int, regularizer: keras.Regularizer | None, options: Options
) -> keras.Model:
    """Small convolutional network.

    A block is a convolution, max-pooling, batch normalization and relu. Pooling stands before the normalization, which
    then has a quarter of the values to work on; the result is the same where the normalization's scale is positive.

    Args:
        image_shape: ``(h, w)`` or ``(h, w, c)``.
        num_classes: Number of classes.
        regularizer: Regularizer of every kernel.
        options: Its size, and its dropout.

    Returns:
        The network, from normalized float images to probabilities.
    """
    import keras

    layers = keras.layers
    blocks = [
        layer
        for i, filters in enumerate(options.filters, start=1)
        for layer in (
            layers.Conv2D(
                filters,
                kernel_size=3,
                padding="same",
                use_bias=False,  # the normalization has one
                kernel_initializer="he_normal",
                kernel_regularizer=regularizer,
                name=f"convolution_{i}",
            ),
            layers.MaxPooling2D(2, padding="same", name=f"pooling_{i}"),
            layers.BatchNormalization(name=f"normalization_{i}"),
            layers.ReLU(name=f"relu_{i}"),
        )
    ]
    channels = [] if len(image_shape) == 3 else [layers.Reshape((*image_shape, 1), name="channel")]
    return keras.Sequential(
        [
            keras.Input(image_shape),
            *channels,
            *blocks,
            layers.Flatten(name="flatten"),
            layers.Dropout(options.dropout, name="dropout"),
            layers.Dense(num_classes, "softmax", kernel_regularizer=regularizer, name="output"),
        ]
    )
