"""`Examples`: the train, validation and test splits as uint8 arrays, mapped into memory or read in batches."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ridgeline.artifacts.base import Artifact, Facts
from ridgeline.image_form import MAX_IMAGE_PIXELS, Form, Resampling

MAX_SHARD_BYTES = 256 * 2**20

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
TRAIN, VALIDATION, TEST = SPLITS
BATCH_BYTES = 2**20  # of images: small enough for a processor's cache


class Normalization(Facts):
    """How a pixel becomes a model's input: ``(pixel - mean) / deviation``, in float32.

    Attributes:
        kind: ``unit`` (mean 0, deviation 255: pixels in [0, 1]) or ``standard`` (both of the training split).
        mean: Subtracted from each pixel, in pixel values.
        deviation: Divides each pixel, in pixel values; positive.
    """

    kind: Literal["unit", "standard"]
    mean: float
    deviation: float


class ExamplesFacts(Facts):
    """What is known of the examples, besides the arrays.

    Attributes:
        dataset: tfds name and version of the dataset, for example ``fashion_mnist:3.0.1``.
        image_shape: ``(h, w)`` or ``(h, w, c)``.
        class_names: The label names in label order.
        num_examples: Number of examples of each split.
        normalization: Learned from the training split; part of every model's graph.
        synthetic: Whether the project drew the images itself.
        resampling: As in `DatasetFacts`.
        background: As in `DatasetFacts`.
        max_image_pixels: As in `DatasetFacts`.
    """

    dataset: str
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    num_examples: dict[str, int]
    normalization: Normalization
    synthetic: bool
    resampling: Resampling = "bilinear"
    background: int = 255
    max_image_pixels: int = MAX_IMAGE_PIXELS

    @property
    def form(self) -> Form:
        """How to prepare images for a model that is trained on the examples."""
        return Form.of_shape(self.image_shape, self.resampling, self.background, self.max_image_pixels)


def batch_size(image_shape: tuple[int, ...]) -> int:
    """Return how many images make a batch of about `BATCH_BYTES`, at least one."""
    return max(1, BATCH_BYTES // max(1, math.prod(image_shape)))


class ImageRows:
    """Images in files, one after another, read without a memory map: what was read does not stay in memory.

    Args:
        parts: Each file, where its images begin, and their number.
        shape: ``(h, w)`` or ``(h, w, c)``.
    """

    def __init__(self, parts: Sequence[tuple[Path, int, int]], shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._parts = parts
        self._ends = list(itertools.accumulate(count for _, _, count in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return some images, uint8 ``[k, *shape]``.

        Args:
            start: The first image, at least 0.
            stop: The image after the last; images beyond the end are left out.
        """
        stop = min(stop, len(self))
        found = np.empty((max(0, stop - start), *self.shape), np.uint8)
        size = math.prod(self.shape)
        filled, part = 0, bisect.bisect_right(self._ends, start)
        while filled < len(found):
            path, offset, count = self._parts[part]
            first = start + filled - (self._ends[part] - count)
            take = min(len(found) - filled, count - first)
            piece = found[filled : filled + take].reshape(-1)
            with path.open("rb") as file:
                file.seek(offset + first * size)
                if file.readinto(piece.data) != piece.nbytes:
                    raise ValueError(f"Expected {count} images in {path}; received fewer.")
            filled, part = filled + take, part + 1
        return found


