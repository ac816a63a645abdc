import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import create_model, model_validator

from components.networks import cnn, mlp
from components.train import train
from components.training.checkpoint import Checkpoint, CheckpointError
from components.training.network import build_model
from components.training.params import NETWORKS, Params
from ridgeline.artifacts.model import Model
from ridgeline.component import Champion, ParameterError, StepError, StepSkipped, flatten
from ridgeline.component import Params as BaseParams
from ridgeline.step_cli import run_step

ROOT = Path(__file__).resolve().parents[2]


def parse(values: dict[str, Any]) -> Params:
    params = train.parse(values)
    assert isinstance(params, Params)
    return params


@pytest.fixture
def examples(bars):
    return bars


def run(examples, output, scratch=None, **values):
    output.mkdir()
    return train(examples=examples, params=train.parse(values), output=output, scratch=scratch)


@pytest.mark.parametrize("columns", ["40", "200"])
def test_bytes_do_not_depend_on_the_terminal(examples, tmp_path, monkeypatch, columns):
    expected = run(examples, tmp_path / "a", mlp={"hidden_units": [4]}, epochs=1)
    monkeypatch.setenv("COLUMNS", columns)
    assert run(examples, tmp_path / "b", mlp={"hidden_units": [4]}, epochs=1).digest == expected.digest
    assert "Param #" in (expected.path / "summary.txt").read_text()


def test_model_learns_and_reads_back(examples, tmp_path):
    model = run(examples, tmp_path / "m", mlp={"hidden_units": [8]}, epochs=8, penalty={"kind": "none"})
    assert model.facts.metrics["val_accuracy"] > 0.95
    assert model.history()["val_accuracy"][-1] == model.facts.metrics["val_accuracy"]
    assert len(model.history()["loss"]) == 8
    assert "hidden_1" in (model.path / "summary.txt").read_text()
    predicted = model.load_keras().predict(examples.split("validation").images, verbose=0)
    assert np.mean(predicted.argmax(1) == examples.split("validation").labels) == pytest.approx(
        model.facts.metrics["val_accuracy"]
    )


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_bytes(examples, tmp_path):
    first = run(examples, tmp_path / "a", mlp={"hidden_units": [4]}, epochs=1)
    assert run(examples, tmp_path / "b", mlp={"hidden_units": [4]}, epochs=1).digest == first.digest
    assert run(examples, tmp_path / "c", mlp={"hidden_units": [4]}, epochs=1, seed=43).digest != first.digest


