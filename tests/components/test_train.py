import numpy as np
import pytest

from components.train import build_model, train
from ridgeline.artifacts.examples import Examples, ExamplesFacts, Normalization, write_split
from ridgeline.artifacts.model import Model


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Small separable images: each class brightens its own rows."""
    folder = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    sizes = {"train": 640, "validation": 64, "test": 64}
    for name, size in sizes.items():
        labels = rng.integers(0, 3, size)
        images = rng.integers(0, 90, (size, 6, 5), dtype=np.uint8)
        for i, label in enumerate(labels):
            images[i, 2 * label : 2 * label + 2] += 120
        write_split(folder / name, [(images, labels)], size, (6, 5))
    return Examples.seal(
        folder,
        ExamplesFacts(
            dataset="bars:1.0.0",
            image_shape=(6, 5),
            class_names=("top", "middle", "bottom"),
            num_examples=sizes,
            normalization=Normalization(kind="standard", mean=60.0, deviation=50.0),
            synthetic=True,
        ),
    )


def run(examples, output, **values):
    output.mkdir()
    return train(examples=examples, params=train.parse(values), output=output)


def test_model_learns_and_reads_back(examples, tmp_path):
    model = run(examples, tmp_path / "m", hidden_units=[8], epochs=8, penalty={"kind": "none"})
    assert model.facts.metrics["val_accuracy"] > 0.95
    assert model.history()["val_accuracy"][-1] == model.facts.metrics["val_accuracy"]
    assert len(model.history()["loss"]) == 8
    assert "hidden_1" in (model.path / "summary.txt").read_text()
    predicted = model.load_keras().predict(examples.split("validation").images, verbose=0)
    assert np.mean(predicted.argmax(1) == examples.split("validation").labels) == pytest.approx(
        model.facts.metrics["val_accuracy"]
    )


def test_same_seed_same_bytes_and_another_seed_others(examples, tmp_path):
    first = run(examples, tmp_path / "a", hidden_units=[4], epochs=1)
    assert run(examples, tmp_path / "b", hidden_units=[4], epochs=1).digest == first.digest
    assert run(examples, tmp_path / "c", hidden_units=[4], epochs=1, seed=43).digest != first.digest


@pytest.mark.parametrize(
    ("kind", "l1", "l2"), [("none", 0, 0), ("l1", 0.003, 0), ("l2", 0, 0.02), ("l1_l2", 0.003, 0.02)]
)
def test_penalty_is_the_formula_over_kernels_with_biases_free(examples, kind, l1, l2):
    params = train.parse({"hidden_units": [4], "penalty": {"kind": kind, "l1": 0.003, "l2": 0.02}})
    model = build_model(examples, params)
    for layer in model.layers:
        if layer.weights:
            layer.set_weights([layer.get_weights()[0], np.ones_like(layer.get_weights()[1])])
    kernels = [layer.get_weights()[0].astype(np.float64) for layer in model.layers if layer.weights]
    expected = sum(l1 * np.abs(kernel).sum() + l2 * (kernel**2).sum() for kernel in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_normalization_is_inside_the_graph(examples):
    model = build_model(examples, train.parse({"hidden_units": []}))
    image = examples.split("test").images[:3]
    kernel, bias = model.layers[-1].get_weights()
    logits = ((image.astype(np.float64) - 60.0) / 50.0).reshape(3, -1) @ kernel + bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model(np.asarray(image)), expected, rtol=1e-4, atol=1e-6)


def test_seed_model_has_its_parameters(synthetic_store, refs):
    model = synthetic_store.open(refs["train"], Model)
    assert model.facts.num_parameters == 89_610
    layers = {layer.name: layer.count_params() for layer in model.load_keras().layers if layer.weights}
    assert layers == {"hidden_1": 78_500, "hidden_2": 10_100, "output": 1_010}
    assert [layer.num_weights for layer in model.facts.sparsity] == [78_400, 10_000, 1_000]


def test_diverging_loss_stops_with_the_epoch_and_writes_nothing(examples, tmp_path):
    with pytest.raises(FloatingPointError, match=r"received nan in epoch 1|received inf in epoch 1|in epoch \d"):
        run(examples, tmp_path / "m", learning_rate=10.0, penalty={"kind": "l2", "l2": 1e6}, epochs=5)
    assert list((tmp_path / "m").iterdir()) == []


def test_adam_and_batch_size(examples, tmp_path):
    model = run(examples, tmp_path / "m", optimizer="adam", learning_rate=0.01, batch_size=7, epochs=2)
    assert model.facts.params["optimizer"] == "adam"
    assert model.facts.metrics["val_accuracy"] > 0.8


@pytest.mark.real_data
def test_seed_model_reaches_the_notebooks_accuracy(fashion_mnist):
    store, refs = fashion_mnist
    facts = store.open(refs["train"], Model).facts
    assert facts.num_parameters == 89_610
    assert facts.metrics["val_accuracy"] == pytest.approx(0.82, abs=0.01)
