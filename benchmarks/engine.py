"""The training engine against the notebook's own code, a hand-written NumPy loop and the BLAS limit."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.steps import ROOT, environment, python, row
from components.training.engine import row_order
from components.training.fit import fit, make_engine
from components.training.network import build_model
from components.training.params import Params
from ridgeline.artifacts.examples import Examples, Split
from ridgeline.component import STEP_ENVIRONMENT
from ridgeline.settings import Settings

ROUNDS = 5
SEEDS = (1, 2, 3)
CNN = Params.model_validate({"network": "cnn", "epochs": 3, "penalty": {"kind": "l2", "l2": 1e-4}})

CONTESTANT = """
import json, sys, time
from pathlib import Path
from benchmarks.engine import CONTESTANTS
from ridgeline.artifacts.examples import Examples
epoch = CONTESTANTS[sys.argv[1]](Examples.load(Path(sys.argv[2])))
for line in sys.stdin:
    start = time.perf_counter()
    epoch(int(line))
    print(time.perf_counter() - start, flush=True)
"""
FIT = """
import json, sys, time
from pathlib import Path
from ridgeline import quiet_tensorflow
quiet_tensorflow.install()
import keras, tensorflow
from benchmarks.engine import FITS
from ridgeline.artifacts.examples import Examples
fit = FITS[sys.argv[1]](Examples.load(Path(sys.argv[2])))
start = time.perf_counter()
fit()
print(json.dumps(time.perf_counter() - start))
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    path = settings.open_store().path(refs["transform"])
    examples, params = Examples.load(path), Params()
    seconds = in_turns(path, [name for name in CONTESTANTS if name not in CNN_CONTESTANTS])
    engine_seconds = seconds["engine"]
    print(f"\nAn epoch of the seed model with validation: the best of {ROUNDS}, taken in turns, a process each")
    row("notebook: model.fit, float64, batch 32", f"{seconds['notebook']:.2f} s")
    row("model.fit, uint8, steps_per_execution=400", f"{seconds['fit']:.2f} s")
    row("engine without XLA, one thread", f"{seconds['plain']:.2f} s")
    row("engine, one thread", f"{engine_seconds:.2f} s")
    row("NumPy loop, one thread", f"{seconds['numpy']:.2f} s")
    row("BLAS limit: products of the same FLOPs, one thread", f"{seconds['blas']:.2f} s")
    row("notebook / engine", f"{seconds['notebook'] / engine_seconds:.1f}", ">= 5")
    row("engine / NumPy loop", f"{engine_seconds / seconds['numpy']:.2f}", "<= 1.2")
    row("engine / BLAS limit", f"{engine_seconds / seconds['blas']:.2f}", "<= 1.7")

    print(f"\nThe seed's training of 2 epochs with its compilation: medians of {ROUNDS} rounds, a new process each")
    fitted: dict[str, list[float]] = {"notebook": [], "engine": []}
    for _ in range(ROUNDS):
        for name, seen in fitted.items():
            seen.append(python(FIT, name, str(path)))
    for name, seen in fitted.items():
        row(f"{name}", f"{statistics.median(seen):.2f} s ({min(seen):.2f} to {max(seen):.2f})")
    ratio = statistics.median(fitted["notebook"]) / statistics.median(fitted["engine"])
    row("notebook / engine", f"{ratio:.1f}", ">= 4")

    print(f"\nValidation accuracy after the seed's 2 epochs, {len(SEEDS)} seeds: mean and range")
    notebooks = []
    for seed in SEEDS:
        train_epoch = notebook(examples, seed, ordered=True)
        notebooks.append([train_epoch(epoch) for epoch in (1, 2)][-1])
    engine = make_engine(examples, params)
    fits = [fit(engine, params.model_copy(update={"seed": seed})) for seed in SEEDS]
    accuracies = [result.metrics["val_accuracy"] for result in fits]
    row("notebook, given the engine's order of images", _spread(notebooks))
    row("engine", _spread(accuracies))
    difference = statistics.mean(accuracies) - statistics.mean(notebooks)
    row("  difference", f"{difference:+.4f}", "+-0.005")


