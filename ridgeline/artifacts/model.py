"""`Model`: a trained Keras classifier."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ridgeline.artifacts.base import Artifact, Facts
from ridgeline.artifacts.dataset import served_name
from ridgeline.artifacts.examples import Normalization

if TYPE_CHECKING:
    import keras


class LayerSparsity(Facts):
    """How many of one kernel's weights are exactly zero.

    Attributes:
        name: The layer's name.
        num_weights: Number of weights in its kernel.
        num_zeros: Number of those that are exactly 0.0.
    """

    name: str
    num_weights: int
    num_zeros: int


class ModelFacts(Facts):
    """What is known of a trained model.

    Attributes:
        dataset: tfds name and version of the dataset that it was trained on.
        image_shape: ``(h, w)`` or ``(h, w, c)`` of its raw uint8 input.
        class_names: The label names in the order of its outputs.
        normalization: How the graph normalizes pixels.
        params: The training parameters by name.
        num_parameters: Number of trainable parameters.
        metrics: The metrics of the epoch whose weights were kept, by Keras's names (``loss``, ``val_accuracy``, …).
        sparsity: For each kernel, from input to output, the share of exact zeros.
        num_eliminated_pixels: Number of input pixels whose outgoing weights are all exactly zero.
        num_eliminated_units: Number of hidden units whose incoming or outgoing weights are all exactly zero; None if
            it was not counted.
        synthetic: Whether it was trained on images that the project drew itself.
        started_from: Digest of the model whose weights it started from; None for initial weights drawn at random.
    """

    dataset: str
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    normalization: Normalization
    params: dict[str, Any]
    num_parameters: int
    metrics: dict[str, float]
    sparsity: tuple[LayerSparsity, ...]
    num_eliminated_pixels: int
    num_eliminated_units: int | None = None
    synthetic: bool
    started_from: str | None = None

    @property
    def model_name(self) -> str:
        """The name that the registry serves it by: the dataset's, for example ``fashion_mnist``."""
        return served_name(self.dataset)


class Model(Artifact[ModelFacts]):
    """A Keras model that takes raw uint8 images and yields class probabilities.

    On disk::

        architecture.json     Keras's own description of the layers (`keras.Model.to_json`)
        model.weights.h5      the weights (`keras.Model.save_weights`), without optimizer state
        history.json          metrics by epoch: {"loss": [...], "val_accuracy": [...], ...}
        summary.txt           `keras.Model.summary`
    """

    facts_type = ModelFacts

    def history(self) -> dict[str, list[float]]:
        """Return the metrics of each epoch by Keras's names."""
        history: dict[str, list[float]] = json.loads((self.path / "history.json").read_text(encoding="utf-8"))
        return history

    def load_keras(self) -> keras.Model:
        """Return the Keras model: uint8 ``[n, *image_shape]`` to float32 ``[n, classes]``.

        Keras's safe mode applies: an architecture with code in it is refused.
        """
        import keras

        model = keras.models.model_from_json((self.path / "architecture.json").read_text(encoding="utf-8"))
        model.load_weights(self.path / "model.weights.h5")
        return model


def kernels(model: keras.Model) -> dict[str, np.ndarray]:
    """Return a network's kernels by layer, from input to output, float32 ``[inputs, units]``."""
    return {w.path.split("/")[-2]: np.asarray(w) for w in model.weights if w.name == "kernel"}


def eliminated_pixels(model: keras.Model) -> np.ndarray:
    """Return which input pixels are eliminated: bool ``[h, w]``, true if all outgoing weights are zero.

    Args:
        model: A network whose first kernel has one row for each value of an image ``[h, w]`` or ``[h, w, c]``.
    """
    height, width = model.input_shape[1:3]
    first = next(iter(kernels(model).values()))
    eliminated: np.ndarray = (first == 0.0).reshape(height, width, -1).all(axis=2)
    return eliminated


def eliminated_units(kernels: Sequence[np.ndarray]) -> int | None:
    """Return how many hidden units are eliminated: their incoming or their outgoing weights are all zero.

    Args:
        kernels: The kernels from input to output.

    Returns:
        The number; None if the kernels are not those of dense layers in a row, ``[inputs, units]``.

    Example:
        >>> eliminated_units([np.array([[1.0, 0.0, 2.0]]), np.array([[0.0], [1.0], [3.0]])])
        2
    """
    pairs = list(itertools.pairwise(kernels))
    if any(kernel.ndim != 2 for kernel in kernels) or any(a.shape[1] != b.shape[0] for a, b in pairs):
        return None
    return sum(int(np.count_nonzero(~(a.any(axis=0) & b.any(axis=1)))) for a, b in pairs)
