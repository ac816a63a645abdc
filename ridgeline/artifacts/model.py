"""`Model`: a trained Keras classifier."""

from __future__ import annotations

import itertools
import json
import math
import reprlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ridgeline.artifacts.base import Artifact, Facts
from ridgeline.artifacts.dataset import served_name
from ridgeline.artifacts.examples import ExamplesFacts, Normalization

if TYPE_CHECKING:
    import keras


class LayerSparsity(Facts):
    """How many of one kernel's weights are exactly zero.

    Attributes:
        name: The layer's path, and the weight's name if it is no plain kernel; see `named_weights`.
        num_weights: Number of weights in it.
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
        num_eliminated_pixels: Number of input pixels whose outgoing weights are all exactly zero; None for a network
            in which pixels have no weights of their own, see `eliminated_pixels`.
        num_eliminated_units: Number of hidden units or channels whose incoming or outgoing weights are all exactly
            zero; None where they can't be told, see `eliminated_units`.
        unsaved_penalty: The penalty of its kernels if Keras has no regularizer for it: the saved model then has none.
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
    num_eliminated_pixels: int | None
    num_eliminated_units: int | None = None
    unsaved_penalty: float = 0.0
    synthetic: bool
    started_from: str | None = None

    @property
    def model_name(self) -> str:
        """The name that the registry serves it by: the dataset's, for example ``fashion_mnist``."""
        return served_name(self.dataset)

    def misfit(self, examples: ExamplesFacts) -> str | None:
        """Return the first property of the examples that the model does not fit, for a message; None if it fits.

        Args:
            examples: The examples.

        Returns:
            For example ``image_shape (28, 28); received (32, 32)``.
        """
        for name in ("image_shape", "class_names"):
            expected, received = getattr(examples, name), getattr(self, name)
            if received != expected:
                return f"{name} {reprlib.repr(expected)}; received {reprlib.repr(received)}"
        return None


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


def all_layers(model: keras.Layer) -> dict[str, Any]:
    """Return the layers of a network by path, such as ``block/hidden``, each after the one that it is in.

    All layers within layers are found: those of nested networks, in wrappers, and the cells of recurrent layers.

    Args:
        model: The network.
    """
    found: dict[str, Any] = {}
    for layer in model._layers:  # Keras has no public attribute that all kinds of layers share
        path = layer.name
        while path in found:  # cells of a stack may have the same name
            path += "_"
        found[path] = layer
        found |= {f"{path}/{inner}": within for inner, within in all_layers(layer).items()}
    return found


def named_weights(model: keras.Model) -> dict[str, Any]:
    """Return a network's weight variables by name, from input to output.

    The name of a layer's kernel is the layer's path, such as ``hidden_1`` or ``block/hidden``; that of another weight
    begins with it: ``hidden_1/bias``, ``separable/pointwise_kernel``, ``attention/query``.

    Args:
        model: The network.
    """
    names = {
        id(weight): f"{path}/{weight.name}".removesuffix("/kernel")
        for path, layer in all_layers(model).items()
        for weight in layer.weights  # also of the layers in it, which come later and so name them
    }
    return {names[id(weight)]: weight for weight in model.weights}


def kernels(model: keras.Model) -> dict[str, np.ndarray]:
    """Return a network's kernels by name, from input to output.

    Args:
        model: The network.

    Returns:
        float32 ``[inputs, units]`` of a dense layer, ``[h, w, inputs, filters]`` of a convolution.
    """
    found = named_weights(model).items()
    return {name: np.asarray(weight) for name, weight in found if weight.name.endswith("kernel")}


def eliminated_pixels(model: keras.Model) -> np.ndarray | None:
    """Return which input pixels are eliminated: bool ``[h, w]``, true if all outgoing weights are zero.

    Args:
        model: A model whose input is images ``[h, w]`` or ``[h, w, c]``.

    Returns:
        None where pixels have no weights of their own: if the model is no sequence of layers that begins with a dense
        layer on all values of the image.
    """
    import keras

    of_values = (keras.layers.Rescaling, keras.layers.Flatten, keras.layers.Reshape, keras.layers.Dropout)
    layers = itertools.dropwhile(lambda layer: isinstance(layer, of_values), model.layers)
    first, shape = next(layers, None), model.input_shape[1:]
    if not (isinstance(model, keras.Sequential) and isinstance(first, keras.layers.Dense)):
        return None
    kernel = np.asarray(first.kernel)
    if len(kernel) != math.prod(shape):
        return None
    eliminated: np.ndarray = (kernel == 0.0).reshape(*shape[:2], -1).all(axis=2)
    return eliminated


def eliminated_units(model: keras.Model) -> int | None:
    """Return how many hidden units or channels are eliminated: their incoming or their outgoing weights are all zero.

    Args:
        model: The network.

    Returns:
        None if the network is no sequence of layers, or has kernels other than those of dense layers and convolutions.
    """
    import keras

    layers = keras.layers
    weighted = [layer for layer in model.layers if any(weight.name.endswith("kernel") for weight in layer.weights)]
    known = all(
        type(layer) in (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D) and getattr(layer, "groups", 1) == 1
        for layer in weighted
    )
    hidden = model.layers[model.layers.index(weighted[0]) :] if weighted else []
    reordered = any(isinstance(layer, layers.Reshape | layers.Permute) for layer in hidden)
    if not isinstance(model, keras.Sequential) or not known or reordered:
        return None
    count = 0
    for layer, following in itertools.pairwise(np.asarray(layer.kernel) for layer in weighted):
        units = layer.shape[-1]
        incoming = layer.reshape(-1, units).any(axis=0)
        outgoing = np.moveaxis(following, -2, 0).reshape(following.shape[-2], -1).any(axis=1)
        # Flattened images have several values of each channel; channels vary fastest.
        count += int(np.count_nonzero(~(incoming & outgoing.reshape(-1, units).any(axis=0))))
    return count
