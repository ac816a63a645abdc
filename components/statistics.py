"""The step `statistics`: what the images look like, and which occur more than once, in one pass over the examples."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
from pydantic import Field

from ridgeline.artifacts.example_statistics import (
    Copies,
    ExampleStatistics,
    ExampleStatisticsFacts,
    Place,
    SplitStatistics,
)
from ridgeline.artifacts.examples import SPLITS, Examples
from ridgeline.component import Params as BaseParams
from ridgeline.component import component

MAX_GROUPS, MAX_MEMBERS = 20, 4  # of the evidence that is kept
HASH_SIDE = 8  # the perceptual hash has 8 × 8 bits


class Params(BaseParams):
    """The parameters of `statistics`."""

    constant_deviation: float = Field(
        2.0,
        ge=0,
        le=128,
        title="Deviation of a nearly constant image",
        description="An image counts as nearly constant if the standard deviation of its pixels is below this, in "
        "pixel values, 0 to 128.",
    )
    near_difference: float = Field(
        4.0,
        ge=0,
        le=255,
        title="Difference of near duplicates",
        description="Two images with the same perceptual hash count as near duplicates if their pixels differ by at "
        "most this on average, in pixel values, 0 to 255.",
    )


@component(output=ExampleStatistics)
def statistics(examples: Examples, params: Params, output: Path) -> ExampleStatisticsFacts:
    """Describe the images of each split: classes, pixels, brightness, contrast, duplicates.

    Images are read in batches. 25 bytes per image stay in memory: its digest, its perceptual hash, its label and
    whether it is nearly constant. All sums are integers, so that every machine gets the same bytes.

    Args:
        examples: The examples.
        params: What counts as nearly constant and as a near duplicate.
        output: An empty directory; receives the arrays of `ExampleStatistics`.

    Returns:
        The counts, and the images that occur more than once.
    """
    images = _Images(examples)
    parts = [_Pass(images, place, examples.facts.image_shape, params) for place in range(len(SPLITS))]
    for file in ("pixels", "brightness", "contrast"):
        np.save(output / f"{file}.npy", np.stack([getattr(part, file) for part in parts]), allow_pickle=False)
    moments = [part.moments() for part in parts]
    np.save(output / "mean.npy", np.stack([mean for mean, _ in moments]), allow_pickle=False)
    np.save(output / "deviation.npy", np.stack([deviation for _, deviation in moments]), allow_pickle=False)

    groups = _groups(images.digests)
    near, near_conflicting = _near_duplicates(images, params.near_difference)
    conflicting = [group for group in groups if len(np.unique(images.labels[group])) > 1]
    num_classes = len(examples.facts.class_names)
    return ExampleStatisticsFacts(
        dataset=examples.facts.dataset,
        examples_digest=examples.digest,
        image_shape=examples.facts.image_shape,
        class_names=examples.facts.class_names,
        splits={
            name: SplitStatistics(
                num_examples=len(part.labels),
                class_counts=tuple(np.bincount(part.labels, minlength=num_classes).tolist()),
                num_repeated=len(part.digests) - len(np.unique(part.digests)),
                num_constant=int(np.count_nonzero(part.constant)),
            )
            for name, part in zip(SPLITS, parts, strict=True)
        },
        leaked={
            "validation": _leaked(images, groups, "validation", ("train",)),
            "test": _leaked(images, groups, "test", ("train", "validation")),
        },
        conflicting=images.copies(len(conflicting), [_one_per_label(group, images.labels) for group in conflicting]),
        near_duplicates=images.copies(len(near), near),
        near_conflicting=images.copies(len(near_conflicting), near_conflicting),
        constant=images.copies(
            int(np.count_nonzero(images.constant)), np.flatnonzero(images.constant)[:MAX_GROUPS].reshape(-1, 1)
        ),
        synthetic=examples.facts.synthetic,
    )


class _Images:
    """All images of all splits, in one numbering: what `_Pass` finds of each."""

    def __init__(self, examples: Examples) -> None:
        self.splits = [examples.split(name) for name in SPLITS]
        self.starts = np.cumsum([0, *map(len, self.splits)])
        self.digests, self.hashes = np.empty((2, self.starts[-1]), np.uint64)
        self.labels = np.empty(self.starts[-1], np.int64)
        self.constant = np.empty(self.starts[-1], bool)
        self.split_of = np.repeat(np.arange(len(SPLITS), dtype=np.int8), np.diff(self.starts))

    def place(self, number: int) -> Place:
        split = int(self.split_of[number])
        return Place(split=SPLITS[split], row=int(number - self.starts[split]), label=int(self.labels[number]))

    def copies(self, count: int, groups: list[np.ndarray] | np.ndarray) -> Copies:
        shown = [tuple(map(self.place, group[:MAX_MEMBERS])) for group in groups[:MAX_GROUPS]]
        return Copies(count=count, groups=tuple(shown))

    def pixels(self, number: int) -> np.ndarray:
        split = int(self.split_of[number])
        row = int(number - self.starts[split])
        return self.splits[split].rows(row, row + 1)[0][0]


class _Pass:
    """One pass over a split: sums, histograms, and a digest and a perceptual hash for each image."""

    def __init__(self, found: _Images, place: int, image_shape: tuple[int, ...], params: Params) -> None:
        height, width, *rest = image_shape
        channels = rest[0] if rest else 1
        self.shape = image_shape
        self.pixels = np.zeros((channels, 256), np.int64)
        self.brightness = np.zeros(256, np.int64)
        self.contrast = np.zeros(128, np.int64)
        self.sums = np.zeros(image_shape, np.int64)
        self.squares = np.zeros(image_shape, np.int64)
        own = slice(*found.starts[place : place + 2])
        self.digests, self.labels, self.constant = found.digests[own], found.labels[own], found.constant[own]
        start = own.start
        for images, labels in found.splits[place].batches():
            count = len(images)
            flat = images.reshape(count, -1)
            for channel in range(channels):
                values = images.reshape(count, height * width, channels)[:, :, channel]
                self.pixels[channel] += np.bincount(values.ravel(), minlength=256)
            wide = flat.astype(np.uint32)
            sums = wide.sum(1, dtype=np.int64)
            self.sums += wide.sum(0, dtype=np.int64).reshape(image_shape)
            wide *= wide
            squares = wide.sum(1, dtype=np.int64)
            self.squares += wide.sum(0, dtype=np.int64).reshape(image_shape)
            size = flat.shape[1]
            deviation = np.sqrt((size * squares - sums**2).astype(np.float64)) / size
            self.brightness += np.bincount(sums // size, minlength=256)
            self.contrast += np.bincount(np.minimum(deviation, 127).astype(np.int64), minlength=128)
            batch = slice(start, start + count)
            found.digests[batch], found.hashes[batch] = _digests(flat), perceptual_hashes(images)
            found.labels[batch], found.constant[batch] = labels, deviation < params.constant_deviation
            start += count

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the deviation image, float32."""
        count = max(1, len(self.labels))
        variance = (count * self.squares - self.sums**2).astype(np.float64) / count**2
        return (self.sums / count).astype(np.float32), np.sqrt(variance).astype(np.float32)


