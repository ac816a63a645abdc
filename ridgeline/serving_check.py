"""Checks a SavedModel in a process of its own: ``python -m ridgeline.serving_check SAVED_MODEL CHECK_DIR NAMES``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

TOLERANCE = 1e-5


def main(saved_model: Path, expected: Path, class_names: list[str]) -> None:
    """Compare a SavedModel's answers with the expected probabilities, at several batch sizes.

    Args:
        saved_model: The SavedModel's folder.
        expected: Folder of ``images.npy``, uint8 ``[k, h, w]``, and ``probabilities.npy``, float32 ``[k, classes]``.
        class_names: The classes' names in label order.

    Raises:
        SystemExit: If any answer differs.
    """
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
        if names != [class_names[i] for i in served["class_id"]]:
            raise SystemExit(f"expected class_name to be the name of class_id in {class_names}; received {names}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
