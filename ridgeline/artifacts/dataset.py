"""`Dataset`: what tfds prepared."""

from __future__ import annotations

import re
from pathlib import Path

from ridgeline.artifacts.base import Artifact, Facts, FileEntry

VERSION = re.compile(r":\d+\.\d+\.\d+$")


def served_name(dataset: str) -> str:
    """Return the name in the registry of the models that are trained on a dataset.

    Two datasets may get one name, as ``a/b`` and ``a_b`` do; the registry refuses the second one.

    Args:
        dataset: A dataset's name, as in `DatasetFacts`.

    Example:
        >>> served_name("fashion_mnist:3.0.1"), served_name("emnist/letters:3.1.0"), served_name("digits:mnist:3.0.1")
        ('fashion_mnist', 'emnist_letters', 'digits')
    """
    return dataset.partition(":")[0].replace("/", "_")


def same_dataset(one: str, other: str) -> bool:
    """Return whether two names, as in `DatasetFacts`, are those of one dataset, perhaps in two versions.

    Example:
        >>> same_dataset("emnist/letters:3.0.0", "emnist/letters:3.1.0")
        True
        >>> same_dataset("emnist/letters:3.1.0", "emnist_letters:3.1.0")
        False
        >>> same_dataset("mnist:3.0.1", "mnist:folder")
        False
    """
    return VERSION.sub("", one) == VERSION.sub("", other)


class SplitDigest(Facts):
    """One split as tfds yields it in its stable order.

    Attributes:
        num_examples: Number of examples.
        images_sha256: SHA-256 of all image bytes, uint8, C order, one after another.
        labels_sha256: SHA-256 of all labels as little-endian int64.
    """

    num_examples: int
    images_sha256: str
    labels_sha256: str


class DatasetFacts(Facts):
    """What is known of a prepared dataset.

    Attributes:
        name: tfds name with configuration and version, for example ``fashion_mnist:3.0.1``; after a name of its own
            and a colon, if it was given one: ``digits:mnist:3.0.1``.
        image_shape: Height and width, or height, width and channels if there is more than one.
        class_names: The label names in label order.
        splits: The splits by name.
        raw_files: The downloaded files by name, with their size and SHA-256 as tfds registers and checks them.
        synthetic: Whether the project drew the images itself.
    """

    name: str
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    splits: dict[str, SplitDigest]
    raw_files: dict[str, FileEntry]
    synthetic: bool


class Dataset(Artifact[DatasetFacts]):
    """A dataset prepared by tfds.

    On disk::

        manifest.json
        tfds/<name>/[<config>/]<version>/    dataset_info.json, features.json and the record files, as tfds wrote them
    """

    facts_type = DatasetFacts

    @property
    def builder_dir(self) -> Path:
        """The folder for ``tfds.builder_from_directory``."""
        name, version = self.facts.name.split(":")[-2:]
        return self.path / "tfds" / name / version
