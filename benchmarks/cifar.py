"""A folder of colour photos: `cnn` through the pipeline beside a plain ``model.fit`` of the same model and time.

Set RIDGELINE_BENCH_IMAGES to CIFAR-10 as a folder of JPEGs, and keep the machine idle: each training takes `SECONDS`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.images import FOLDER
from benchmarks.steps import python, row
from ridgeline import pipeline
from ridgeline.artifacts.model import Model
from ridgeline.artifacts.model_evaluation import ModelEvaluation
from ridgeline.settings import Settings

SECONDS = 900
VALUES = {"ingest.dataset": "folder", "ingest.name": "cifar10", "train.network": "cnn", "train.profile": "tuned"}
CLASSES_OF_ANY_QUALITY = {"evaluate.min_accuracy": 0.0, "evaluate.min_class_recall": 0.0}

FIT = """
import json, sys, time
from pathlib import Path
import keras
from components.training.network import build_model
from components.training.params import Params
from ridgeline.artifacts.examples import Examples
examples, options, end = Examples.load(Path(sys.argv[1])), json.loads(sys.argv[2]), float(sys.argv[3])
params = Params.model_validate({"network": "cnn", "cnn": options, "penalty": {"kind": "none"}})
keras.utils.set_random_seed(1)
model = build_model(examples, params)
model.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
train, test = (examples.split(name) for name in ("train", "test"))
images, labels, start, epochs = train.images, train.labels, time.monotonic(), 0
while time.monotonic() - start < end:
    model.fit(images, labels, batch_size=128, verbose=0)
    epochs += 1
accuracy = model.evaluate(test.images, test.labels, batch_size=1000, verbose=0)[1]
print(json.dumps({"seconds": time.monotonic() - start, "epochs": epochs, "accuracy": accuracy}))
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store.
        refs: Not used.
    """
    print(f"\nPhotos: {SECONDS} s of training")
    if FOLDER not in os.environ:
        row("data", f"none: set {FOLDER}")
        return
    given = VALUES | CLASSES_OF_ANY_QUALITY | {"ingest.image_dir": str(Path(os.environ[FOLDER]).absolute())}
    store, plan, outputs, seconds = settings.open_store(), pipeline.plan("evaluate"), {}, {}

    def run(epochs: int) -> None:
        params = pipeline.parse_params(plan, given | {"train.epochs": epochs}, settings)
        for result in pipeline.run(settings, plan, params, f"cifar-{epochs}"):
            outputs[result.execution.component] = result.execution.output or ""
            seconds[result.execution.component] = result.execution.seconds

    times = []
    for epochs in (1, 3):
        run(epochs)
        times.append(seconds["train"])
    epoch = (times[1] - times[0]) / 2
    epochs = int((SECONDS - times[0]) / epoch) + 1
    run(epochs)
    accuracy = store.open(outputs["evaluate"], ModelEvaluation).facts.accuracy
    row("test accuracy, profile tuned", f"{accuracy:.4f}, {epochs} epochs in {seconds['train']:.0f} s")
    options = store.open(outputs["train"], Model).facts.params["cnn"]
    plain = python(FIT, str(store.path(outputs["transform"])), json.dumps(options), str(SECONDS))
    row("  plain model.fit", f"{plain['accuracy']:.4f}, {plain['epochs']} epochs in {plain['seconds']:.0f} s")
