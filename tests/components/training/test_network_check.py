from dataclasses import replace

import numpy as np
import pytest

from components.sweep import sweep
from components.train import train
from components.training.fit import make_engine
from components.training.network_check import check_network
from components.training.params import NETWORKS, Params
from components.training.penalties import KINDS
from components.training.penalties.l1 import L1
from ridgeline.artifacts.model import Model
from ridgeline.component import StepError


def two_inputs(keras, shape, classes, regularizer):
    first, second = keras.Input(shape), keras.Input(shape)
    flat = keras.layers.Flatten()(keras.layers.Add()([first, second]))
    return keras.Model([first, second], keras.layers.Dense(classes, "softmax", kernel_regularizer=regularizer)(flat))


def two_outputs(keras, shape, classes, regularizer):
    images = keras.Input(shape)
    output = keras.layers.Dense(classes, "softmax", kernel_regularizer=regularizer)(keras.layers.Flatten()(images))
    return keras.Model(images, [output, output])


def sequence(*first, classes=0, activation="softmax", penalty=True, image=None, **dense):
    """Return a function that returns a sequence of layers, made by functions of `keras.layers`, and a dense one."""

    def build(keras, shape, num_classes, regularizer):
        output = keras.layers.Dense(
            num_classes + classes, activation, kernel_regularizer=regularizer if penalty else None, **dense
        )
        made = [make(keras.layers) for make in (*first, lambda layers: layers.Flatten())]
        return keras.Sequential([keras.Input(*(image or (shape,))), *made, output])

    return build


def without_input(keras, shape, classes, regularizer):
    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(classes, kernel_regularizer=regularizer)])


def custom_layer(keras, shape, classes, regularizer):
    class RowMean(keras.layers.Layer):  # type: ignore[name-defined]
        def call(self, images):
            return keras.ops.mean(images, axis=2)

    return sequence(lambda layers: RowMean(name="rows"))(keras, shape, classes, regularizer)


def registered_layer(keras, shape, classes, regularizer):
    @keras.saving.register_keras_serializable("tests")
    class Registered(keras.layers.Layer):  # type: ignore[name-defined]
        def call(self, images):
            return images

    return sequence(lambda layers: Registered())(keras, shape, classes, regularizer)


def custom_model(keras, shape, classes, regularizer):
    class Mine(keras.Model):  # type: ignore[name-defined]
        pass

    images = keras.Input(shape)
    return Mine(images, keras.layers.Dense(classes, kernel_regularizer=regularizer)(keras.layers.Flatten()(images)))


def own_activation(values):
    return values


def nan_scale(layers):
    return layers.Rescaling(float("nan"))


REFUSED = {
    "expected the network mlp to have 1 input; received one with 2": two_inputs,
    "to have 1 output; received one with 2": two_outputs,
    r"to return float32 \(None, 3\); received one that returns float32 \(None, 4\)": sequence(classes=1),
    r"and 1 in sum; received values from .* End it with softmax": sequence(activation="sigmoid"),
    r"return probabilities, each in \[0, 1\]": sequence(activation=None),
    "received values from nan to nan": sequence(nan_scale),
    r"to have float32 weights; received .*kernel of the type float16": sequence(
        lambda layers: layers.Dense(3, dtype="float16")
    ),
    "received one that returns float64": sequence(dtype="float64"),
    r"take float32 images, .*; received one that takes uint8": sequence(image=((6, 5), None, "uint8")),
    r"take images of the shape \(6, 5\); received one that takes \(30,\)": sequence(image=((30,),)),
    "begin with keras.Input": without_input,
    "give its argument regularizer to at least 1 layer": sequence(penalty=False),
    r"Keras's own layers and functions.*received .*RowMean of the layer rows": custom_layer,
    r"received .*\.Registered": registered_layer,
    r"received the function own_activation": sequence(lambda layers: layers.Dense(3, own_activation)),
    r"received a Lambda layer": sequence(lambda layers: layers.Lambda(lambda images: images)),
    r"a keras.Sequential or a keras.Model of inputs and outputs; received .*Mine": custom_model,
    "a keras.Sequential or a keras.Model of inputs and outputs; received .*NoneType": lambda *_: None,
    r"Cannot build the network mlp for images of the shape \(6, 5\) and 3 classes: ZeroDivisionError: division by zero"
    r"( \(.*\))?\. Correct its function in components.networks.mlp, change its options": lambda *_: 1 / 0,
    r"Cannot build the network mlp .*: ValueError: .* change its options": sequence(lambda layers: layers.Conv2D(2, 9)),
}


@pytest.fixture
def use(monkeypatch):
    """Let the network ``mlp`` be built by a function of keras, image shape, number of classes and regularizer."""

    def use(make):
        def build(image_shape, num_classes, regularizer, options):
            import keras

            return make(keras, image_shape, num_classes, regularizer)

        monkeypatch.setitem(NETWORKS, "mlp", replace(NETWORKS["mlp"], build=build))

    return use


