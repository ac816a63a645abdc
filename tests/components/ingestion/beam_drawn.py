"""Three tfds datasets of the same examples: one that yields them, a Beam dataset, and one of both kinds.

Beam's workers import this module by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

SIZES = {"train": 600, "test": 60}


def example(number: int, split: str) -> tuple[int, dict[str, Any]]:
    rng = np.random.default_rng([len(split), number])
    return number, {"image": rng.integers(0, 256, (5, 4, 3), np.uint8), "label": number % 3}


def info(builder: Any) -> tfds.core.DatasetInfo:
    features = {"image": tfds.features.Image(shape=(5, 4, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
    return builder.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))


def transform(split: str) -> Any:
    beam = tfds.core.lazy_imports.apache_beam
    return beam.Create(range(SIZES[split])) | beam.Reshuffle() | beam.Map(example, split)


class DrawnOneByOne(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    _info = info

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        return (example(number, split) for number in range(SIZES[split]))


class DrawnByBeam(tfds.core.BeamBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    _info = info

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split: str) -> Any:
        return transform(split)


class DrawnByBoth(DrawnOneByOne):
    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": transform("train"), "test": self._generate_examples("test")}
