"""Seconds and memory of each step, a process each, on up to 6,000,000 drawn images: a hundred times Fashion-MNIST.

It needs 25 GB of disk in ``RIDGELINE_SCALE_DIR``, by default the folder of temporary files, and an hour. The images are
drawn before, once, each of its own. ``RIDGELINE_SCALE_SIZES="60000 600000"`` measures these numbers of images instead.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import IMAGES_PER_HELD_OUT, VALUES, measure
from benchmarks.steps import row
from components.datasets.synthetic_garments import OUTLINES, SIDE
from ridgeline.settings import Settings

SIZES = "60000 600000 6000000"
IMAGES_PER_TEST = 6
CHUNK = 10_000  # of images, drawn from a seed of their own
NAME = "drawn_images"
STEPS = ("ingest", "transform", "statistics", "schema", "validate", "train", "evaluate", "label_errors", "export")


def register(source: str, size: float) -> None:
    """Register a tfds dataset that yields the first drawn images of a folder.

    Args:
        source: The folder.
        size: How many images; each sixth is a test image.
    """
    import tensorflow_datasets as tfds

    from ridgeline.artifacts.examples import ImageRows

    class DrawnImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 1)),
                "label": tfds.features.ClassLabel(names=list(OUTLINES)),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            num_test = int(size) // IMAGES_PER_TEST
            return {
                "train": self._generate_examples(num_test, int(size)),
                "test": self._generate_examples(0, num_test),
            }

        def _generate_examples(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
            images = ImageRows([(Path(source) / "images", 0, int(size))], (SIDE, SIDE, 1))
            for first in range(start, stop, CHUNK):
                for number, image in enumerate(images.read(first, min(stop, first + CHUNK)), first):
                    yield number, {"image": image, "label": number % len(OUTLINES)}


def draw_images(folder: Path, number: int) -> None:
    """Draw images, one after another into a file, unless they are there.

    Args:
        folder: Receives ``images``.
        number: How many, at least.
    """
    images = folder / "images"
    if images.exists() and images.stat().st_size >= number * SIDE**2:
        return
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool, (folder / "unfinished").open("wb") as file:
        for chunk in pool.map(_chunk, range(-(-number // CHUNK))):
            file.write(chunk)
    (folder / "unfinished").rename(images)


def _chunk(number: int) -> bytes:
    from components.datasets.synthetic_garments import draw

    rng, names = np.random.default_rng(number), list(OUTLINES)
    return np.stack([draw(rng, names[index % len(names)]) for index in range(CHUNK)]).tobytes()


def main(settings: Settings, refs: dict[str, str]) -> None:
    """Print the table.

    Args:
        settings: Not used: the store is one of its own.
        refs: Not used.
    """
    sizes = [int(size) for size in os.environ.get("RIDGELINE_SCALE_SIZES", SIZES).split()]
    with tempfile.TemporaryDirectory(dir=os.environ.get("RIDGELINE_SCALE_DIR")) as folder:
        drawn = Path(os.environ.get("RIDGELINE_SCALE_DIR", folder))
        draw_images(drawn, max(sizes))
        print("\nSeconds, those of processors for a million images, and memory beyond the imports")
        for size in sizes:
            store = Path(folder) / "store"
            held_out = size // IMAGES_PER_HELD_OUT
            values = VALUES | {"ingest.dataset": f"{NAME}:1.0.0", "transform.validation_examples": held_out}
            for name in STEPS:
                found = measure(name, "label_errors", store, values, __name__, drawn, size)
                row(
                    f"{name}, {size:,} images",
                    f"{found.seconds:.1f} s; {found.processor / size * 1e6:.0f} s a million; {found.peak:.0f} MiB",
                )
            shutil.rmtree(store)