@pytest.mark.parametrize(("message", "build"), REFUSED.items(), ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_trained_or_served_is_refused_by_name(bars, use, message, build):
    use(build)
    with pytest.raises(StepError, match=f"(?i){message}"):
        check_network(bars, Params())


def test_both_steps_refuse_it_before_they_train(bars, use, tmp_path):
    use(sequence(classes=1))
    for step in (train, sweep):
        with pytest.raises(StepError, match="Expected the network mlp to return float32"):
            step(examples=bars, params=step.parse({}), output=tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_model_of_inputs_and_outputs_is_flat_and_has_the_same_names_each_time(bars, use, tmp_path):
    def residual(keras, shape, classes, regularizer):
        images = keras.Input(shape)
        first = keras.layers.Dense(5, "relu", kernel_regularizer=regularizer)(images)
        second = keras.layers.Dense(5, kernel_regularizer=regularizer)(first)
        flat = keras.layers.Flatten()(first + second)
        return keras.Model(images, keras.layers.Dense(classes, "softmax", kernel_regularizer=regularizer)(flat))

    use(residual)
    models = []
    for name in "ab":
        (tmp_path / name).mkdir()
        model = train(examples=bars, params=train.parse({"epochs": 1}), output=tmp_path / name)
        assert isinstance(model, Model)
        models.append(model)
    assert models[0].digest == models[1].digest
    assert [layer.name for layer in models[0].facts.sparsity] == ["dense", "dense_1", "dense_2"]
    assert models[0].facts.num_eliminated_pixels is None
    split = bars.split("validation")
    predicted = models[0].load_keras().predict(split.images, verbose=0)
    assert np.mean(predicted.argmax(1) == split.labels) == models[0].facts.metrics["val_accuracy"]


WRAPPED = {
    "copied": (
        lambda layers, penalty: layers.Bidirectional(
            layers.LSTM(3, kernel_regularizer=penalty, recurrent_regularizer=penalty, name="memory"), name="both"
        ),
        [
            f"both/{way}_memory/lstm_cell{which}"
            for way in ("forward", "backward")
            for which in ("", "/recurrent_kernel")
        ],
    ),
    "wrapped": (
        lambda layers, penalty: layers.TimeDistributed(
            layers.Dense(3, kernel_regularizer=penalty, name="columns"), name="each"
        ),
        ["each/columns"],
    ),
}


@pytest.mark.parametrize(("make", "names"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("kind", ["l1", "group"])
def test_layers_in_wrappers_are_checked_and_trained_with_the_penalty(bars, use, tmp_path, make, names, kind):
    def build(keras, shape, classes, regularizer):
        output = keras.layers.Dense(classes, "softmax", name="output")
        return keras.Sequential([keras.Input(shape), make(keras.layers, regularizer), keras.layers.Flatten(), output])

    use(build)
    values = {"epochs": 1, "learning_rate": 0.05, "solver": "proximal", "penalty": {"kind": kind, kind: 0.3}}
    params = train.parse(values)
    assert isinstance(params, Params)
    engine = make_engine(bars, params)
    assert engine.penalized_names == names
    model = train(examples=bars, params=params, output=tmp_path)
    assert isinstance(model, Model)
    zeros = {layer.name: layer.num_zeros for layer in model.facts.sparsity}
    assert all(zeros[name] > 0 for name in names)
    assert zeros["output"] == 0  # it was not given the regularizer
    network, split = model.load_keras(), bars.split("validation")
    entropy = -np.log(network.predict(split.images, verbose=0)[np.arange(len(split)), split.labels]).mean()
    penalty = sum(float(loss) for loss in network.losses) + model.facts.unsaved_penalty
    assert model.facts.metrics["val_loss"] == pytest.approx(entropy + penalty, rel=1e-4)
    assert penalty > 0


def test_a_wrapped_weight_without_groups_is_refused_by_name(bars, use):
    def build(keras, shape, classes, regularizer):
        layers = keras.layers
        scale = layers.TimeDistributed(layers.LayerNormalization(gamma_regularizer=regularizer, name="scale"))
        output = layers.Dense(classes, "softmax", kernel_regularizer=regularizer)
        return keras.Sequential([keras.Input(shape), scale, layers.Flatten(), output])

    use(build)
    with pytest.raises(StepError, match=r"penalty group to .*scale/gamma of the network mlp, shape \(5,\): it has no"):
        check_network(bars, Params(penalty={"kind": "group"}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"value": lambda w, s, _: s["slope"]},
            "value of the penalty l1 .*strengths l1, l2; received KeyError: 'slope'",
        ),
        ({"value": lambda w, s, _: w * s["l1"]}, r"value .* return float32 \(\) for .*; received float32 \(30, 100\)"),
        ({"value": lambda w, s, _: None}, "value of the penalty l1 .*received ValueError"),
        (
            {"proximal_step": lambda w, r, s: w[0]},
            r"proximal_step .*float32 \(30, 100\) for .*received float32 \(100,\)",
        ),
        ({"proximal_step": lambda w, r, s: w * r * s["slope"]}, "proximal_step of the penalty l1 .*'slope'"),
    ],
)
def test_a_penalty_that_cannot_be_computed_is_refused_by_name(bars, monkeypatch, changed, message):
    monkeypatch.setattr(
        "components.training.penalty.KINDS", KINDS | {"l1": replace(L1, formula=replace(L1.formula, **changed))}
    )
    with pytest.raises(StepError, match=message):
        check_network(bars, Params(penalty={"kind": "l1"}))