def _digests(images: np.ndarray) -> np.ndarray:
    """Return 64 bits of the BLAKE2 digest of each image, uint64 ``[n]``."""
    found = b"".join(hashlib.blake2b(image, digest_size=8).digest() for image in np.ascontiguousarray(images))
    return np.frombuffer(found, "<u8").astype(np.uint64)


def perceptual_hashes(images: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each image that small changes of its pixels rarely change.

    The signs of the 8 × 8 lowest frequencies of the cosine transform, each compared with their median, as in pHash.

    Args:
        images: uint8 ``[n, h, w]`` or ``[n, h, w, c]``.

    Returns:
        uint64 ``[n]``.

    Example:
        >>> image = np.random.default_rng(0).integers(0, 200, (1, 20, 20), dtype=np.uint8)
        >>> bool(perceptual_hashes(image)[0] == perceptual_hashes(image + 1)[0])
        True
    """
    grey = images.astype(np.float32) if images.ndim == 3 else images.mean(3, dtype=np.float32)
    rows, columns = (_cosines(side) for side in grey.shape[1:])
    frequencies = (rows @ grey @ columns.T).reshape(len(grey), -1)
    bits = frequencies > np.median(frequencies, axis=1, keepdims=True)
    packed: np.ndarray = np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)
    return packed


@functools.cache
def _cosines(side: int) -> np.ndarray:
    """Return the first 8 cosines of the DCT-II, float32 ``[8, side]``."""
    angles = np.pi / side * (np.arange(side) + 0.5) * np.arange(HASH_SIDE)[:, None]
    return np.cos(angles).astype(np.float32)


def _groups(values: np.ndarray) -> list[np.ndarray]:
    """Return the places of each value that occurs more than once, by the first of them."""
    order = np.argsort(values, kind="stable")
    same = np.diff(values[order]) == 0
    as_before, as_after = np.append(False, same), np.append(same, False)
    repeated = (as_before | as_after)[: len(order)]
    starts = np.flatnonzero(~as_before[: len(order)][repeated])
    groups = np.split(order[repeated], starts)[1:]
    return sorted(groups, key=lambda group: int(group[0]))


def _one_per_label(group: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the first image of each label."""
    _, first = np.unique(labels[group], return_index=True)
    return group[np.sort(first)]


def _leaked(images: _Images, groups: list[np.ndarray], split: str, sources: tuple[str, ...]) -> Copies:
    """Count the images of a split that equal one of other splits; the original comes first in the evidence."""
    own, others = SPLITS.index(split), [SPLITS.index(name) for name in sources]
    count, shown = 0, []
    for group in groups:
        parts = images.split_of[group]
        copies, originals = group[parts == own], group[np.isin(parts, others)]
        if len(copies) and len(originals):
            count += len(copies)
            shown.append(np.concatenate([originals[:1], copies]))
    return images.copies(count, shown)


def _near_duplicates(images: _Images, limit: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the pairs of nearly equal images, and those of them with two labels.

    An image is compared with the first one that has the same perceptual hash.
    """
    found = []
    for group in _groups(images.hashes):
        others = group[1:][images.digests[group[1:]] != images.digests[group[0]]]
        if len(others):
            first = images.pixels(int(group[0])).astype(np.int16)
            for other in others:
                if np.abs(first - images.pixels(int(other))).mean() <= limit:
                    found.append(np.array([group[0], other]))
    return found, [pair for pair in found if images.labels[pair[0]] != images.labels[pair[1]]]
