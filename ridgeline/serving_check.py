"""Checks a SavedModel's responses in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ridgeline import quiet_tensorflow

TOLERANCE = 1e-5
TIMEOUT_SECONDS = 300


class ServingError(RuntimeError):
    """A SavedModel can't be loaded, or its responses are wrong."""


def check(saved_model: Path, expected: Path, class_names: Sequence[str]) -> None:
    """Compare a SavedModel's responses with the expected probabilities, in a fresh process.

    Args:
        saved_model: The SavedModel's folder.
        expected: Folder of ``images.npy``, uint8 ``[k, h, w]``, and ``probabilities.npy``, float32 ``[k, classes]``.
        class_names: The classes' names in label order.

    Raises:
        ServingError: If it can't be loaded or any response differs.
    """
    command = [sys.executable, "-P", "-m", "ridgeline.serving_check", str(saved_model), str(expected)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    names = json.dumps(list(class_names))  # read from standard input: a command line has a limited length
    try:
        subprocess.run(
            command,
            env=environment,
            input=names,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=True,
        )
    except subprocess.SubprocessError as error:
        received = str(getattr(error, "stderr", None) or error).strip()[-2000:]
        message = f"Expected {saved_model} to serve the evaluation's predictions; received: {received}."
        raise ServingError(message) from error


def main(saved_model: Path, expected: Path, class_names: list[str]) -> None:
    """Compare a SavedModel's responses with the expected probabilities, in this process, at several batch sizes.

    Args:
        saved_model: The SavedModel's folder.
        expected: Folder of ``images.npy``, uint8 ``[k, h, w]``, and ``probabilities.npy``, float32 ``[k, classes]``.
        class_names: The classes' names in label order.

    Raises:
        SystemExit: If any response differs.
    """
    quiet_tensorflow.install()
    import tensorflow as tf

    images = np.load(expected / "images.npy", allow_pickle=False)
    probabilities = np.load(expected / "probabilities.npy", allow_pickle=False)
    serve = tf.saved_model.load(str(saved_model)).signatures["serving_default"]
    for size in (1, 7, len(images)):
        served = {name: value.numpy() for name, value in serve(images=tf.constant(images[:size])).items()}
        if sorted(served) != ["class_id", "class_name", "probabilities"]:
            raise SystemExit(f"expected class_id, class_name and probabilities; received {sorted(served)}")
        difference = float(np.abs(served["probabilities"] - probabilities[:size]).max())
        if not difference <= TOLERANCE:
            raise SystemExit(f"expected the evaluation's probabilities; received others, by up to {difference}")
        if not np.array_equal(served["class_id"], served["probabilities"].argmax(axis=1)):
            raise SystemExit("expected class_id to be the most probable class; received another")
        names = [name.decode() for name in served["class_name"]]
        right = [class_names[i] for i in served["class_id"]]
        if wrong := [pair for pair in zip(right, names, strict=True) if pair[0] != pair[1]]:
            raise SystemExit(f"expected class_name to be the name of class_id, {wrong[0][0]}; received {wrong[0][1]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.load(sys.stdin))
