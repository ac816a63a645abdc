"""Small models with planted zeros: what is removed, and that predictions stay."""

import shutil
from typing import Any

import keras
import numpy as np
import pytest

from components.export import export, save
from components.exporting.compaction import compact, size_of
from components.networks.cnn import Options, cnn
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.serving_check import TOLERANCE

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (200, 6, 5), np.uint8)
layers = keras.layers


def sequence(*following, shape=(6, 5)) -> Any:
    """Return a sequence of layers with random weights, so that biases and statistics are not zero, either."""
    head = [keras.Input(shape, dtype="uint8", name="images"), layers.Rescaling(1 / 255, -0.2)]
    model = keras.Sequential([*head, *following])
    for weight in model.weights:
        drawn = RNG.standard_normal(weight.shape) * 0.5
        weight.assign(np.abs(drawn) + 0.1 if weight.name in ("gamma", "moving_variance") else drawn)
    return model


def dense(*units, width=10, activation="relu"):
    hidden = [layers.Dense(n, activation, name=f"hidden_{i}") for i, n in enumerate(units, start=1)]
    return sequence(layers.Flatten(), *hidden, layers.Dense(width, "softmax", name="output"))


def plant(model, name, rows=(), columns=()):
    layer = model.get_layer(name)
    kernel = np.array(layer.kernel)
    kernel[..., list(rows), :] = 0
    kernel[..., list(columns)] = 0
    layer.kernel.assign(kernel)


def shapes(model):
    return [tuple(weight.shape) for weight in model.weights if weight.name == "kernel"]


def compacted(model, images=IMAGES) -> Any:
    before = [np.array(weight) for weight in model.weights]
    expected = model.predict(images, verbose=0)
    smaller = compact(model)
    assert smaller is not None
    np.testing.assert_allclose(smaller.predict(images, verbose=0), expected, atol=TOLERANCE, rtol=0)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    return smaller


def test_a_model_without_zeros_has_nothing_to_remove():
    assert compact(dense(12, 7)) is None
    assert compact(sequence(layers.Flatten(), layers.Dense(3, "softmax"))) is None


def test_units_without_outgoing_weights_are_removed():
    model = dense(12, 7)
    plant(model, "hidden_2", rows=[0, 5])
    plant(model, "output", rows=[6])
    assert shapes(compacted(model)) == [(30, 10), (10, 6), (6, 10)]


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "gelu"])
def test_units_without_incoming_weights_become_a_constant_of_the_next_bias(activation):
    model = dense(12, 7, activation=activation)
    plant(model, "hidden_1", columns=[1, 2, 3])
    plant(model, "hidden_2", columns=[0])
    assert shapes(compacted(model)) == [(30, 9), (9, 6), (6, 10)]


def test_what_only_led_to_a_removed_unit_is_removed_too():
    model = dense(12, 7, 5)
    plant(model, "hidden_3", rows=[2])  # unit 2 of hidden_2 has no outgoing weights ...
    kernel = np.array(model.get_layer("hidden_2").kernel)
    kernel[4] = [0, 0, 1, 0, 0, 0, 0]  # ... and unit 4 of hidden_1 leads to it alone
    model.get_layer("hidden_2").kernel.assign(kernel)
    assert shapes(compacted(model)) == [(30, 11), (11, 6), (6, 5), (5, 10)]


def test_what_only_gets_constants_is_a_constant_too():
    model = dense(12, 7)
    plant(model, "hidden_1", columns=[3])
    kernel = np.array(model.get_layer("hidden_2").kernel)
    kernel[:, 5] = 0
    kernel[3, 5] = 1  # unit 5 of hidden_2 has one input, the constant
    model.get_layer("hidden_2").kernel.assign(kernel)
    assert shapes(compacted(model)) == [(30, 11), (11, 6), (6, 10)]


@pytest.mark.parametrize("part", ["rows", "columns"])
def test_one_unit_of_a_layer_is_kept(part):
    model = dense(4, 3)
    plant(model, "hidden_2", **{part: range(4 if part == "rows" else 3)})
    assert min(min(shape) for shape in shapes(compacted(model))) == 1


def test_pixels_are_removed_where_that_saves_time():
    few, many = dense(300), dense(300)
    plant(few, "hidden_1", rows=range(5))
    assert compact(few) is None
    plant(many, "hidden_1", rows=[*range(12), 20, 29])
    assert shapes(compacted(many)) == [(16, 300), (300, 10)]


def test_a_model_of_zeros_keeps_a_pixel():
    model = dense(200)
    plant(model, "hidden_1", rows=range(30))
    plant(model, "output", columns=range(10))
    smaller = compacted(model)
    assert shapes(smaller)[-1] == (1, 10)


def test_biases_are_added_to_a_layer_without_one():
    model = sequence(layers.Flatten(), layers.Dense(9, "sigmoid", name="hidden"), layers.Dense(4, use_bias=False))
    plant(model, "hidden", columns=[0, 8])
    assert [tuple(weight.shape) for weight in compacted(model).weights] == [(30, 7), (7,), (7, 4), (4,)]


