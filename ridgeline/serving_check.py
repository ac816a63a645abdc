"""Checks a SavedModel's responses in a fresh process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ridgeline import fresh_process
from ridgeline.fresh_process import FreshProcessError

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
    arguments = str(saved_model), str(expected), list(class_names)
    try:
        fresh_process.call(main, *arguments, timeout_seconds=TIMEOUT_SECONDS)
    except FreshProcessError as error:
        message = f"Expected {saved_model} to serve the evaluation's predictions; received: {error}."
        raise ServingError(message) from error


def main(saved_model: str | Path, expected: str | Path, class_names: list[str]) -> None:
    """Compare a SavedModel's responses with the expected probabilities, in this process, at several batch sizes.

    Args:
        saved_model: The SavedModel's folder.
        expected: Folder of ``images.npy``, uint8 ``[k, h, w]``, and ``probabilities.npy``, float32 ``[k, classes]``.
        class_names: The classes' names in label order.

    Raises:
        SystemExit: If any response differs.
    """
    import tensorflow as tf

    images = np.load(Path(expected) / "images.npy", allow_pickle=False)
    probabilities = np.load(Path(expected) / "probabilities.npy", allow_pickle=False)
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
