"""What compaction of a sparse model saves: weights, multiply-adds, and latency of the exported SavedModel."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.steps import python, row
from benchmarks.sweep import SPARSE_TRAINING
from ridgeline.latency import BATCHES, ROUNDS, measure
from ridgeline.settings import Settings

SPARSE = {"penalty": {"kind": "l1", "l1": 2e-4}, "solver": "proximal", **SPARSE_TRAINING}
CNN = {
    "network": "cnn",
    "penalty": {"kind": "group", "group": 2e-3},
    "solver": "proximal",
    "batch_size": 128,
    "epochs": 3,
    "learning_rate": 0.05,
    "momentum": 0.9,
    "schedule": "cosine",
}

EXPORT = """
import json, sys, tempfile
from pathlib import Path
import numpy as np
from components.export import save
from components.train import train
from ridgeline.artifacts.examples import Examples
NO_PENALTY = {"penalty": {"kind": "none"}, "solver": "subgradient"}
examples, values, folder = Examples.load(Path(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[3])
for name in ("dense", "model"):
    (folder / name).mkdir()
dense = train(examples=examples, params=train.parse(values | NO_PENALTY), output=folder / "dense")
model = train(examples=examples, params=train.parse(values), output=folder / "model")
save(model.path, folder / "trained")
sizes = save(model.path, folder / "compact", compact=True)
np.save(folder / "images.npy", examples.split("test").images)
sparsity = model.facts.sparsity
zeros = sum(layer.num_zeros for layer in sparsity) / sum(layer.num_weights for layer in sparsity)
accuracy, without = (trained.facts.metrics["val_accuracy"] for trained in (model, dense))
facts = {"zeros": zeros, "accuracy": accuracy, "accuracy without": without}
print(json.dumps({name: size.model_dump() for name, size in sizes.items()} | facts))
"""
COMPARE = """
import json, sys
from pathlib import Path
import numpy as np
import tensorflow as tf
folder = Path(sys.argv[1])
images = np.load(folder / "images.npy")
models = {name: tf.saved_model.load(str(folder / name)) for name in ("trained", "compact")}
serve = {name: model.signatures["serving_default"] for name, model in models.items()}
parts = [tf.constant(part) for part in np.array_split(images, 10)]
answers = {name: np.concatenate([call(images=part)["probabilities"] for part in parts]) for name, call in serve.items()}
print(json.dumps(float(np.abs(answers["trained"] - answers["compact"]).max())))
"""


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Locate the store of a pipeline run.
        refs: Store-relative name of each artifact, by step.
    """
    examples = str(settings.open_store().path(refs["transform"]))
    for values in (SPARSE, CNN):
        _print(examples, values)


def _print(examples: str, values: dict[str, Any]) -> None:
    """Train, save and time one network with and without compaction; print its part of the table."""
    with tempfile.TemporaryDirectory() as folder:
        made = python(EXPORT, examples, json.dumps(values), folder)
        difference = python(COMPARE, folder)
        models = {name: Path(folder) / name for name in ("trained", "compact")}
        latency = measure(models, Path(folder) / "images.npy")
    network, penalty = values.get("network", "mlp"), values["penalty"]
    strength = f"{penalty['kind']}={penalty[penalty['kind']]}"
    print(f"\nCompaction of {network}, trained with {strength}; latency: median of {ROUNDS} rounds, in turns")
    before, after = made.get("trained_size", made["size"]), made["size"]
    goals = {"zeros": ">= 80 %", "loss": "<= 0.01", "left": "<= 45 %", "faster": ">= 1.5"} if network == "mlp" else {}
    row("weights that are zero", f"{100 * made['zeros']:.1f} %", goals.get("zeros", ""))
    row("validation accuracy", f"{made['accuracy']:.4f}")
    less = f"{made['accuracy without'] - made['accuracy']:.4f}"
    row("  less than without a penalty", less, goals.get("loss", ""))
    for name, title in (("num_weights", "weights"), ("num_multiply_adds", "multiply-adds an image")):
        goal = goals.get("left", "") if name == "num_multiply_adds" else ""
        left = f"{after[name]:,} of {before[name]:,}, {100 * after[name] / before[name]:.1f} %"
        row(f"{title} after compaction", left, goal)
    row("size of the weights", f"{after['num_bytes'] / 2**20:.3f} of {before['num_bytes'] / 2**20:.3f} MiB")
    row("largest difference of a probability", f"{difference:.1e}", "<= 1e-5")
    for batch in BATCHES:
        times = {name: 1e3 * latency[name][batch] for name in models}
        row(f"latency at batch {batch:,}, as trained", f"{times['trained']:.3f} ms")
        faster = f"{times['compact']:.3f} ms, {times['trained'] / times['compact']:.2f} times faster"
        row("  after compaction", faster, goals.get("faster", "") if batch == 1_000 else "")
