"""Group lasso against its formula in NumPy, and on softmax regression against a published solver's optimum."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from components.train import train
from components.training.engine import Engine, Recipe
from components.training.network import build_model
from components.training.network_check import check_network
from components.training.params import NETWORKS
from components.training.penalties.group import GROUP, proximal_step, value
from components.training.penalty import Penalty
from ridgeline.artifacts.model import Model, kernels
from ridgeline.component import StepError

SHAPES = [(6, 4), (3, 3, 5, 2)]  # a dense kernel, a convolution kernel


def kernel(shape: tuple[int, ...]) -> np.ndarray:
    """Return weights of which the second group is zero."""
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weights[..., 1, :] = 0.0
    return weights


def groups(weights: np.ndarray) -> list[np.ndarray]:
    """Return views of the groups: all weights of one input."""
    return [weights[..., i, :] for i in range(weights.shape[-2])]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_follows_its_formula(shape: tuple[int, ...]) -> None:
    weights = kernel(shape)
    expected = 0.3 * sum(np.sqrt(group.size) * np.linalg.norm(group) for group in groups(weights))
    assert float(value(weights, {"group": 0.3}, False)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_follows_its_formula_and_is_zero_at_zero(shape: tuple[int, ...]) -> None:
    import tensorflow as tf

    weights = tf.Variable(kernel(shape))
    with tf.GradientTape() as tape:
        penalty = value(weights, {"group": 0.3}, False)
    expected = np.zeros(shape, np.float32)
    for gradient, group in zip(groups(expected), groups(weights.numpy()), strict=True):
        gradient[...] = 0.3 * np.sqrt(group.size) * group / max(np.linalg.norm(group), 1e-30)
    np.testing.assert_allclose(tape.gradient(penalty, weights), expected, rtol=1e-5)
    with tf.GradientTape() as tape:
        penalty = value(weights, {"group": 0.3}, True)
    assert tape.gradient(penalty, weights) is None  # no part is smooth


@pytest.mark.parametrize("shape", SHAPES)
def test_the_proximal_step_is_block_soft_thresholding(shape: tuple[int, ...]) -> None:
    weights = kernel(shape)
    weights[..., 2, :] *= 0.1
    rate, strength = 0.5, 0.5
    expected = weights.copy()
    for group in groups(expected):
        threshold = rate * strength * np.sqrt(group.size)
        norm = np.linalg.norm(group)
        group *= max(1 - threshold / norm, 0) if norm else 0
    received = proximal_step(weights, rate, {"group": strength}).numpy()
    np.testing.assert_allclose(received, expected, rtol=1e-5)
    np.testing.assert_array_equal(received == 0, expected == 0)
    zeros = [not group.any() for group in groups(received)]
    assert 1 < sum(zeros) < len(zeros)
    assert not np.signbit(received[received == 0]).any()  # no negative zeros


def test_a_bias_has_no_groups() -> None:
    for layer in ("Dense", "Conv2D", "SeparableConv1D", "DepthwiseConv2D", "LSTMCell"):
        assert GROUP.formula.unfit((6, 4), layer) is None
    assert "it has no groups" in str(GROUP.formula.unfit((4,), "LayerNormalization"))
    for layer in ("Conv2DTranspose", "EinsumDense", "MultiHeadAttention", "Embedding"):
        assert f"in a layer {layer}, the axis" in str(GROUP.formula.unfit((3, 3, 6, 4), layer))


def params(**values: Any) -> Any:
    return train.parse(values)


def test_a_weight_without_groups_is_refused_by_name_before_training(bars, monkeypatch):
    def build(image_shape, num_classes, regularizer, options):
        import keras

        layers = keras.layers
        scale = layers.LayerNormalization(gamma_regularizer=regularizer, name="scale")
        output = layers.Dense(num_classes, "softmax", kernel_regularizer=regularizer)
        return keras.Sequential([keras.Input(image_shape), layers.Flatten(), scale, output])

    monkeypatch.setitem(NETWORKS, "mlp", replace(NETWORKS["mlp"], build=build))
    check_network(bars, params(penalty={"kind": "l1"}))
    message = r"penalty group to .*scale/gamma of the network mlp, shape \(30,\): it has no groups.*another penalty"
    with pytest.raises(StepError, match=message):
        check_network(bars, params(penalty={"kind": "group"}))


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


# Objective and zero rows of softmax regression on the images of `bars`, by strength. CVXPY 1.7.5 with the
# solver Clarabel 0.11.1 and tolerances of 1e-10 minimized
# ``mean(log_sum_exp(z) - z[label]) + strength * sqrt(3) * sum(norm(W, axis=1))`` with ``z = x @ W + b``.
# The package group-lasso 1.5.0 (FISTA) finds the same rows and norms for the strength 0.1.
OPTIMA = {
    0.1: (0.5869562549021318, [0, 3, 5, 7, 12, 14]),
    0.15: (0.7573614595556226, [0, 2, 3, 4, 5, 7, 12, 14, 20, 26]),
}


@pytest.mark.parametrize("strength", OPTIMA)
def test_the_proximal_solver_reaches_a_published_solvers_optimum(bars, strength):
    split = bars.split("train")
    images = ((split.images.astype(np.float64) - 60.0) / 50.0).reshape(len(split), -1)
    recipe = Recipe(solver="proximal", momentum=0.9, batch_size=len(split))
    build = functools.partial(build_model, bars, params(mlp={"hidden_units": []}))
    fit = Engine(build, bars, recipe, GROUP.formula).fit(
        penalty=Penalty.at("group", strength), learning_rate=0.1, seed=1, epochs=800
    )
    weights, bias = (np.float64(weight) for weight in fit.weights)
    p = softmax(images @ weights + bias)
    norms: Any = np.linalg.norm(weights, axis=1)
    entropy = -np.log(p[np.arange(len(split)), split.labels]).mean()
    objective, zero_rows = OPTIMA[strength]
    assert entropy + strength * np.sqrt(3) * norms.sum() == pytest.approx(objective, rel=1e-5)
    assert np.flatnonzero(norms == 0).tolist() == zero_rows

    # The conditions of the optimum: Parikh and Boyd, "Proximal Algorithms", section 2.3.
    gradient: Any = images.T @ (p - np.eye(3)[split.labels]) / len(split)
    limit = strength * np.sqrt(3)
    zero: Any = norms == 0
    np.testing.assert_allclose(gradient[~zero], -limit * np.asarray(weights)[~zero] / norms[~zero, None], atol=1e-4)
    assert (np.linalg.norm(gradient[zero], axis=1) <= limit).all()


@pytest.mark.parametrize("recipe", [{}, {"solver": "proximal"}, {"solver": "proximal", "momentum": 0.9}], ids=str)
def test_every_step_of_softmax_regression_is_that_of_the_numpy_formula(bars, recipe):
    import keras

    strength, rate, split = 0.05, 0.05, bars.split("train")
    images = ((split.images.astype(np.float64) - 60.0) / 50.0).reshape(len(split), -1)
    targets = np.eye(3)[split.labels]
    build = functools.partial(build_model, bars, params(mlp={"hidden_units": []}))
    keras.utils.set_random_seed(3)
    weights, bias = (np.float64(weight) for weight in build().get_weights())
    velocity, velocity_of_bias, momentum = np.zeros_like(weights), np.zeros_like(bias), recipe.get("momentum", 0.0)
    threshold = strength * np.sqrt(3)
    losses = []
    for _ in range(30):
        p = softmax(images @ weights + bias)
        norms = np.linalg.norm(weights, axis=1, keepdims=True)
        losses.append(-np.mean(np.sum(targets * np.log(p), axis=1)) + threshold * norms.sum())
        gradient = images.T @ (p - targets) / len(split)
        if "solver" not in recipe:
            gradient += threshold * weights / norms
        moved = weights - rate * gradient + momentum * velocity
        if "solver" in recipe:
            moved *= np.maximum(1 - rate * threshold / np.linalg.norm(moved, axis=1, keepdims=True), 0)
        moved_bias = bias - rate * (p - targets).mean(axis=0) + momentum * velocity_of_bias
        velocity, velocity_of_bias = moved - weights, moved_bias - bias
        weights, bias = moved, moved_bias
    engine = Engine(build, bars, Recipe(batch_size=len(split), **recipe), GROUP.formula)
    fit = engine.fit(penalty=Penalty.at("group", strength), learning_rate=rate, seed=3, epochs=30)
    np.testing.assert_allclose(fit.weights[0], weights, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(fit.weights[1], bias, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(fit.history["loss"], losses, rtol=1e-4)
    if recipe:
        np.testing.assert_array_equal(fit.weights[0] == 0, weights == 0)


@pytest.mark.parametrize(("hidden_units", "strength"), [([8], 0.01), ([], 0.12)])
def test_whole_pixels_and_units_are_eliminated(bars, tmp_path, hidden_units, strength):
    values = {"mlp": {"hidden_units": hidden_units}, "epochs": 200, "learning_rate": 0.1, "solver": "proximal"}
    values |= {"momentum": 0.9, "batch_size": 640, "penalty": {"kind": "group", "group": strength}}
    facts = train(examples=bars, params=train.parse(values), output=tmp_path).facts
    if hidden_units:
        assert 0 < facts.num_eliminated_units < 8
    else:
        assert 0 < facts.num_eliminated_pixels < 30
        assert facts.num_eliminated_pixels == facts.sparsity[0].num_zeros / 3
    assert facts.metrics["val_accuracy"] > 0.95


def test_all_weights_of_an_input_channel_form_a_group(bars, tmp_path):
    values = {"network": "cnn", "cnn": {"filters": [4, 3]}, "epochs": 3, "learning_rate": 0.1, "solver": "proximal"}
    params = train.parse(values | {"penalty": {"kind": "group", "group": 0.1}})
    model = Model.load(train(examples=bars, params=params, output=tmp_path).path)
    found = [group for kernel in kernels(model.load_keras()).values() for group in groups(kernel)]
    removed = [group.size for group in found if not group.any()]
    assert removed
    assert sum(layer.num_zeros for layer in model.facts.sparsity) == sum(removed)