def cnn(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table of the convolutional network.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    path = settings.open_store().path(refs["transform"])
    examples, seconds = Examples.load(path), in_turns(path, CNN_CONTESTANTS)
    print(f"\nAn epoch of the network cnn with validation: the best of {ROUNDS}, taken in turns, a process each")
    row("model.fit, uint8, batch 32", f"{seconds['cnn fit']:.2f} s")
    row("engine, one thread", f"{seconds['cnn']:.2f} s")
    row("model.fit / engine", f"{seconds['cnn fit'] / seconds['cnn']:.2f}", ">= 1.3")

    print(f"\nValidation accuracy of cnn after {CNN.epochs} epochs, {len(SEEDS)} seeds: mean and range")
    fits = []
    for seed in SEEDS:
        train_epoch = keras_fit(examples, CNN, seed)
        fits.append([train_epoch(epoch).history["val_accuracy"][-1] for epoch in range(CNN.epochs)][-1])
    engine = make_engine(examples, CNN)
    own_fits = [fit(engine, CNN.model_copy(update={"seed": seed})).metrics["val_accuracy"] for seed in SEEDS]
    row("model.fit", _spread(fits))
    row("engine", _spread(own_fits))
    row("  difference", f"{statistics.mean(own_fits) - statistics.mean(fits):+.4f}", "+-0.005")


def in_turns(examples: Path, names: Sequence[str]) -> dict[str, float]:
    """Return each contestant's shortest epoch over several rounds; in a round, each runs one epoch."""
    best = dict.fromkeys(names, float("inf"))
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", CONTESTANT, name, str(examples)],
                    cwd=ROOT,
                    env=environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            for name in names
        }
        for number in range(ROUNDS + 1):  # the first warms up
            for name, process in processes.items():
                assert process.stdin is not None
                assert process.stdout is not None
                print(number, file=process.stdin, flush=True)
                seconds = float(process.stdout.readline())
                if number:
                    best[name] = min(best[name], seconds)
    return best


def notebook(examples: Examples, seed: int, ordered: bool = False) -> Callable[[int], float]:
    """Return the notebook's own training of one epoch, numbered from 1, which returns the validation accuracy.

    Args:
        examples: The splits.
        seed: Of the initial weights, and of the order of images.
        ordered: Whether images come in the engine's order, not Keras's. After two epochs, accuracy varies by 0.02
            with the order alone, so a difference of 0.005 is visible only with equal orders.
    """
    import keras

    keras.utils.set_random_seed(seed)
    split, validation = examples.split("train"), examples.split("validation")
    images, valid_images = split.images / 255.0, validation.images / 255.0
    regularizer = keras.regularizers.l2(0.01)
    dense = functools.partial(keras.layers.Dense, kernel_regularizer=regularizer)
    model = keras.models.Sequential(
        [
            keras.layers.Input(examples.facts.image_shape),
            keras.layers.Flatten(),
            dense(100, activation="relu", kernel_initializer="he_normal"),
            dense(100, activation="relu", kernel_initializer="he_normal"),
            dense(len(examples.facts.class_names), activation="softmax"),
        ]
    )
    model.compile(
        loss="sparse_categorical_crossentropy",
        optimizer=keras.optimizers.SGD(learning_rate=0.02),
        metrics=["accuracy"],
    )

    def epoch(number: int) -> float:
        order = row_order(seed, number, 0, len(split)) if ordered else slice(None)
        history = model.fit(
            images[order],
            split.labels[order],
            shuffle=not ordered,
            validation_data=(valid_images, validation.labels),
            verbose=0,
        )
        return history.history["val_accuracy"][-1]

    return epoch