class Split:
    """One split's images and labels.

    Attributes:
        shards: Pairs of images, uint8 ``[n, h, w]`` or ``[n, h, w, c]``, and labels, int64 ``[n]``, memory-mapped: of
            what is read of them, the system may keep any part in memory. `batches` and `rows` read without a map.
    """

    def __init__(self, directory: Path) -> None:
        images, labels = sorted(directory.glob("images-*.npy")), sorted(directory.glob("labels-*.npy"))
        self.shards = [
            (
                np.load(image_file, mmap_mode="r", allow_pickle=False),
                np.load(label_file, mmap_mode="r", allow_pickle=False),
            )
            for image_file, label_file in zip(images, labels, strict=True)
        ]
        parts = [(file, found.offset, len(found)) for file, (found, _) in zip(images, self.shards, strict=True)]
        self._images = ImageRows(parts, self.shards[0][0].shape[1:] if parts else ())

    def __len__(self) -> int:
        return sum(len(labels) for _, labels in self.shards)

    @property
    def images(self) -> np.ndarray:
        """All images, uint8 ``[n, h, w]`` or ``[n, h, w, c]``: a memory map of one shard, a copy of several."""
        return self._whole(0)

    @property
    def labels(self) -> np.ndarray:
        """All labels, int64 ``[n]``."""
        return self._whole(1)

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a copy of some rows, also across shards: images, uint8 ``[k, ...]``, and labels, int64 ``[k]``.

        Args:
            start: The first row, at least 0.
            stop: The row after the last; rows beyond the end are left out.
        """
        parts, offset = [], 0
        for _, labels in self.shards:
            parts.append(labels[max(0, start - offset) : max(0, stop - offset)])
            offset += len(labels)
        return self._images.read(start, stop), np.concatenate(parts)

    def batches(self, size: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all images and labels, as `rows` does, in order.

        Args:
            size: The largest number of images at a time; if None, as many as need little memory.
        """
        size = size or batch_size(self._images.shape)
        for start in range(0, len(self), size):
            yield self.rows(start, start + size)

    def _whole(self, column: int) -> np.ndarray:
        arrays = [shard[column] for shard in self.shards]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def held_out(labels: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """Return which training images of a dataset are its validation images: the last ones of each class.

    Args:
        labels: Of all training images, integers ``[n]``.
        class_counts: How many of each class are held out, integers ``[classes]``.

    Returns:
        bool ``[n]``.

    Example:
        >>> held_out(np.array([0, 1, 0, 1, 0]), np.array([2, 1])).tolist()
        [False, False, True, True, True]
    """
    chosen = np.zeros(len(labels), bool)
    for label, count in enumerate(class_counts):
        places = np.flatnonzero(labels == label)
        chosen[places[len(places) - count :]] = True
    return chosen


class Examples(Artifact[ExamplesFacts]):
    """The three splits, ready to train on.

    On disk, for each of ``train``, ``validation`` and ``test``::

        <split>/images-00000-of-00001.npy    uint8 [n, h, w] or [n, h, w, c]
        <split>/labels-00000-of-00001.npy    int64 [n]

    A split is sharded if its images exceed ``MAX_SHARD_BYTES`` (256 MiB).
    """

    facts_type = ExamplesFacts

    def split(self, name: SplitName) -> Split:
        """Return a split; only the pages that are used are read from disk."""
        return Split(self.path / name)


def write_split(
    directory: Path,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    num_examples: int,
    image_shape: tuple[int, ...],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a split's shards without holding the split in memory.

    Args:
        directory: The split's folder, created here.
        batches: Images, uint8 ``[k, *image_shape]``, and labels, integers ``[k]``.
        num_examples: Number of examples in all batches, at least 1.
        image_shape: ``(h, w)`` or ``(h, w, c)``.
        max_shard_bytes: Upper limit of a shard's image bytes.

    Raises:
        ValueError: If the batches do not hold ``num_examples`` examples.
    """
    directory.mkdir(parents=True)
    per_shard = max(1, max_shard_bytes // int(np.prod(image_shape)))
    num_shards = -(-num_examples // per_shard)
    rows: Iterator[tuple[np.ndarray, np.ndarray]] = iter(batches)
    images, labels = next(rows, (np.empty((0, *image_shape), np.uint8), np.empty(0, np.int64)))
    for shard in range(num_shards):
        size = min(per_shard, num_examples - shard * per_shard)
        suffix = f"{shard:05d}-of-{num_shards:05d}.npy"
        label_out = np.empty(size, np.int64)
        filled = 0
        # Not into a memory map: on a full disk, that ends the process without an error.
        with (directory / f"images-{suffix}").open("wb") as image_out:
            header = {"descr": "|u1", "fortran_order": False, "shape": (size, *image_shape)}
            np.lib.format.write_array_header_1_0(image_out, header)
            while filled < size:
                if not len(labels):
                    images, labels = next(rows, (images, labels))
                    if not len(labels):
                        raise ValueError(f"Expected {num_examples} examples for {directory.name}; received fewer.")
                take = min(size - filled, len(labels))
                image_out.write(images[:take].astype(np.uint8, "C", copy=False).reshape(take, *image_shape).data)
                label_out[filled : filled + take] = labels[:take]
                images, labels, filled = images[take:], labels[take:], filled + take
        np.save(directory / f"labels-{suffix}", label_out, allow_pickle=False)
    if len(labels) or next(rows, None) is not None:
        raise ValueError(f"Expected {num_examples} examples for {directory.name}; received more.")
