"""`synthetic_garments`: a small image set that the project draws itself, with Fashion-MNIST's shapes and classes.

It replaces the real data where that is unavailable: in unit tests and, clearly marked, in `make run`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

NUM_TRAIN = 6_000
NUM_TEST = 1_000
SIDE = 28

# Each class's outlines as polygons, in SVG's notation, in a 28×28 square; Fashion-MNIST's names and order.
OUTLINES = {
    "T-shirt/top": ["9,5 19,5 26,10 23,14 19,12 19,23 9,23 9,12 5,14 2,10"],
    "Trouser": ["9,3 19,3 20,25 16,25 14,9 12,25 8,25"],
    "Pullover": ["9,5 19,5 25,9 26,22 22,22 20,13 20,23 8,23 8,13 6,22 2,22 3,9"],
    "Dress": ["11,3 17,3 16,11 22,25 6,25 12,11"],
    "Coat": ["8,3 13,3 13,26 7,26 6,12 2,24 1,20 4,6", "15,3 20,3 24,6 27,20 26,24 22,12 21,26 15,26"],
    "Sandal": ["2,21 26,17 26,19 2,24", "5,21 11,11 13,12 8,21", "15,19 20,12 22,13 18,19"],
    "Shirt": ["10,3 14,6 18,3 24,7 25,16 21,16 20,11 20,25 8,25 8,11 7,16 3,16 4,7"],
    "Sneaker": ["2,16 9,15 15,11 19,14 26,17 26,21 2,21"],
    "Bag": ["3,11 8,11 10,5 18,5 20,11 25,11 25,23 3,23"],
    "Ankle boot": ["10,3 19,3 19,14 26,19 26,24 4,24 8,14"],
}


def draw(rng: np.random.Generator, class_name: str) -> np.ndarray:
    """Draw one image: the class's outline, shifted, scaled, shaded and noisy.

    Args:
        rng: Source of all randomness.
        class_name: A key of `OUTLINES`.

    Returns:
        Image, uint8 ``[28, 28, 1]``.
    """
    scale, shift = rng.uniform(0.8, 1.05, 2), rng.uniform(-2.5, 2.5, 2)
    picture = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(picture)
    for outline in OUTLINES[class_name]:
        corners = np.array([[int(x) for x in corner.split(",")] for corner in outline.split()])
        points = (corners - SIDE / 2) * scale + SIDE / 2 + shift
        pen.polygon([(float(x), float(y)) for x, y in points], fill=int(rng.integers(110, 250)))
    noisy = np.asarray(picture, np.float64) * rng.uniform(0.6, 1.0, (SIDE, SIDE)) + rng.normal(0, 12, (SIDE, SIDE))
    return np.clip(noisy, 0, 255).astype(np.uint8)[..., np.newaxis]


class SyntheticGarments(tfds.core.GeneratorBasedBuilder):
    """Drawn garments: 6,000 training and 1,000 test images of ten classes, 28×28 grayscale."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Garment outlines drawn by Ridgeline; not real data.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 1)),
                    "label": tfds.features.ClassLabel(names=list(OUTLINES)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples(0, NUM_TRAIN), "test": self._generate_examples(1, NUM_TEST)}

    def _generate_examples(self, seed: int, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        rng = np.random.default_rng(seed)
        for index in range(count):
            name = list(OUTLINES)[int(rng.integers(len(OUTLINES)))]
            yield index, {"image": draw(rng, name), "label": name}