def test_normalized_and_dropped_units_are_removed_with_their_statistics():
    model = sequence(
        layers.Flatten(), layers.Dense(9, name="a"), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.5),
        layers.Dense(6, "tanh", name="b"), layers.Dense(4, "softmax", name="c"),
    )  # fmt: skip
    plant(model, "a", columns=[0])
    plant(model, "b", rows=[3, 4])
    smaller = compacted(model)
    assert shapes(smaller) == [(30, 6), (6, 6), (6, 4)]
    assert [tuple(weight.shape) for weight in smaller.weights if weight.name == "moving_mean"] == [(6,)]


def test_nothing_is_removed_behind_an_unknown_layer():
    model = sequence(
        layers.Flatten(), layers.Dense(9, "relu", name="a"), layers.Dense(8, "relu", name="b"),
        layers.LayerNormalization(), layers.Dense(6, "relu", name="c"), layers.Dense(4, "softmax", name="d"),
    )  # fmt: skip
    for name in "bd":
        plant(model, name, rows=[0])
    plant(model, "c", rows=[1])
    assert shapes(compacted(model)) == [(30, 8), (8, 8), (8, 6), (6, 4)]


def test_units_before_a_softmax_are_kept():
    model = sequence(layers.Flatten(), layers.Dense(9, "softmax"), layers.Dense(4, "softmax", name="output"))
    plant(model, "output", rows=[0])
    assert compact(model) is None


def test_a_model_that_is_no_sequence_is_left_as_it_is():
    images = keras.Input((6, 5), dtype="uint8")
    flat = layers.Flatten()(layers.Rescaling(1 / 255)(images))
    model = keras.Model(images, layers.Dense(3)(layers.Concatenate()([layers.Dense(4)(flat), flat])))
    assert compact(model) is None


def network(shape=(8, 6), filters=(5, 6, 4)):
    return sequence(*cnn(shape, 10, None, Options(filters=filters)).layers, shape=shape)


COLOURS = RNG.integers(0, 256, (50, 8, 6, 3), np.uint8)


@pytest.mark.parametrize("images", [COLOURS[..., 0], COLOURS])
def test_channels_without_outgoing_weights_are_removed(images):
    model = network(images.shape[1:])
    plant(model, "convolution_2", rows=[1])
    plant(model, "convolution_3", rows=[0, 5])
    plant(model, "output", rows=[3])  # the image is one pixel in size by now, so a row is a channel
    smaller = compacted(model, images)
    channels = 1 if images.ndim == 3 else 3
    assert shapes(smaller) == [(3, 3, channels, 4), (3, 3, 4, 4), (3, 3, 4, 3), (3, 10)]
    statistics = [tuple(weight.shape) for weight in smaller.weights if weight.name == "moving_mean"]
    assert statistics == [(4,), (4,), (3,)]


def test_flattened_channels_are_removed_only_if_no_position_is_used():
    model = network((8, 6), (5, 6))  # 2 x 2 positions of 6 channels
    plant(model, "output", rows=[1, 7, 13, 19, 2, 8, 14])
    assert shapes(compacted(model, COLOURS[..., 0])) == [(3, 3, 1, 5), (3, 3, 5, 5), (20, 10)]


def test_a_constant_channel_is_removed_unless_padding_makes_it_differ_at_the_borders():
    model = network((8, 6), (5, 6))
    plant(model, "convolution_1", columns=[0, 1])
    plant(model, "convolution_2", columns=[2, 3])
    beta = np.array(model.get_layer("normalization_1").beta)
    mean = np.array(model.get_layer("normalization_1").moving_mean)
    mean[:2], beta[:2] = 0, [-1, 1]  # after relu: zero, and one
    model.get_layer("normalization_1").beta.assign(beta)
    model.get_layer("normalization_1").moving_mean.assign(mean)
    assert shapes(compacted(model, COLOURS[..., 0])) == [(3, 3, 1, 4), (3, 3, 4, 4), (16, 10)]


def test_a_constant_channel_is_removed_before_a_convolution_without_padding():
    model = sequence(
        layers.Conv2D(5, 3, activation="relu", name="a"), layers.Conv2D(4, 2, strides=2, activation="tanh", name="b"),
        layers.GlobalAveragePooling2D(), layers.Dense(3, "softmax"), shape=(8, 6, 3),
    )  # fmt: skip
    plant(model, "a", columns=[4])
    plant(model, "b", columns=[1])
    assert shapes(compacted(model, COLOURS)) == [(3, 3, 3, 4), (2, 2, 4, 3), (3, 3)]


def test_size_counts_weights_products_and_bytes():
    size = size_of(dense(12, 7))
    assert size.num_multiply_adds == 30 * 12 + 12 * 7 + 7 * 10
    assert size.num_weights == size.num_multiply_adds + 12 + 7 + 10
    assert size.num_bytes == 4 * size.num_weights
    filters = network((8, 6), (5, 6))
    assert size_of(filters).num_multiply_adds == 8 * 6 * 9 * 5 + 4 * 3 * 9 * 5 * 6 + 24 * 10
    other = sequence(layers.DepthwiseConv2D(3), layers.Flatten(), layers.Dense(3), shape=(8, 6, 3))
    assert size_of(other).num_multiply_adds is None


