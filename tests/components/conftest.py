"""Small images that a step learns from quickly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ridgeline.artifacts.dataset import Dataset, DatasetFacts, write_dataset_split
from ridgeline.artifacts.examples import Examples, ExamplesFacts, Normalization, write_split


def make_bars(folder: Path, sizes: dict[str, int], noise: int = 90, max_shard_bytes: int = 10**9) -> Examples:
    """Return separable images, uint8 ``[n, 6, 5]``: each of three classes brightens its own rows."""
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        labels = rng.integers(0, 3, size)
        images = rng.integers(0, noise, (size, 6, 5), dtype=np.uint8)
        for i, label in enumerate(labels):
            images[i, 2 * label : 2 * label + 2] += 120
        write_split(folder / name, [(images, labels)], size, (6, 5), max_shard_bytes)
    return Examples.seal(
        folder,
        ExamplesFacts(
            dataset="bars:1.0.0",
            image_shape=(6, 5),
            class_names=("top", "middle", "bottom"),
            num_examples=sizes,
            normalization=Normalization(kind="standard", mean=60.0, deviation=50.0),
            synthetic=True,
        ),
    )


@pytest.fixture(scope="session")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """640 training, 64 validation and 64 test images."""
    return make_bars(tmp_path_factory.mktemp("bars"), {"train": 640, "validation": 64, "test": 64})


def make_dataset(
    folder: Path, train: np.ndarray, test: np.ndarray, names: tuple[str, ...] = ("a", "b", "c")
) -> Dataset:
    """Return a dataset of random images, uint8 ``[n, 4, 3]``, with given labels."""
    rng = np.random.default_rng(0)
    splits = {}
    for name, labels in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (len(labels), 4, 3), np.uint8)
        splits[name] = write_dataset_split(folder / name, [(images, labels)], len(labels), (4, 3), len(names))
    facts = DatasetFacts(
        name="drawn:1.0.0", image_shape=(4, 3), class_names=names, splits=splits, raw_files={}, synthetic=True
    )
    return Dataset.seal(folder, facts)
