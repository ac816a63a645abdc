"""Compaction: removes pixels, units and channels that no prediction depends on.

A sequence of layers is read as stages: a dense layer or a convolution, and the layers up to the next one, which treat
each of its units alike. Nothing is removed behind the first layer that is not known to do so.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ridgeline.artifacts.pushed_model import ModelSize

if TYPE_CHECKING:
    import keras

ELEMENTWISE = (
    "linear", "relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh", "sigmoid", "hard_sigmoid",
    "softplus", "softsign", "exponential", "mish",
)  # fmt: skip
MIN_SAVED = 54  # multiply-adds; picking pixels takes as long as this number for each pixel of the image


@dataclass
class Stage:
    """A dense layer or a convolution, and what follows it.

    Attributes:
        layer: The layer.
        following: The layers up to the next stage.
        kernel: Its kernel ``[positions, inputs, units]``: a convolution's taps, a flattened image's positions.
        bias: Its bias; zeros if it has none.
        alive: Which of its units are kept.
    """

    layer: Any
    following: list[Any]
    kernel: np.ndarray
    bias: np.ndarray
    alive: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.alive = np.ones(self.kernel.shape[-1], bool)


def size_of(model: keras.Model) -> ModelSize:
    """Return what a model has to store and to compute.

    Args:
        model: The model.
    """
    variables = [np.asarray(weight) for weight in model.weights]
    weighted = [layer for layer in model.layers if any(weight.name.endswith("kernel") for weight in layer.weights)]
    known = all(_is_stage(layer) for layer in weighted)
    products = [math.prod(layer.output.shape[1:-1]) * math.prod(layer.kernel.shape) for layer in weighted if known]
    return ModelSize(
        num_weights=sum(variable.size for variable in variables),
        num_multiply_adds=sum(products) if known else None,
        num_bytes=sum(variable.nbytes for variable in variables),
    )


def compact(model: keras.Model) -> keras.Model | None:
    """Return a smaller model that computes the same, up to rounding.

    Left out are pixels and units whose outgoing weights are all zero, and units whose incoming weights are all zero:
    such a unit is constant, and the constant is added to the next bias. Each stage keeps at least one unit.

    Args:
        model: The model; it is not changed.

    Returns:
        The smaller model; None if there is nothing to remove.
    """
    import keras

    if not isinstance(model, keras.Sequential) or any(weight.dtype != "float32" for weight in model.weights):
        return None
    layers = list(model.layers)
    head = list(itertools.takewhile(lambda layer: not _is_stage(layer), layers))
    stages, tail = _stages(layers[len(head) :])
    if not stages:
        return None
    while any([_remove_units(stage, following) for stage, following in itertools.pairwise(stages)]):
        pass
    pixels = _used_pixels(model, head, stages[0])
    if pixels.all() and all(stage.alive.all() for stage in stages):
        return None
    return _build(model, head, stages, tail, pixels)


def _is_stage(layer: Any) -> bool:
    import keras

    is_convolution = type(layer) is keras.layers.Conv2D and layer.groups == 1 and layer.data_format == "channels_last"
    return is_convolution or type(layer) is keras.layers.Dense


def _is_elementwise(activation: Any) -> bool:
    import keras

    name = getattr(activation, "__name__", "")
    return name in ELEMENTWISE and activation is getattr(keras.activations, name)


def _treats_units_alike(layer: Any) -> bool:
    import keras

    known = keras.layers
    if type(layer) is known.Activation:
        return _is_elementwise(layer.activation)
    if type(layer) is known.BatchNormalization:
        return layer.axis in (-1, len(layer.input.shape) - 1)
    by_unit = (
        known.Dropout, known.ReLU, known.Flatten,
        known.MaxPooling2D, known.AveragePooling2D, known.GlobalMaxPooling2D, known.GlobalAveragePooling2D,
    )  # fmt: skip
    return type(layer) in by_unit and getattr(layer, "data_format", "channels_last") == "channels_last"


def _stages(layers: list[Any]) -> tuple[list[Stage], list[Any]]:
    """Return the stages, and the layers from the first one that is not known, which stay as they are."""
    stages: list[Stage] = []
    units = 0
    while layers and _is_stage(layers[0]):
        layer, *layers = layers
        weights = [np.array(weight) for weight in layer.get_weights()]  # copies
        units, inputs = weights[0].shape[-1], units or weights[0].shape[-2]
        kernel = weights[0].reshape(-1, inputs, units)
        stages.append(Stage(layer, [], kernel, weights[1] if layer.use_bias else np.zeros(units, np.float32)))
        if not _is_elementwise(layer.activation):
            break
        following = list(itertools.takewhile(_treats_units_alike, layers))
        if len(following) == len(layers) or not _is_stage(layers[len(following)]):
            break
        stages[-1].following, layers = following, layers[len(following) :]
    return stages, layers


def _remove_units(stage: Stage, following: Stage) -> bool:
    """Zero the weights of units that are removed, and return whether there are any."""
    unused = stage.alive & ~following.kernel.any(axis=(0, 2))
    constant = stage.alive & ~stage.kernel.any(axis=(0, 1))
    values = np.zeros(len(constant), np.float32)
    if constant.any():
        values, equal = _constants(stage)
        constant &= equal
        if getattr(following.layer, "padding", "") == "same":
            constant &= values == 0.0  # the padding is zero, so another constant is not constant at the borders
    removed = unused | constant
    if np.array_equal(removed, stage.alive):
        removed[np.flatnonzero(removed)[:1]] = False
    if not removed.any():
        return False
    added = np.einsum("i,pio->o", np.where(removed & constant, values, 0.0), following.kernel, dtype=np.float64)
    following.bias = (following.bias + added).astype(np.float32)
    following.kernel[:, removed] = 0.0
    stage.kernel[:, :, removed] = 0.0
    stage.alive &= ~removed
    return True


def _constants(stage: Stage) -> tuple[np.ndarray, np.ndarray]:
    """Return what each unit passes on if its incoming weights are zero, and whether that is the same everywhere."""
    values = np.broadcast_to(stage.bias, (1, *stage.layer.output.shape[1:]))
    values = stage.layer.activation(values)
    for layer in stage.following:
        values = layer(values, training=False)
    values = np.asarray(values).reshape(-1, len(stage.bias))
    return values[0], (values == values[0]).all(axis=0)


def _used_pixels(model: keras.Model, head: list[Any], first: Stage) -> np.ndarray:
    """Return which values of the image are kept: all if they have no weights, or if removing some saves no time."""
    import keras

    known = keras.layers
    each_value = all(
        type(layer) in (known.Rescaling, known.Flatten, known.Reshape, known.Dropout)
        and getattr(layer, "data_format", "channels_last") == "channels_last"
        for layer in head
    )
    num_values = math.prod(model.input_shape[1:])
    used = np.array(first.kernel.any(axis=(0, 2)))
    is_flat = first.layer.input.shape[1:] == (num_values,)  # a convolution's input is not
    if not is_flat or not each_value or any(map(_varies, head)):
        return np.ones(num_values, bool)
    if not used.any():
        used[0] = True
    saved = np.count_nonzero(~used) * np.count_nonzero(first.alive)
    return used if saved >= MIN_SAVED * num_values else np.ones(num_values, bool)


def _varies(layer: Any) -> bool:
    """Return whether a rescaling has numbers of its own for each channel."""
    return np.ndim(getattr(layer, "scale", 0.0)) > 0 or np.ndim(getattr(layer, "offset", 0.0)) > 0


def _build(model: keras.Model, head: list[Any], stages: list[Stage], tail: list[Any], pixels: np.ndarray) -> Any:
    """Return the model without what is removed. Layers that keep all their weights are shared with the old one."""
    import keras

    images = keras.Input(model.input_shape[1:], dtype=model.inputs[0].dtype, name="images")
    values = images
    if not pixels.all():
        ops = keras.ops
        values = ops.reshape(values, (-1, len(pixels)))
        # Whole rows of the transposed images are copied, which is faster than to pick numbers from each image.
        values = ops.transpose(ops.take(ops.transpose(values), np.flatnonzero(pixels).astype(np.int32), axis=0))
        head = [layer for layer in head if type(layer) is not keras.layers.Reshape]
    for layer in head:
        values = layer(values)
    alive = pixels if not pixels.all() else np.ones(stages[0].kernel.shape[1], bool)
    for stage in stages:
        kernel = stage.kernel[:, alive][:, :, stage.alive]
        values = _smaller(stage, kernel)(values)
        alive = stage.alive
        for layer in stage.following:
            values = _fewer_statistics(layer, alive)(values) if layer.weights else layer(values)
    for layer in tail:
        values = layer(values)
    return keras.Model(images, values, name=model.name)


def _smaller(stage: Stage, kernel: np.ndarray) -> Any:
    """Return a stage's layer with a smaller kernel."""
    import keras

    layer, units = stage.layer, kernel.shape[-1]
    bias = stage.bias[stage.alive]
    changed = {"use_bias": bool(layer.use_bias or bias.any())}
    changed["filters" if isinstance(layer, keras.layers.Conv2D) else "units"] = units
    new = type(layer).from_config(layer.get_config() | changed)
    spatial = tuple(layer.kernel.shape[:-2])
    inputs = kernel.shape[1] if spatial else kernel.shape[0] * kernel.shape[1]
    new.build((*layer.input.shape[:-1], inputs))
    new.set_weights([kernel.reshape(*spatial, inputs, units), *([bias] if new.use_bias else [])])
    return new


def _fewer_statistics(layer: Any, alive: np.ndarray) -> Any:
    """Return a batch normalization of the units that are kept."""
    weights = [weight.reshape(-1, len(alive))[:, alive].reshape(-1) for weight in layer.get_weights()]
    new = type(layer).from_config(layer.get_config())
    new.build((*layer.input.shape[:-1], len(weights[0])))
    new.set_weights(weights)
    return new