def keras_fit(examples: Examples, params: Params, seed: int = 0, steps_per_execution: int = 1) -> Callable[[int], Any]:
    """Return an epoch of ``model.fit`` on resident uint8 images."""
    import keras

    keras.utils.set_random_seed(seed)
    model = build_model(examples, params)
    model.compile(
        keras.optimizers.SGD(params.learning_rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
    )
    split, validation = examples.split("train"), examples.split("validation")
    data, valid = (split.images, split.labels), (validation.images, validation.labels)
    return lambda number: model.fit(*data, batch_size=32, validation_data=valid, verbose=0)


def own(examples: Examples, params: Params, xla: bool = True) -> Callable[[int], Any]:
    """Return an epoch of the engine, in the environment of a step."""
    os.environ.update(STEP_ENVIRONMENT)

    engine = make_engine(examples, params)
    engine._rate.base.assign(params.learning_rate)
    if not xla:
        engine._by_xla = False
        engine._advance = engine._compiled()
    return lambda number: engine._epoch(0, number, ROUNDS, "") and engine._validate()


def seed_fit(examples: Examples) -> Callable[[], Any]:
    """Return the seed's training of 2 epochs, in the environment of a step."""
    os.environ.update(STEP_ENVIRONMENT)
    return lambda: fit(make_engine(examples, Params()), Params())


def notebook_fit(examples: Examples) -> Callable[[], Any]:
    """Return the notebook's training of 2 epochs."""
    epoch = notebook(examples, 42)
    return lambda: [epoch(number) for number in (1, 2)]


def numpy_loop(examples: Examples, params: Params) -> Callable[[int], float]:
    """Return an epoch of the seed model in NumPy, float32, on one BLAS thread: the practical limit.

    It allocates nothing in the loop, and the learning rate is a factor of the output's gradient, not of each kernel's.
    More threads make these small products slower. The epoch returns the validation accuracy.
    """
    rng = np.random.default_rng(0)
    units = [int(np.prod(examples.facts.image_shape)), *params.options.hidden_units, len(examples.facts.class_names)]
    shapes = list(itertools.pairwise(units))
    kernels = [rng.normal(0, np.sqrt(2 / shape[0]), shape).astype(np.float32) for shape in shapes]
    biases = [np.zeros(outputs, np.float32) for outputs in units[1:]]
    gradients, bias_gradients = ([np.empty_like(value) for value in values] for values in (kernels, biases))
    rate, l2 = np.float32(params.learning_rate), np.float32(params.penalty.strengths["l2"])

    def read(split: Split) -> tuple[np.ndarray, np.ndarray]:
        return np.array(split.images).reshape(len(split), -1), np.array(split.labels)

    def buffers(rows: int) -> list[np.ndarray]:
        return [np.empty((rows, size), np.float32) for size in units]

    def forward(batch: np.ndarray, layers: list[np.ndarray]) -> None:
        np.multiply(batch, np.float32(1 / 255), out=layers[0])
        for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True), start=1):
            np.matmul(layers[i - 1], kernel, out=layers[i])
            layers[i] += bias
            if i < len(kernels):
                np.maximum(layers[i], 0, out=layers[i])

    (images, labels), (valid_images, valid_labels) = read(examples.split("train")), read(examples.split("validation"))

    def epoch(number: int) -> float:
        order, loss, hits = np.random.default_rng(number).permutation(len(images)), 0.0, 0
        by_size = {rows: (buffers(rows), buffers(rows)) for rows in {params.batch_size, len(order) % params.batch_size}}
        for start in range(0, len(order), params.batch_size):
            rows = order[start : start + params.batch_size]
            layers, deltas = by_size[len(rows)]
            forward(images[rows], layers)
            logits, delta = layers[-1], deltas[-1]
            right = (np.arange(len(rows)), labels[rows])
            hits += int(np.sum(logits.argmax(1) == right[1]))
            logits -= logits.max(1, keepdims=True)
            np.exp(logits, out=delta)
            delta /= delta.sum(1, keepdims=True)
            loss -= float(np.log(delta[right]).sum())
            loss += len(rows) * float(l2) * sum(float(np.vdot(kernel, kernel)) for kernel in kernels)
            delta[right] -= 1
            delta *= rate / np.float32(len(rows))
            for i in reversed(range(len(kernels))):
                np.matmul(layers[i].T, deltas[i + 1], out=gradients[i])
                np.sum(deltas[i + 1], axis=0, out=bias_gradients[i])
                if i:
                    np.matmul(deltas[i + 1], kernels[i].T, out=deltas[i])
                    deltas[i] *= layers[i] > 0
                kernels[i] *= 1 - 2 * rate * l2
                kernels[i] -= gradients[i]
                biases[i] -= bias_gradients[i]
        layers = buffers(len(valid_images))
        forward(valid_images, layers)
        return float(np.mean(layers[-1].argmax(1) == valid_labels))

    def limited(number: int) -> float:
        with threadpool_limits(1):
            return epoch(number)

    return limited


def blas_products(examples: Examples, params: Params) -> Callable[[int], None]:
    """Return the large float32 products, on one thread, that have the FLOPs of an epoch's products.

    Those are, for each kernel, the forward product, the kernel's gradient and the input's gradient, which the first
    layer has not.
    """
    units = [int(np.prod(examples.facts.image_shape)), *params.options.hidden_units, len(examples.facts.class_names)]
    products = [inputs * outputs for inputs, outputs in itertools.pairwise(units)]
    flops = 2 * (3 * sum(products) - products[0]) * examples.facts.num_examples["train"]
    side = round((flops / 2) ** (1 / 3))  # one product; its result and its factors are of this side
    matrix = np.random.default_rng(0).random((side, side), np.float32)
    result = np.empty_like(matrix)

    def epoch(number: int) -> None:
        with threadpool_limits(1):
            np.matmul(matrix, matrix, out=result)

    return epoch


CONTESTANTS: dict[str, Callable[[Examples], Callable[[int], Any]]] = {
    "notebook": lambda examples: notebook(examples, 0),
    "fit": lambda examples: keras_fit(examples, Params(), steps_per_execution=400),
    "plain": lambda examples: own(examples, Params(), xla=False),
    "engine": lambda examples: own(examples, Params()),
    "numpy": lambda examples: numpy_loop(examples, Params()),
    "blas": lambda examples: blas_products(examples, Params()),
    "cnn fit": lambda examples: keras_fit(examples, CNN),
    "cnn": lambda examples: own(examples, CNN),
}
CNN_CONTESTANTS = ("cnn fit", "cnn")
FITS = {"notebook": notebook_fit, "engine": seed_fit}


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
