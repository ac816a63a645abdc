"""Measures how fast SavedModels answer, in turns, in a fresh process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ridgeline import quiet_tensorflow
from ridgeline.serving_check import ServingError

BATCHES = {1: 200, 1_000: 5}  # calls in a round
ROUNDS = 31


def measure(models: Mapping[str, Path], images: Path) -> dict[str, dict[int, float]]:
    """Return each model's seconds for a call, by batch size: the median of `ROUNDS` rounds.

    In each round, every model is called. So what else the machine does meanwhile affects all of them.

    Args:
        models: The folder of each SavedModel, by name.
        images: A file of images, uint8 ``[k, ...]``; they are repeated as needed.

    Raises:
        ServingError: If a model can't be loaded or called.
    """
    command = [sys.executable, "-P", "-m", "ridgeline.latency", str(images)]
    folders = json.dumps({name: str(folder) for name, folder in models.items()})
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, input=folders, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServingError(f"Cannot measure {', '.join(map(str, models.values()))}: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: {int(batch): seconds for batch, seconds in times.items()} for name, times in found.items()}


def main(folders: Mapping[str, str], images: Path) -> dict[str, dict[int, float]]:
    """Do what `measure` does, in this process.

    Args:
        folders: The folder of each SavedModel, by name.
        images: A file of images.
    """
    quiet_tensorflow.install()
    import tensorflow as tf

    few = np.load(images, allow_pickle=False)
    models = {name: tf.saved_model.load(folder) for name, folder in folders.items()}
    found: dict[str, dict[int, float]] = {name: {} for name in models}
    for batch, calls in BATCHES.items():
        given = tf.constant(np.resize(few, (batch, *few.shape[1:])))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for number in range(ROUNDS + 1):
            for name, model in models.items():
                start = time.perf_counter()
                for _ in range(calls if number else 1):  # the first round warms up
                    model.signatures["serving_default"](images=given)["probabilities"].numpy()
                seconds[name].append((time.perf_counter() - start) / calls)
        for name, times in seconds.items():
            found[name][batch] = statistics.median(times[1:])
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin), Path(sys.argv[1]))))
