"""An architecture or an array that holds code is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model import Model, eliminated_pixels, eliminated_units, kernels, named_weights
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.store import Store


class Touches:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def publish_changed(store: Store, artifact: Any, folder: Path, change: Any) -> Any:
    """Publish a copy of an artifact with a changed file, as whoever can write to the store could."""
    shutil.copytree(artifact.path, folder)
    (folder / "manifest.json").unlink()
    change(folder)
    return store.open(store.publish(type(artifact).seal(folder, artifact.facts)), type(artifact))


def layer_with(**config: Any) -> Any:
    def change(folder: Path) -> None:
        architecture = json.loads((folder / "architecture.json").read_text())
        architecture["config"]["layers"].insert(1, config)
        (folder / "architecture.json").write_text(json.dumps(architecture))

    return change


def call_of(module: str, name: str, *arguments: Any) -> Any:
    """A layer that would call a function when it is loaded."""
    function = {"module": module, "class_name": "function", "config": name, "registered_name": name}
    return layer_with(
        module="keras.layers",
        class_name="Lambda",
        name="code",
        registered_name=None,
        build_config=None,
        config={"name": "code", "function": function, "arguments": list(arguments)},
        inbound_nodes=[],
    )


LAMBDA = {"class_name": "__lambda__", "config": {"code": "4wAAAA==", "defaults": None, "closure": None}}


@pytest.mark.parametrize(
    "change",
    [
        layer_with(
            module="keras.layers", class_name="Lambda", name="code", registered_name=None, inbound_nodes=[],
            config={"name": "code", "function": LAMBDA},
        ),
        layer_with(module="builtins", class_name="exec", config="raise SystemExit", registered_name="exec"),
        layer_with(module="os", class_name="system", config={"command": "true"}, registered_name="system"),
        call_of("os", "system"),
        call_of("keras.utils", "get_file"),
    ],
)  # fmt: skip
def test_an_architecture_with_code_is_refused(
    synthetic_store: Store, refs: dict[str, str], store: Store, tmp_path: Path, change: Any
) -> None:
    model = publish_changed(store, synthetic_store.open(refs["train"], Model), tmp_path / "model", change)
    with pytest.raises((ValueError, TypeError), match=r"(?i)deseriali[sz]|lambda|unsafe|could not locate|safe"):
        model.load_keras()


@pytest.mark.parametrize(
    ("step", "kind", "file", "read"),
    [
        ("transform", Examples, "test/labels-00000-of-00001.npy", lambda found: found.split("test").labels),
        ("evaluate", ModelEvaluation, "predictions.npy", lambda found: found.predictions()),
    ],
)
def test_a_pickled_array_is_refused(
    synthetic_store: Store,
    refs: dict[str, str],
    store: Store,
    tmp_path: Path,
    step: str,
    kind: Any,
    file: str,
    read: Any,
) -> None:
    witness = tmp_path / "witness"

    def change(folder: Path) -> None:
        assert (folder / file).exists()
        np.save(folder / file, np.array([Touches(witness)], dtype=object), allow_pickle=True)

    artifact = publish_changed(store, synthetic_store.open(refs[step], kind), tmp_path / "changed", change)
    with pytest.raises(ValueError, match="allow_pickle|Python object"):
        read(artifact)
    assert not witness.exists()


def test_units_are_eliminated_by_their_incoming_or_their_outgoing_weights() -> None:
    import keras

    layers = keras.layers
    convolution = layers.Conv2D(3, 1, use_bias=False)
    dense, output = layers.Dense(5), layers.Dense(2)
    model = keras.Sequential(
        [keras.Input((2, 2, 1)), convolution, layers.BatchNormalization(), layers.Flatten(), dense, output]
    )
    ones = [np.ones_like(weight) for weight in model.get_weights()]
    model.set_weights(ones)
    assert eliminated_units(model) == 0
    convolution.kernel.assign(np.array([[[[0.0, 1.0, 1.0]]]]))  # channel 0 receives nothing
    dense.kernel.assign(np.ones((12, 5)) * (np.arange(12) % 3 != 2)[:, None])
    assert eliminated_units(model) == 2  # channel 2 sends nothing on
    output.kernel.assign([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert eliminated_units(model) == 4


def test_eliminated_units_are_unknown_where_layers_form_no_sequence() -> None:
    import keras

    layers = keras.layers
    image = keras.Input((2, 2))
    graph = keras.Model(image, layers.Dense(2)(layers.Flatten()(image)))
    reshaped = keras.Sequential([image, layers.Dense(3), layers.Permute((2, 1)), layers.Dense(2)])
    depthwise = keras.Sequential([keras.Input((2, 2, 1)), layers.DepthwiseConv2D(1)])
    assert [eliminated_units(model) for model in (graph, reshaped, depthwise)] == [None, None, None]


def classifier(make_first: Any, functional: bool = False) -> Any:
    """Return a model of images ``[4, 3, 2]`` whose first dense kernel has zeros in all rows of pixel (1, 2)."""
    import keras

    layers = keras.layers
    images = keras.Input((4, 3, 2), dtype="uint8")
    sequence = [images, layers.Rescaling(0.1), *make_first(layers), layers.Dense(5, name="first"), layers.Dense(3)]
    model: Any = keras.Sequential(sequence)
    model.get_layer("first").kernel.assign(np.where(np.arange(24)[:, None] // 2 == 1 * 3 + 2, 0.0, 1.0) * np.ones(5))
    return keras.Model(model.inputs, model.outputs) if functional else model


def test_pixels_are_eliminated_where_all_their_weights_are_zero() -> None:
    for extra in ((), (3, 8)):  # flattened, or reshaped and then flattened
        found = eliminated_pixels(classifier(lambda k, e=extra: [*([k.Reshape(e)] if e else []), k.Flatten()]))
        assert found is not None
        assert np.argwhere(found).tolist() == [[1, 2]]


def test_pixels_without_weights_of_their_own_are_not_counted() -> None:
    assert eliminated_pixels(classifier(lambda k: [k.Flatten(), k.LayerNormalization()])) is None
    assert eliminated_pixels(classifier(lambda k: [k.Flatten()], functional=True)) is None


def test_kernels_have_the_names_of_their_layers() -> None:
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 5, 2)),
            layers.SeparableConv2D(4, 3, name="separable"),
            layers.DepthwiseConv2D(3, name="depthwise"),
            layers.BatchNormalization(),
            layers.Reshape((2, 4)),
            layers.LSTM(3, name="memory"),
            layers.Dense(3, name="output"),
        ]
    )
    assert {name: kernel.shape for name, kernel in kernels(model).items()} == {
        "separable/depthwise_kernel": (3, 3, 2, 1),
        "separable/pointwise_kernel": (1, 1, 2, 4),
        "depthwise": (3, 3, 4, 1),
        "memory/lstm_cell": (4, 12),
        "memory/lstm_cell/recurrent_kernel": (3, 12),
        "output": (3, 3),
    }


def test_each_weight_of_layers_within_layers_has_a_name_of_its_own() -> None:
    """Layers with equal names: in nested networks of all kinds, in wrappers, and in stacks of recurrent cells."""
    import keras

    layers = keras.layers

    def block(name: str, *made: Any) -> Any:
        return keras.Sequential([*(made or [layers.Dense(4, name="hidden")])], name=name)

    image, inner = keras.Input((4, 4)), keras.Input((4, 4))
    graph = keras.Model(inner, layers.Dense(4, name="hidden")(inner), name="graph")  # its weights' paths lack its name
    cells = [layers.LSTMCell(4, name="cell"), layers.LSTMCell(4, name="cell")]
    stages = [
        block("first"),
        graph,
        block("outer", block("first"), block("second", block("hidden"))),
        layers.TimeDistributed(layers.Dense(4, name="hidden"), name="each"),
        layers.Bidirectional(layers.GRU(2, return_sequences=True, name="memory"), name="both"),
        layers.RNN(cells, name="stack"),
        layers.Dense(2, name="output"),
    ]
    for model in (keras.Sequential([image, *stages]), keras.Model(image, block("all", *stages)(image))):
        named = named_weights(model)
        assert [id(weight) for weight in named.values()] == [id(weight) for weight in model.weights]
        assert list(named_weights(keras.models.model_from_json(model.to_json()))) == list(named)
        prefix = "" if isinstance(model, keras.Sequential) else "all/"
        assert list(kernels(model)) == [
            f"{prefix}{name}"
            for name in (
                "first/hidden",
                "graph/hidden",
                "outer/first/hidden",
                "outer/second/hidden/hidden",
                "each/hidden",
                *(
                    f"both/{way}_memory/gru_cell{which}"
                    for way in ("forward", "backward")
                    for which in ("", "/recurrent_kernel")
                ),
                *(
                    f"stack/stacked_rnn_cells/{cell}{which}"
                    for cell in ("cell", "cell_")
                    for which in ("", "/recurrent_kernel")
                ),
                "output",
            )
        ]


def test_a_model_fits_examples_of_its_shape_and_its_classes(synthetic_store: Store, refs: dict[str, str]) -> None:
    model, examples = (synthetic_store.open(refs[n], t).facts for n, t in (("train", Model), ("transform", Examples)))
    assert model.misfit(examples) is None
    wider = examples.model_copy(update={"image_shape": (28, 30)})
    assert model.misfit(wider) == "image_shape (28, 30); received (28, 28)"
    fewer = examples.model_copy(update={"class_names": ("a", "b")})
    assert str(model.misfit(fewer)).startswith("class_names ('a', 'b'); received ('")
