"""Checks of a network before it is trained: what the engine, the reports, the export and the server count on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from components.training.installed_networks import describe
from components.training.network import build_model, build_network
from components.training.params import NETWORKS, Params
from components.training.penalty import regularizer
from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import all_layers
from ridgeline.component import StepError

if TYPE_CHECKING:
    import keras

PROBE_IMAGES = 4
TOLERANCE = 1e-3  # of the sum of an image's probabilities


def check_network(examples: Examples, params: Params) -> None:
    """Build the chosen network once, and try it on a few training images.

    Args:
        examples: What is to be trained on.
        params: The network, its options and its penalty.

    Raises:
        StepError: If the network can't be built, trained, saved and loaded in another process, doesn't return
            probabilities, or has a weight that can't have the penalty, or if the penalty can't be computed.
    """
    with ThreadPoolExecutor(1) as thread:  # see `build_model`
        thread.submit(_check, examples, params).result()


def _check(examples: Examples, params: Params) -> None:
    import keras

    network = NETWORKS[params.network]
    name, shape, classes = f"the network {params.network}", examples.facts.image_shape, len(examples.facts.class_names)
    advice = f"Correct its function in {network.module}, or choose another train.network."
    penalty = regularizer(params.penalty.formula, smooth_only=params.solver == "proximal")
    try:
        model = build_network(examples, params, penalty)  # as the engine trains it
    except Exception as error:
        raise StepError(
            f"Cannot build {name} for images of the shape {shape} and {classes} classes: "
            f"{describe(error, network.module)} Correct its function in {network.module}, change its options, or "
            "choose another train.network."
        ) from error
    if problem := _problem(model, shape, classes, penalty):
        expected, received = problem
        raise StepError(f"Expected {name} to {expected}; received {received}. {advice}")
    owners = {id(weight): type(layer).__name__ for layer in all_layers(model).values() for weight in layer.weights}
    for weight in (weight for weight in model.trainable_weights if weight.regularizer is penalty):
        if reason := params.penalty.formula.unfit(tuple(weight.shape), owners[id(weight)]):
            raise StepError(
                f"Cannot apply the penalty {params.penalty.kind} to {weight.path} of {name}, shape "
                f"{tuple(weight.shape)}: {reason}. Choose another penalty, or give that weight no regularizer."
            )
        _try_penalty(params, weight)
    try:
        text = build_model(examples, params).to_json()  # as it is saved
        if foreign := sorted(set(_not_of_keras(json.loads(text)))):
            raise StepError(
                f"Expected {name} to consist of Keras's own layers and functions, so that it can be loaded where its "
                f"code is not installed; received {', '.join(foreign)}. {advice}"
            )
        loaded = keras.models.model_from_json(text)
        probabilities = np.asarray(loaded(examples.split("train").rows(0, PROBE_IMAGES)[0], training=False))
    except StepError:
        raise
    except Exception as error:
        raise StepError(
            f"Cannot save {name}, load it and run it on {PROBE_IMAGES} training images: "
            f"{describe(error, network.module)} {advice}"
        ) from error
    sums = probabilities.sum(axis=1)
    if not (probabilities.min() >= 0 and probabilities.max() <= 1 and np.abs(sums - 1).max() <= TOLERANCE):
        raise StepError(
            f"Expected {name} to return probabilities, each in [0, 1] and 1 in sum; received values from "
            f"{probabilities.min():.4g} to {probabilities.max():.4g} with sums from {sums.min():.4g} to "
            f"{sums.max():.4g}. End it with softmax, or choose another train.network."
        )


def _problem(model: Any, shape: tuple[int, ...], classes: int, penalty: keras.Regularizer) -> tuple[str, Any] | None:
    """Return what a network should do and what it does instead; None if it is as it should be."""
    if type(model).__module__.partition(".")[0] != "keras" or not hasattr(model, "layers"):
        return "be a keras.Sequential or a keras.Model of inputs and outputs", f"{type(model)}"
    if not (model.built and model.inputs):
        return "begin with keras.Input(image_shape)", "a model without an input"
    if (count := len(model.inputs)) != 1:
        return "have 1 input", f"one with {count}"
    if (count := len(model.outputs)) != 1:
        return "have 1 output", f"one with {count}"
    image, output = model.inputs[0], model.outputs[0]
    if image.dtype != "float32":
        return "take float32 images, since pixels are normalized before it", f"one that takes {image.dtype}"
    if tuple(image.shape[1:]) != shape:
        return f"take images of the shape {shape}", f"one that takes {tuple(image.shape[1:])}"
    if output.dtype != "float32" or tuple(output.shape) != (None, classes):
        return f"return float32 (None, {classes})", f"one that returns {output.dtype} {tuple(output.shape)}"
    if not model.trainable_weights:
        return "have weights that can be trained", "one without"
    for weight in model.weights:
        if weight.dtype != "float32":
            return "have float32 weights", f"{weight.path} of the type {weight.dtype}"
    if not any(weight.regularizer is penalty for weight in model.trainable_weights):
        return "give its argument regularizer to at least 1 layer", "one on which the penalty would have no effect"
    return None


def _try_penalty(params: Params, weight: keras.Variable) -> None:
    """Compute the penalty and its proximal operator of one weight, as the engine does."""
    import tensorflow as tf

    formula, kernel = params.penalty.formula, tf.constant(np.asarray(weight))
    strengths = {name: tf.constant(factor, tf.float32) for name, factor in params.penalty.factors.items()}
    calls: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
        "value": (lambda: formula.value(kernel, strengths, params.solver == "proximal"), ())
    }
    if (step := formula.proximal_step) is not None:
        calls["proximal_step"] = (lambda: step(kernel, tf.constant(0.01), strengths), tuple(weight.shape))
    for name, (call, shape) in calls.items():
        expected = f"float32 {shape}"
        try:
            result = tf.convert_to_tensor(call())
            received = f"{result.dtype.name} {tuple(result.shape)}"
        except Exception as error:
            received = f"{type(error).__name__}: {error}"
        if received != expected:
            raise StepError(
                f"Expected {name} of the penalty {params.penalty.kind} to return {expected} for {weight.path}, from "
                f"its strengths {', '.join(formula.strengths) or 'none'}; received {received}. Correct "
                f"{formula.value.__module__}, or choose another train.penalty.kind."
            )


def _not_of_keras(value: Any) -> Iterator[str]:
    """Yield the classes and functions in Keras's description of a model that are not Keras's own."""
    if isinstance(value, dict):
        module, kind, config = value.get("module"), value.get("class_name"), value.get("config")
        if kind in ("__lambda__", "function"):
            yield f"the function {config}" if kind == "function" else "a Lambda layer"
        elif kind and module and module.partition(".")[0] != "keras":
            name = config.get("name") if isinstance(config, dict) else None
            yield f"{module}.{kind}" + (f" of the layer {name}" if name else "")
        value = list(value.values())
    if isinstance(value, list):
        for member in value:
            yield from _not_of_keras(member)
