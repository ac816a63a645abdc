"""`ExampleStatistics`: what the images of each split look like, and which images occur more than once."""

from __future__ import annotations

import numpy as np

from ridgeline.artifacts.base import Artifact, Facts
from ridgeline.artifacts.examples import SPLITS


class Place(Facts):
    """Where an image is.

    Attributes:
        split: Name of the split.
        row: Its row there, from 0.
        label: Its label.
    """

    split: str
    row: int
    label: int


class Copies(Facts):
    """Images that occur more than once, as a count and a few examples.

    Attributes:
        count: Number of images (of groups, for images with several labels).
        groups: At most 20 groups of at most 4 images that are equal, or nearly equal.
    """

    count: int
    groups: tuple[tuple[Place, ...], ...]


class SplitStatistics(Facts):
    """Statistics of one split.

    Attributes:
        num_examples: Number of images.
        class_counts: Number of images of each class, in label order.
        num_repeated: Number of images that equal an earlier image of the split.
        num_constant: Number of nearly constant images.
    """

    num_examples: int
    class_counts: tuple[int, ...]
    num_repeated: int
    num_constant: int


class ExampleStatisticsFacts(Facts):
    """What is known of the examples' images.

    Attributes:
        dataset: tfds name and version.
        examples_digest: Digest of the examples.
        image_shape: ``(h, w)`` or ``(h, w, c)``.
        class_names: The label names in label order.
        splits: Statistics by split.
        leaked: By split, its images that equal one of the training split; for ``test``, of the validation split, too.
        conflicting: Groups of equal images that have more than one label.
        near_duplicates: Images that are nearly equal to another one, equal ones left out.
        near_conflicting: Nearly equal images that have another label than the one that they resemble.
        constant: The nearly constant images.
        synthetic: Whether the project drew the images itself.
    """

    dataset: str
    examples_digest: str
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    splits: dict[str, SplitStatistics]
    leaked: dict[str, Copies]
    conflicting: Copies
    near_duplicates: Copies
    near_conflicting: Copies
    constant: Copies
    synthetic: bool

    @property
    def model_name(self) -> str:
        """The name that the registry serves a model of this dataset by."""
        return self.dataset.split(":")[0].replace("/", "_")


class ExampleStatistics(Artifact[ExampleStatisticsFacts]):
    """Statistics of examples.

    On disk, with the splits in the order of `SPLITS`::

        pixels.npy        int64 [splits, channels, 256]: number of pixels by value
        brightness.npy    int64 [splits, 256]: number of images by mean pixel value, rounded down
        contrast.npy      int64 [splits, 128]: number of images by the standard deviation of their pixels, rounded down
        mean.npy          float32 [splits, *image_shape]: the mean image
        deviation.npy     float32 [splits, *image_shape]: the standard deviation of each pixel
    """

    facts_type = ExampleStatisticsFacts

    def array(self, name: str, split: str) -> np.ndarray:
        """Return one split's part of a file, memory-mapped.

        Args:
            name: ``pixels``, ``brightness``, ``contrast``, ``mean`` or ``deviation``.
            split: Name of the split.
        """
        whole = np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        part: np.ndarray = whole[[str(name) for name in SPLITS].index(split)]
        return part

    def distributions(self, split: str) -> dict[str, np.ndarray]:
        """Return the counts of a split's brightness, contrast and pixels, by channel if there are several.

        Args:
            split: Name of the split.
        """
        channels = self.array("pixels", split)
        names = ("red", "green", "blue") if len(channels) == 3 else range(1, len(channels) + 1)
        pixels = {f"pixels ({name})": counts for name, counts in zip(names, channels, strict=True)}
        both = {name: self.array(name, split) for name in ("brightness", "contrast")}
        return both | (pixels if len(channels) > 1 else {"pixels": channels[0]})

    def mean(self, name: str, split: str) -> float:
        """Return the mean of a distribution, in pixel values; 0 for an empty split.

        Args:
            name: ``brightness`` or ``contrast``.
            split: Name of the split.
        """
        counts = self.array(name, split)
        total = int(counts.sum())
        return float(counts @ np.arange(len(counts)) / total) + 0.5 if total else 0.0