@pytest.mark.parametrize(
    ("kind", "l1", "l2"), [("none", 0, 0), ("l1", 0.003, 0), ("l2", 0, 0.02), ("l1_l2", 0.003, 0.02)]
)
def test_penalty_is_the_formula_over_kernels_with_biases_free(examples, kind, l1, l2):
    params = parse({"mlp": {"hidden_units": [4]}, "penalty": {"kind": kind, "l1": l1, "l2": l2}})
    model = build_model(examples, params)
    for layer in model.layers:
        if layer.weights:
            layer.set_weights([layer.get_weights()[0], np.ones_like(layer.get_weights()[1])])
    kernels = [layer.get_weights()[0].astype(np.float64) for layer in model.layers if layer.weights]
    expected = sum(l1 * np.abs(kernel).sum() + l2 * (kernel**2).sum() for kernel in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_normalization_is_inside_the_graph(examples):
    model = build_model(examples, parse({"mlp": {"hidden_units": []}}))
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


def test_the_profiles_are_golden():
    """The values that the accuracies in the documents were measured with."""
    seed = {
        "mlp": mlp.Options(hidden_units=(100, 100)), "cnn": cnn.Options(filters=(16, 32, 64), dropout=0.3),
        "momentum": 0.0, "schedule": "constant", "patience": None, "seed": 42, "warm_start": False, "optimizer": "sgd",
        "learning_rate": 0.02, "batch_size": 32, "epochs": 2, "label_smoothing": 0.0, "shift": 0, "shift_share": 1.0,
        "flip": False, "average": 0.0, "weight_decay": 0.0, "solver": "subgradient",
    }  # fmt: skip
    tuned = {"optimizer": "adam", "batch_size": 128, "label_smoothing": 0.1, "shift": 1, "flip": True}
    tuned_mlp = tuned | {
        "mlp": mlp.Options(hidden_units=(256, 128)), "learning_rate": 0.001, "epochs": 120, "shift_share": 0.5,
        "average": 0.9995,
    }  # fmt: skip
    tuned_cnn = tuned | {
        "cnn": cnn.Options(filters=(16, 32, 64, 128), dropout=0.3), "learning_rate": 0.003, "schedule": "cosine",
        "epochs": 30, "weight_decay": 0.05,
    }  # fmt: skip
    for network, profile, values, penalty in (
        ("mlp", "seed", seed, {"l2": 0.01}),
        ("cnn", "seed", seed, {"l2": 0.01}),
        ("mlp", "tuned", seed | tuned_mlp, {}),
        ("cnn", "tuned", seed | tuned_cnn, {}),
    ):
        params = parse({"network": network, "profile": profile})
        assert {name: getattr(params, name) for name in values} == values
        assert {*values, "network", "profile", "penalty"} == set(type(params).model_fields)
        assert params.penalty.strengths == penalty
        recipe = {name: values[name] for name in vars(params.recipe)}
        assert vars(params.recipe) == recipe


DIVERGES = {"learning_rate": 0.1, "penalty": {"kind": "l2", "l2": 12.5}, "epochs": 9}  # w -> -1.5 w in each step


def test_diverging_loss_is_reported_with_its_step_and_keeps_the_last_good_checkpoint(examples, tmp_path):
    message = r"finite loss; received (inf|nan) in step \d+ of 20 in epoch \d with l2=12.5 learning_rate=0.1"
    (tmp_path / "scratch").mkdir()
    with pytest.raises(FloatingPointError, match=message) as caught:
        run(examples, tmp_path / "m", mlp={"hidden_units": [4]}, scratch=tmp_path / "scratch", **DIVERGES)
    assert list((tmp_path / "m").iterdir()) == []
    params = train.parse({"mlp": {"hidden_units": [4]}, **DIVERGES})
    identity = {"params": params.model_dump(mode="json"), "examples": examples.digest}
    checkpoint = Checkpoint(tmp_path / "scratch" / "checkpoint", identity).load()
    assert checkpoint is not None
    arrays, facts = checkpoint
    assert f"epoch {len(facts['history']['loss']) + 1} " in str(caught.value)
    assert len(facts["history"]["loss"]) >= 2
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_adam_and_batch_size(examples, tmp_path):
    model = run(examples, tmp_path / "m", optimizer="adam", learning_rate=0.01, batch_size=7, epochs=2)
    assert model.facts.params["optimizer"] == "adam"
    assert model.facts.metrics["val_accuracy"] > 0.8


def test_proximal_training_gives_exact_zeros_and_eliminates_pixels(examples, tmp_path):
    values = {"mlp": {"hidden_units": [3]}, "epochs": 8, "learning_rate": 0.1, "penalty": {"kind": "l1", "l1": 0.1}}
    model = run(examples, tmp_path / "proximal", solver="proximal", **values)
    kernel = model.load_keras().get_layer("hidden_1").get_weights()[0]
    assert model.facts.sparsity[0].num_zeros == np.sum(kernel == 0.0) > 0.5 * kernel.size
    assert model.facts.num_eliminated_pixels == np.sum(~kernel.any(axis=1)) > 0
    assert model.facts.metrics["val_accuracy"] > 0.9
    subgradient = run(examples, tmp_path / "subgradient", **values)
    assert [layer.name for layer in subgradient.facts.sparsity] == ["hidden_1", "output"]
    assert [layer.num_zeros for layer in subgradient.facts.sparsity] == [0, 0]


def test_saved_architecture_has_ordinary_keras_regularizers(examples, tmp_path):
    model = run(
        examples, tmp_path / "m", mlp={"hidden_units": [4]}, epochs=1, penalty={"kind": "l1_l2", "l1": 0.5, "l2": 0.25}
    )
    config = model.load_keras().get_layer("hidden_1").get_config()["kernel_regularizer"]
    assert (config["class_name"], config["config"]) == ("L1L2", {"l1": 0.5, "l2": 0.25})
    assert model.facts.unsaved_penalty == 0


def test_saved_architecture_has_no_regularizer_where_keras_has_none(examples, tmp_path):
    model = run(examples, tmp_path / "m", mlp={"hidden_units": [4]}, epochs=1, penalty={"kind": "group", "group": 0.01})
    network = model.load_keras()
    assert network.get_layer("hidden_1").get_config()["kernel_regularizer"] is None
    norms = [np.linalg.norm(kernel, axis=1).sum() * np.sqrt(kernel.shape[1]) for kernel in network.get_weights()[::2]]
    assert model.facts.unsaved_penalty == pytest.approx(0.01 * sum(norms), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"penalty": {"kind": "l2", "l1": 0.001}},
            "train.penalty.l1: expected 0 or the default 0.0001 with kind='l2', .*; received 0.001. Set kind=l1",
        ),
        ({"penalty": {"kind": "none", "l2": 0.5}}, "train.penalty.l2: expected 0 or the default 0.01 with kind='none'"),
        ({"shift_share": 0.5}, "train.shift_share: expected its default with shift=0"),
        (
            {"solver": "proximal"},
            "train.solver: expected subgradient .* smooth, .* penalty.kind='l2'. .* one of l1, l1_l2, group, or",
        ),
        ({"penalty": {"kind": "l1", "group": 0.5}}, "train.penalty.group: expected 0 .*received 0.5. Set kind=group"),
        (
            {"solver": "proximal", "penalty": {"kind": "group"}, "optimizer": "adam"},
            "train.solver: expected subgradient with the optimizer adam, whose step size differs between weights",
        ),
        ({"weight_decay": 0.1}, "train.weight_decay: expected 0 with the optimizer sgd, which takes an L2 penalty"),
        (
            {"solver": "proximal", "penalty": {"kind": "l1"}, "optimizer": "adam"},
            "train.solver: expected subgradient with the optimizer adam",
        ),
        (
            {"solver": "proximal", "penalty": {"kind": "l1"}, "average": 0.9},
            "train.solver: expected subgradient with weight averaging",
        ),
        ({"momentum": 0.9, "optimizer": "adam"}, "train.momentum: expected 0 with the optimizer adam"),
        ({"shift": 3, "flip": "maybe"}, "train.flip: expected a valid boolean"),
    ],
)
def test_invalid_combinations_are_refused(values, message):
    with pytest.raises(ParameterError, match=message):
        train.parse(values)


