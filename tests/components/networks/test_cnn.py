"""The network, and the whole pipeline with it: batch statistics, dropout, convolution kernels."""

import re
from typing import Any

import numpy as np
import pytest

from components.evaluate import evaluate
from components.export import export, save
from components.networks.cnn import Options, cnn
from components.select import select
from components.sweep import sweep
from components.train import train
from ridgeline.artifacts.model import Model, kernels
from ridgeline.artifacts.pushed_model import PushedModel
from ridgeline.component import Champion, StepError
from ridgeline.serving_check import check

SMALL = {"network": "cnn", "cnn": {"filters": [4, 3]}, "batch_size": 48}
VALUES = SMALL | {"epochs": 3, "learning_rate": 0.1}


@pytest.mark.parametrize(("shape", "inputs"), [((28, 28), 4 * 4 * 64), ((32, 32, 3), 4 * 4 * 64), ((1, 2), 64)])
def test_each_block_halves_the_image(shape, inputs):
    network = cnn(shape, 10, None, Options())
    channels = shape[2] if len(shape) == 3 else 1
    assert [tuple(w.shape) for w in network.weights if w.name == "kernel"] == [
        (3, 3, channels, 16), (3, 3, 16, 32), (3, 3, 32, 64), (inputs, 10),
    ]  # fmt: skip
    np.testing.assert_allclose(np.sum(network(np.ones((2, *shape), np.float32)), axis=1), 1, rtol=1e-5)


def run(examples, output, values, **inputs):
    output.mkdir()
    return train(examples=examples, params=train.parse(values), output=output, **inputs)


@pytest.fixture(scope="module")
def model(bars, tmp_path_factory):
    values = VALUES | {"penalty": {"kind": "l1", "l1": 0.02}, "solver": "proximal"}
    return run(bars, tmp_path_factory.mktemp("cnn") / "model", values)


def test_model_learns_and_reads_back(bars, model):
    assert model.facts.metrics["val_accuracy"] > 0.9
    split = bars.split("validation")
    probabilities = model.load_keras().predict(split.images, verbose=0)
    assert np.mean(probabilities.argmax(1) == split.labels) == model.facts.metrics["val_accuracy"]
    entropy = -np.log(probabilities[np.arange(len(split)), split.labels]).mean()
    penalty = 0.02 * sum(np.abs(kernel).sum() for kernel in kernels(model.load_keras()).values())
    assert model.facts.metrics["val_loss"] == pytest.approx(entropy + penalty, rel=1e-4)
    statistics = model.load_keras().get_layer("normalization_1").moving_mean
    assert np.abs(statistics).min() > 0


def test_convolutions_get_exact_zeros_and_no_pixel_is_said_to_be_eliminated(model):
    assert [(s.name, s.num_weights) for s in model.facts.sparsity] == [
        ("convolution_1", 36), ("convolution_2", 108), ("output", 36),
    ]  # fmt: skip
    kernel = model.load_keras().get_layer("convolution_2").kernel
    assert model.facts.sparsity[1].num_zeros == np.sum(np.asarray(kernel) == 0) > 0
    assert model.facts.num_eliminated_pixels is None


def test_equal_seeds_give_equal_bytes(bars, tmp_path):
    first = run(bars, tmp_path / "a", SMALL)
    assert run(bars, tmp_path / "b", SMALL).digest == first.digest
    assert run(bars, tmp_path / "c", SMALL | {"seed": 43}).digest != first.digest


def test_a_warm_start_takes_the_statistics_but_draws_as_the_seed_says(bars, model, tmp_path):
    values = SMALL | {"epochs": 1, "learning_rate": 1e-12, "warm_start": True}
    warm = [run(bars, tmp_path / name, values, champion=Champion(model.digest, model)) for name in "ab"]
    assert warm[0].digest == warm[1].digest
    for name in ("convolution_1", "output"):
        np.testing.assert_allclose(
            warm[0].load_keras().get_layer(name).kernel, model.load_keras().get_layer(name).kernel, atol=1e-6
        )
    with pytest.raises(StepError, match="Set train.network and its options to the champion's"):
        run(bars, tmp_path / "c", {"warm_start": True}, champion=Champion(model.digest, model))


@pytest.fixture(scope="module")
def evaluation(bars, model, tmp_path_factory):
    params = evaluate.parse({"min_accuracy": 0.5, "min_class_recall": 0.0})
    return evaluate(examples=bars, model=model, params=params, output=tmp_path_factory.mktemp("evaluation"))


def test_the_report_names_each_kernel_and_shows_no_map_of_pixels(evaluation):
    page = evaluation.report.read_text()
    assert re.findall(r"Histogram of the nonzero weights of layer (\w+)", page) == [
        "convolution_1", "convolution_2", "output",
    ]  # fmt: skip
    assert "eliminated" not in page
    assert "network" in page


@pytest.mark.fresh_process
def test_the_exported_model_repeats_the_evaluation(bars, model, evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr("components.export.save_in_a_fresh_process", save)
    pushed = export(examples=bars, model=model, evaluation=evaluation, params=export.parse({}), output=tmp_path)
    assert isinstance(pushed, PushedModel)
    check(pushed.saved_model, pushed.check, pushed.facts.class_names)


@pytest.mark.fresh_process
def test_the_exported_bytes_depend_on_the_model_alone(bars, model, evaluation, tmp_path):
    digests = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        arguments = {"examples": bars, "model": model, "evaluation": evaluation}
        digests.add(export(**arguments, params=export.parse({}), output=tmp_path / name).digest)
    assert len(digests) == 1


def test_a_sweep_names_the_kernels_and_selects(bars, tmp_path):
    (tmp_path / "trials").mkdir()
    (tmp_path / "result").mkdir()
    params = sweep.parse({"dense": False, "l1": [0.001, 0.02], "l2": [0.01], "train": VALUES})
    trials = sweep(examples=bars, params=params, output=tmp_path / "trials")
    assert [k.name for k in trials.facts.trials[0].kernels] == ["convolution_1", "convolution_2", "output"]
    parts: dict[str, Any] = {"trials.0": trials}
    result = select(params=select.parse({}), output=tmp_path / "result", **parts)
    assert "in<br>convolution_2" in result.report.read_text()
    trial = trials.facts.trials[1]
    values = VALUES | {"penalty": {"kind": "l1", "l1": 0.02}, "solver": trial.solver}
    alone = run(bars, tmp_path / "alone", values)
    assert alone.facts.metrics == trial.metrics
    assert [s.num_zeros for s in alone.facts.sparsity] == [k.num_zeros for k in trial.kernels]


@pytest.mark.real_data
def test_it_learns_fashion_mnist_in_one_epoch(fashion_mnist, tmp_path):
    from ridgeline.artifacts.examples import Examples

    store, refs = fashion_mnist
    examples = store.open(refs["transform"], Examples)
    values = {"network": "cnn", "epochs": 1, "penalty": {"kind": "l2", "l2": 1e-5}}
    model = run(examples, tmp_path / "model", values)
    assert isinstance(model, Model)
    assert model.facts.metrics["val_accuracy"] > 0.86
