"""What a model computes, however its files describe it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ridgeline.artifacts.base import digest_of
from ridgeline.artifacts.model import Model

OF_TRAINING = ("_initializer", "_regularizer", "_constraint")


def function_digest(model: Model) -> str:
    """Return the digest of what a model computes: its layers, its weights, its input and its classes.

    Two trainings with the same result have one digest, also if a library describes it in other words.

    Args:
        model: The model.
    """
    import h5py

    weights = hashlib.sha256()

    def add(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            weights.update(f"{item.dtype.str}{item.shape}".encode())
            weights.update(item[()].tobytes())

    with h5py.File(model.path / "model.weights.h5", "r") as file:
        file.visititems(add)  # in alphabetical order
    facts = model.facts
    return digest_of(
        {
            "layers": _of_predictions(json.loads((model.path / "architecture.json").read_text(encoding="utf-8"))),
            "weights": weights.hexdigest(),
            "image_shape": facts.image_shape,
            "class_names": facts.class_names,
        }
    )


def _of_predictions(value: Any) -> Any:
    """Leave out members of Keras's description that only training uses, and those that are null.

    A new release adds null members for its new options.
    """
    if isinstance(value, dict):
        used = {name: member for name, member in value.items() if not (member is None or name.endswith(OF_TRAINING))}
        return {name: _of_predictions(member) for name, member in used.items()}
    return [_of_predictions(member) for member in value] if isinstance(value, list) else value