@pytest.mark.fresh_process
@pytest.mark.parametrize(
    "network",
    [{"mlp": {"hidden_units": [4]}, "average": 0.9}, {"network": "cnn", "cnn": {"filters": [2]}}],
    ids=["mlp", "cnn"],
)
def test_killed_training_resumes_to_the_same_bytes(examples, tmp_path, network):
    """Kill the command by SIGKILL after an epoch; run it again from elsewhere with another hash seed."""
    values = {"epochs": 60, "momentum": 0.5, "schedule": "cosine", "shift": 1, **network}
    whole = run(examples, tmp_path / "whole", **values)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    arguments = [word for key, text in texts.items() for word in (f"--{key.replace('_', '-')}", text)]
    command = [sys.executable, "-m", "ridgeline.cli", "step", "train", "--examples", examples.path, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()

    def start(folder, hash_seed):
        return subprocess.Popen(
            [*command, "--output", "../killed"],
            cwd=tmp_path / folder,
            env={**environment, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start("here", "1") as process:
        for line in process.stderr:
            if line.startswith("epoch 3/60"):
                break
        process.kill()
        error = process.stderr.read()
    assert process.returncode == -signal.SIGKILL, error
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed-scratch" / "checkpoint").exists()
    with start("there", "2") as process:
        _, log = process.communicate()
    assert process.returncode == 0
    assert re.search(r"resuming from epoch \d+ of 60", log)
    assert "epoch 2/60:" not in log
    assert Model.load(tmp_path / "killed").digest == whole.digest
    assert not (tmp_path / ".killed-scratch").exists()


@pytest.mark.fresh_process
def test_bytes_do_not_depend_on_the_number_of_cores(synthetic_store, refs, tmp_path):
    output = tmp_path / "one_core"
    command = [
        sys.executable,
        "-m",
        "ridgeline.cli",
        "step",
        "train",
        "--examples",
        synthetic_store.path(refs["transform"]),
    ]
    one_core = {min(os.sched_getaffinity(0))}
    subprocess.run(
        [*command, "--output", output],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        preexec_fn=lambda: os.sched_setaffinity(0, one_core),
        capture_output=True,
        check=True,
    )
    assert Model.load(output).digest == synthetic_store.open(refs["train"], Model).digest


@pytest.mark.real_data
def test_seed_model_reaches_the_notebooks_accuracy(fashion_mnist):
    store, refs = fashion_mnist
    facts = store.open(refs["train"], Model).facts
    assert facts.num_parameters == 89_610
    assert facts.metrics["val_accuracy"] == pytest.approx(0.82, abs=0.01)


# --- profiles


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_tuned_replaces_only_what_is_left_out_even_if_it_equals_the_default(network):
    values = NETWORKS[network].tuned
    chosen = {"network": network, "profile": "tuned"}
    seed = train.parse({"network": network}).model_dump(mode="json")
    for name in values:  # each value that the profile would replace
        assert parse(chosen | {name: seed[name]}).model_dump(mode="json")[name] == seed[name]
    params = parse(chosen | {"epochs": 3, "penalty": {"l2": 0.5}})
    assert (params.epochs, params.penalty.kind, params.penalty.l2, params.seed) == (3, "l2", 0.5, 42)
    others = values.keys() - {"epochs", "penalty", network}
    assert {name: getattr(params, name) for name in others} == {name: values[name] for name in others}
    assert train.parse(params.model_dump(mode="json")) == params


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_every_tuned_value_is_a_parameter_that_differs_from_its_default(network):
    chosen = {"network": network}
    tuned = dict(flatten(train.parse(chosen | {"profile": "tuned"}).model_dump()))
    seed = dict(flatten(train.parse(chosen).model_dump()))
    named = dict(flatten(NETWORKS[network].tuned))
    assert {name: tuned[name] for name in named} == named
    assert {name for name in seed if tuned[name] != seed[name]} <= named.keys() | {"profile"}


def tuned_cnn(monkeypatch, tuned):
    monkeypatch.setitem(NETWORKS, "cnn", replace(NETWORKS["cnn"], tuned=tuned))
    return {"network": "cnn", "profile": "tuned"}


def test_an_option_that_is_typed_leaves_the_others_tuned(monkeypatch):
    chosen = tuned_cnn(monkeypatch, {"cnn": {"filters": (4, 8), "dropout": 0.5}})
    assert parse(chosen).options == cnn.Options(filters=(4, 8), dropout=0.5)
    assert parse(chosen | {"cnn": {"dropout": 0.3}}).options == cnn.Options(filters=(4, 8), dropout=0.3)


def test_a_tuned_value_is_left_out_where_a_typed_one_excludes_it(monkeypatch):
    chosen = tuned_cnn(monkeypatch, {"shift": 1, "shift_share": 0.5, "optimizer": "adam", "weight_decay": 0.1})
    assert (parse(chosen).shift_share, parse(chosen).weight_decay) == (0.5, 0.1)
    assert parse(chosen | {"shift": 0}).shift_share == 1.0
    assert parse(chosen | {"optimizer": "sgd"}).weight_decay == 0.0
    chosen = tuned_cnn(monkeypatch, {"momentum": 0.9, "solver": "proximal", "penalty": {"kind": "l1"}})
    assert (parse(chosen).momentum, parse(chosen).solver) == (0.9, "proximal")
    adam = parse(chosen | {"optimizer": "adam"})
    assert (adam.momentum, adam.solver) == (0.0, "subgradient")
    assert parse(chosen | {"penalty": {"kind": "none"}}).solver == "subgradient"
    assert parse(chosen | {"average": 0.9}).solver == "subgradient"
    with pytest.raises(ParameterError, match="momentum: expected 0 with the optimizer adam"):  # a typed one is refused
        parse(chosen | {"optimizer": "adam", "momentum": 0.9})


def test_typed_and_tuned_options_are_validated_together(monkeypatch):
    class Ends(BaseParams):
        first: int = 1
        last: int = 9

        @model_validator(mode="after")
        def _ordered(self):
            if self.first > self.last:
                raise ValueError(f"expected first <= last; received {self.first} > {self.last}")
            return self

    tuned = {"cnn": {"first": 5}}
    monkeypatch.setitem(NETWORKS, "cnn", replace(NETWORKS["cnn"], options=Ends, tuned=tuned))
    other = replace(train, params=create_model("Other", __base__=Params, cnn=(Ends, Ends())))
    chosen = {"network": "cnn", "profile": "tuned"}
    assert other.parse(chosen | {"cnn": {"last": 6}}).model_dump()["cnn"] == {"first": 5, "last": 6}
    message = "train.cnn: expected options that fit the tuned values of the others; received {'last': 4}: .*<= last"
    with pytest.raises(ParameterError, match=message):
        other.parse(chosen | {"cnn": {"last": 4}})


def test_tuned_is_refused_for_a_network_without_tuned_values(monkeypatch):
    message = "Parameter train.profile: expected 'seed' with network='cnn', which has no tuned values; received 'tuned'"
    with pytest.raises(ParameterError, match=message):
        train.parse(tuned_cnn(monkeypatch, {}))


@pytest.mark.parametrize(
    ("tuned", "problem"),
    [
        ({"epoch": 3}, "epoch: expected no such parameter; received 3. Correct `tuned` of its options"),
        ({"penalty": {"kind": "l2", "l3": 0.1}}, "penalty.l3: expected no such parameter; received 0.1."),
        ({"penalty": {"kind": "l2", "l1": 0.1}}, "penalty.l1: expected 0 or the default 0.0001 with kind='l2'"),
        ({"cnn": {"dropout": 1.5}}, "cnn.dropout: expected less than 1; received 1.5."),
        ({"weight_decay": 0.1}, "weight_decay: expected 0 with the optimizer sgd"),
    ],
)
def test_tuned_values_that_do_not_exist_or_do_not_fit_are_named(monkeypatch, tuned, problem):
    message = f"^Parameter train.profile: cannot use the tuned values of network='cnn': {problem}"
    with pytest.raises(ParameterError, match=message):
        train.parse(tuned_cnn(monkeypatch, tuned))


def test_a_value_that_is_typed_for_the_step_alone_counts_even_if_it_equals_the_default(tmp_path):
    taken = []

    def stop(**given):
        taken.append(given["params"])
        raise StepSkipped("far enough")

    alone = replace(train, run=stop, inputs={}, optional={}, resumes=False)
    with pytest.raises(SystemExit, match="far enough"):
        run_step(alone, ["--profile", "tuned", "--epochs", "2", "--output", str(tmp_path / "model")])
    assert (taken[0].epochs, taken[0].batch_size) == (2, NETWORKS["mlp"].tuned["batch_size"])


def warm(examples, champion, output, **values):
    output.mkdir()
    params = train.parse({"mlp": {"hidden_units": [4]}, "epochs": 1, "warm_start": True, **values})
    return train(examples=examples, params=params, output=output, champion=champion)


def test_a_warm_start_begins_with_the_weights_of_the_champion(examples, tmp_path):
    first = run(examples, tmp_path / "first", mlp={"hidden_units": [4]}, epochs=8, seed=1)
    still = {"learning_rate": 1e-12}  # the weights move by less than their precision
    model = warm(examples, Champion(first.digest, first), tmp_path / "warm", **still)
    for weight, start in zip(model.load_keras().weights, first.load_keras().weights, strict=True):
        np.testing.assert_allclose(weight, start, atol=1e-6)
    assert model.facts.started_from == first.digest
    assert warm(examples, Champion(first.digest, first), tmp_path / "again", **still).digest == model.digest
    assert warm(examples, None, tmp_path / "cold").facts.started_from is None


def test_a_warm_start_is_refused_if_shapes_or_classes_differ(examples, tmp_path):
    first = run(examples, tmp_path / "first", mlp={"hidden_units": [4]}, epochs=1)
    with pytest.raises(
        StepError, match=r"weights of the shapes \[\(30, 5\), .*received \[\(30, 4\), .*train.network and its options"
    ):
        warm(examples, Champion(first.digest, first), tmp_path / "a", mlp={"hidden_units": [5]})
    for name, facts in {"class_names": ("top", "middle", "base"), "image_shape": (5, 6)}.items():
        first.facts = first.facts.model_copy(update={name: facts})
        with pytest.raises(StepError, match=f"to have the examples' {name} .*warm_start=false"):
            warm(examples, Champion(first.digest, first), tmp_path / name)
    with pytest.raises(StepError, match=r"it can't be read \(lost\)"):
        warm(examples, Champion(first.digest, None, "lost"), tmp_path / "b")


def test_a_killed_warm_start_does_not_resume_from_another_champion(examples, tmp_path):
    (tmp_path / "scratch").mkdir()
    params = train.parse({"mlp": {"hidden_units": [4]}, "epochs": 2, "warm_start": True})
    for number, message in ((1, None), (2, "belongs to|Expected a checkpoint of")):
        first = run(examples, tmp_path / f"first {number}", mlp={"hidden_units": [4]}, epochs=1, seed=number)
        (tmp_path / f"warm {number}").mkdir()
        arguments = {"output": tmp_path / f"warm {number}", "scratch": tmp_path / "scratch"}
        if message is None:
            train(examples=examples, params=params, champion=Champion(first.digest, first), **arguments)
        else:
            with pytest.raises(CheckpointError, match=message):
                train(examples=examples, params=params, champion=Champion(first.digest, first), **arguments)
