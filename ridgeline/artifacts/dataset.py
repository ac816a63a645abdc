"""`Dataset`: images of one size and their labels, as they came from tfds or a folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from ridgeline.artifacts.base import Artifact, Facts, FileEntry
from ridgeline.artifacts.examples import TEST, TRAIN, VALIDATION, Examples, Split, held_out, write_split
from ridgeline.preparation import MAX_IMAGE_PIXELS, Resampling

FILES = "files.json"
BATCH_SIZE = 1_000  # of files, whose lines are read and written together

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


class LabelError(ValueError):
    """A label is no number of a class."""


class SplitDigest(Facts):
    """One split, in its stable order.

    Attributes:
        num_examples: Number of examples.
        images_sha256: SHA-256 of all image bytes, uint8, C order, one after another.
        labels_sha256: SHA-256 of all labels as little-endian int64.
    """

    num_examples: int
    images_sha256: str
    labels_sha256: str


class Unreadable(Facts):
    """An image file of a folder that was left out: its name in the folder, and why."""

    file: str
    reason: str


class DatasetFacts(Facts):
    """What is known of a prepared dataset.

    Attributes:
        name: tfds name with configuration and version, for example ``fashion_mnist:3.0.1``; after a name of its own
            and a colon, if it was given one: ``digits:mnist:3.0.1``. For a folder of images: ``shop:folder``.
        image_shape: Height and width, or height, width and channels if there is more than one.
        class_names: The label names in label order.
        splits: The splits by name.
        raw_files: The downloaded files by name, with their size and SHA-256 as tfds registers and checks them.
        synthetic: Whether the project drew the images itself.
        resampling: How `ingest` resizes images, as clients of the model must; see `ridgeline.image_form.Form`.
        background: The grey level that it puts behind transparent pixels.
        max_image_pixels: It refuses larger images.
        formats: For a folder, the number of files of each kind, such as ``JPEG RGB 32×32``.
        unreadable: For a folder, the image files that were left out.
    """

    name: str
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    splits: dict[str, SplitDigest]
    raw_files: dict[str, FileEntry]
    synthetic: bool
    resampling: Resampling = "bilinear"
    background: int = 255
    max_image_pixels: int = MAX_IMAGE_PIXELS
    formats: dict[str, int] = Field(default_factory=dict)
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def preparation(self) -> tuple[Resampling, int, int]:
        """How images are prepared: the last three arguments of `ridgeline.image_form.Form.of_shape`."""
        return self.resampling, self.background, self.max_image_pixels


class Dataset(Artifact[DatasetFacts]):
    """A dataset's training and test images.

    On disk, for each of ``train`` and ``test``::

        manifest.json
        <split>/images-00000-of-00001.npy    uint8 [n, h, w] or [n, h, w, 3], sharded as in `Examples`
        <split>/labels-00000-of-00001.npy    int64 [n]
        files.json                           for a folder: {split: [[file, SHA-256, kind] of each image, in order]},
                                             a line for each image
    """

    facts_type = DatasetFacts

    def split(self, name: Literal["train", "test"] | str) -> Split:
        """Return a split; only the pages that are used are read from disk."""
        return Split(self.path / name)

    def files(self) -> dict[str, list[tuple[str, str, str]]]:
        """Return, for a folder's dataset, each image's file, SHA-256 and kind by split; else nothing."""
        file = self.path / FILES
        listed: dict[str, list[tuple[str, str, str]]] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        return listed

    def each_file(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield the split, file, SHA-256 and kind of what `files` returns, without holding all of it in memory."""
        file = self.path / FILES
        if not file.exists():
            return
        with file.open(encoding="utf-8") as lines:
            for start in lines:
                if start.startswith('"'):
                    split = json.loads(start.partition(":")[0])
                    entries = itertools.takewhile(lambda line: line.startswith("["), lines)
                    while batch := "".join(itertools.islice(entries, BATCH_SIZE)):
                        for entry in json.loads(f"[{batch.rstrip().rstrip(',')}]"):
                            yield split, *entry

    def file_names(self, examples: Examples) -> dict[str, list[str]]:
        """Return, for a folder's dataset, the file of each image of the examples that were made from it, by split.

        Args:
            examples: Made from this dataset.

        Returns:
            The names in the order of the images; empty lists if the dataset is no folder.

        Raises:
            ValueError: If the examples have other labels, so that they were made from another dataset.
        """
        listed: dict[str, list[str]] = {}
        for split, file, _, _ in self.each_file():
            listed.setdefault(split, []).append(file)
        if not listed:
            return {name: [] for name in examples.facts.num_examples}
        train = np.array(listed[TRAIN], object)
        validation = np.bincount(examples.split(VALIDATION).labels, minlength=len(self.facts.class_names))
        labels = self.split(TRAIN).labels
        chosen = held_out(labels, validation)
        same = [
            np.array_equal(labels[~chosen], examples.split(TRAIN).labels),
            np.array_equal(labels[chosen], examples.split(VALIDATION).labels),
        ]
        if not all(same):
            raise ValueError(
                f"Expected the dataset that the examples {examples.digest} were made from; received {self.digest}, "
                "which has other labels. Pass that dataset."
            )
        return {TRAIN: train[~chosen].tolist(), VALIDATION: train[chosen].tolist(), TEST: listed.get(TEST, [])}


def write_files(path: Path, files: Mapping[str, Iterable[tuple[str, str, str]]]) -> None:
    """Write what `Dataset.files` returns.

    Args:
        path: The file.
        files: The file, SHA-256 and kind of each image by split.
    """
    with path.open("w", encoding="utf-8") as out:
        out.write("{")
        for number, (split, listed) in enumerate(files.items()):
            out.write(f'{"," if number else ""}\n"{split}": [')
            for place, entry in enumerate(listed):
                out.write(f"{',' if place else ''}\n{json.dumps(entry, ensure_ascii=False)}")
            out.write("\n]")
        out.write("\n}\n")


def write_dataset_split(
    directory: Path,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    num_examples: int,
    image_shape: tuple[int, ...],
    num_classes: int,
) -> SplitDigest:
    """Write a split of a `Dataset` without holding it in memory.

    Args:
        directory: The split's folder, created here; its name is the split's.
        batches: Images, uint8 ``[k, *image_shape]``, and labels, integers ``[k]``.
        num_examples: Number of examples in all batches.
        image_shape: ``(h, w)`` or ``(h, w, c)``.
        num_classes: Number of classes.

    Returns:
        The split's digest.

    Raises:
        LabelError: If a label is not in 0 to ``num_classes - 1``.
    """
    images_sha256, labels_sha256 = hashlib.sha256(), hashlib.sha256()
    num_bad, first_bad, rows = 0, 0, 0

    def checked() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal num_bad, first_bad, rows
        for images, labels in batches:
            bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
            if bad.size and not num_bad:
                first_bad = rows + int(bad[0])
            num_bad, rows = num_bad + bad.size, rows + len(labels)
            digested = thread.submit(images_sha256.update, np.ascontiguousarray(images).data)
            labels_sha256.update(labels.astype("<i8").tobytes())
            yield images, labels
            digested.result()

    with ThreadPoolExecutor(1) as thread:  # digests a batch while it is written
        write_split(directory, checked(), num_examples, image_shape)
    if num_bad:
        raise LabelError(
            f"Expected labels from 0 to {num_classes - 1} in the {directory.name} split; received {num_bad} others in "
            f"{num_examples} images, the first at index {first_bad}"
        )
    return SplitDigest(
        num_examples=num_examples, images_sha256=images_sha256.hexdigest(), labels_sha256=labels_sha256.hexdigest()
    )