@pytest.fixture(scope="module")
def artifacts(bars, tmp_path_factory):
    """A trained model, and the same with zeros in it, each with its evaluation."""
    from components.evaluate import evaluate
    from components.train import train

    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name in ("trained", "sparse", "trained_evaluation", "sparse_evaluation"):
        (folder / name).mkdir()
    params = train.parse({"mlp": {"hidden_units": [20, 9]}, "epochs": 2})
    trained = train(examples=bars, params=params, output=folder / "trained")
    assert isinstance(trained, Model)
    model = trained.load_keras()
    plant(model, "hidden_2", rows=range(0, 20, 2), columns=[1])
    for file in ("architecture.json", "history.json", "summary.txt"):
        (folder / "sparse" / file).write_bytes((trained.path / file).read_bytes())
    model.save_weights(folder / "sparse" / "model.weights.h5")
    sparse = Model.seal(folder / "sparse", trained.facts)
    judge = evaluate.parse({"min_accuracy": 0.0, "min_class_recall": 0.0})
    for name, artifact in (("trained", trained), ("sparse", sparse)):
        output = folder / f"{name}_evaluation"
        made[name] = {
            "examples": bars,
            "model": artifact,
            "evaluation": evaluate(examples=bars, model=artifact, params=judge, output=output),
        }
    return made


def test_the_export_is_smaller_and_repeats_every_prediction(artifacts, tmp_path, monkeypatch):
    import tensorflow as tf

    from ridgeline.serving_check import main as check

    monkeypatch.setattr("components.export.save_in_a_fresh_process", save)
    inputs = artifacts["sparse"]
    pushed = export(**inputs, params=export.parse({"compact": True}), output=tmp_path)
    assert isinstance(pushed, PushedModel)
    facts = pushed.facts
    assert facts.trained_size
    assert facts.size
    assert facts.trained_size.num_weights == 30 * 20 + 20 + 20 * 9 + 9 + 9 * 3 + 3
    assert facts.size.num_weights == 30 * 10 + 10 + 10 * 8 + 8 + 8 * 3 + 3
    assert facts.size_in_words == (
        "425 of 839 weights, 0.002 of 0.003 MiB, 404 of 807 multiply-adds an image"
    )  # fmt: skip
    check(pushed.saved_model, pushed.check, list(facts.class_names))
    images = inputs["examples"].split("test").images
    served = tf.saved_model.load(str(pushed.saved_model)).signatures["serving_default"](images=tf.constant(images))
    np.testing.assert_allclose(served["probabilities"], inputs["evaluation"].predictions(), atol=TOLERANCE, rtol=0)


def test_the_log_says_why_nothing_was_removed(artifacts, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("components.export.save_in_a_fresh_process", save)
    caplog.set_level("INFO")
    inputs = artifacts["trained"]
    (tmp_path / "a").mkdir()
    export(**inputs, params=export.parse({"compact": True}), output=tmp_path / "a")
    assert caplog.messages[-1].endswith("multiply-adds an image; there is nothing to remove")
    model = inputs["model"].load_keras()
    folder = shutil.copytree(inputs["model"].path, tmp_path / "functional")
    images = keras.Input(model.input_shape[1:], dtype="uint8")
    (folder / "architecture.json").write_text(keras.Model(images, model.call(images)).to_json())
    functional = Model.seal(folder, inputs["model"].facts)
    monkeypatch.setattr("components.export.save_in_a_fresh_process", lambda _, *rest: save(inputs["model"].path, *rest))
    facts = inputs["evaluation"].facts.model_copy(update={"model_digest": functional.digest})
    evaluation = inputs["evaluation"].seal(shutil.copytree(inputs["evaluation"].path, tmp_path / "e"), facts)
    (tmp_path / "b").mkdir()
    params = export.parse({"compact": True})
    export(examples=inputs["examples"], model=functional, evaluation=evaluation, params=params, output=tmp_path / "b")
    assert caplog.messages[-1].endswith("because the network is not a keras.Sequential")


@pytest.mark.fresh_process
def test_a_model_without_zeros_is_exported_to_the_same_bytes(artifacts, tmp_path):
    made = {}
    for compaction in (False, True):
        output = tmp_path / str(compaction)
        output.mkdir()
        made[compaction] = export(
            **artifacts["trained"], params=export.parse({"compact": compaction}), output=output
        )  # fmt: skip
    assert made[True].facts == made[False].facts
    assert made[True].facts.trained_size is None
    assert made[True].digest == made[False].digest


@pytest.mark.fresh_process
def test_the_bytes_of_a_compact_export_depend_on_the_model_alone(artifacts, tmp_path):
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        made.append(export(**artifacts["sparse"], params=export.parse({"compact": True}), output=tmp_path / name))
    assert made[0].digest == made[1].digest
