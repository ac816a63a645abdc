"""The model that is trained and served: normalization and a network."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from components.training.params import NETWORKS, Params
from ridgeline.artifacts.examples import Examples

if TYPE_CHECKING:
    import keras


def build_model(examples: Examples, params: Params, regularizer: keras.Regularizer | None = None) -> keras.Model:
    """Return the untrained model: raw uint8 images ``[n, *image_shape]`` to probabilities ``[n, classes]``.

    Args:
        examples: Gives the image shape, the classes and the normalization, which is the first layer.
        params: The network, its options and its penalty.
        regularizer: Regularizer of the penalized weights; Keras's own with the penalty's strengths if None.
    """
    # Keras numbers layers without a name by a counter of the thread: in a new one, names are the same each time.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_build, examples, params, regularizer or params.penalty.keras_regularizer()).result()


def _build(examples: Examples, params: Params, regularizer: keras.Regularizer | None) -> keras.Model:
    return _with_normalization(examples, build_network(examples, params, regularizer))


def build_network(examples: Examples, params: Params, regularizer: keras.Regularizer | None) -> keras.Model:
    """Return the network alone, as its function returns it.

    Args:
        examples: Gives the image shape and the classes.
        params: The network and its options.
        regularizer: Regularizer of the penalized weights.
    """
    import keras

    facts, network = examples.facts, NETWORKS[params.network]
    with keras.saving.custom_object_scope({type(regularizer).__name__: regularizer}):  # see `penalty.regularizer`
        return network.build(facts.image_shape, len(facts.class_names), regularizer, params.options)


def _with_normalization(examples: Examples, network: keras.Model) -> keras.Model:
    """Return a flat model of the normalization and a network's layers.

    Args:
        examples: Gives the image shape and the normalization.
        network: A network from normalized images to probabilities.
    """
    import keras

    norm = examples.facts.normalization
    images = keras.Input(examples.facts.image_shape, dtype="uint8", name="images")
    normalization = keras.layers.Rescaling(1.0 / norm.deviation, -norm.mean / norm.deviation, name="normalization")
    if isinstance(network, keras.Sequential):
        return keras.Sequential([images, normalization, *network.layers], name="classifier")
    layers = keras.Function(network.inputs[0], network.outputs[0])
    return keras.Model(images, layers.call(normalization(images)), name="classifier")
