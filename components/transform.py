"""Transform: splits off validation data, learns the normalization, and writes memory-mapped arrays."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.examples import Examples, ExamplesFacts, Normalization, Split, held_out, write_split
from ridgeline.component import Params as StepParams
from ridgeline.component import StepError, component, shown_as

log = logging.getLogger(__name__)


class Params(StepParams):
    """How to split and normalize."""

    validation_examples: int = Field(
        5_000,
        ge=1,
        title="Validation examples",
        description="Number of training images, from the last, that are held out for validation; at least 1.",
    )
    validation_split: Literal["last", "stratified"] = Field(
        "last",
        title="Validation split",
        description="last: the last training images. stratified: the last ones of each class, in proportion, for "
        "datasets that are sorted by class.",
    )
    normalization: Literal["unit", "standard"] = Field(
        "unit",
        title="Normalization",
        description="unit: pixels / 255. standard: (pixels - mean) / standard deviation, both of the training split.",
        json_schema_extra=shown_as(unit="unit: pixels / 255", standard="standard: mean 0, deviation 1"),
    )


@component(output=Examples)
def transform(dataset: Dataset, params: Params, output: Path) -> ExamplesFacts:
    """Split and normalize a dataset, without changing a pixel on disk.

    The validation split is the last n training images, in the dataset's stable order; if it is ``stratified``, the
    last ones of each class, in proportion. Pixels stay uint8; what normalization learned is written into the facts and
    becomes part of the model's graph.

    Args:
        dataset: The prepared dataset.
        params: How to split and normalize.
        output: Empty directory to write `Examples` into.

    Returns:
        The examples' facts.

    Raises:
        StepError: If no training image would be left, the training or the test images are all of one class, a class
            is only in the validation split, or all pixels are equal under ``standard``.
    """
    available, held_out = dataset.facts.splits["train"].num_examples, params.validation_examples
    if held_out >= available:
        raise StepError(
            f"Expected transform.validation_examples below the {available} training images of "
            f"{dataset.facts.name}; received {held_out}. Hold out fewer."
        )
    train, test = dataset.split("train"), dataset.split("test")
    labels = np.asarray(train.labels)
    in_validation = _held_out(labels, held_out, params.validation_split)
    _expect_trained_classes(labels, in_validation, dataset)
    rows = {"train": (train, ~in_validation), "validation": (train, in_validation), "test": (test, None)}
    sizes = {}
    for name, (split, chosen) in rows.items():
        sizes[name] = len(split) if chosen is None else int(chosen.sum())
        write_split(output / name, _read(split, chosen), sizes[name], dataset.facts.image_shape)
        log.info("%s: %d images", name, sizes[name])
        if name != "validation":  # any number of images may be held out, even 1
            _expect_classes(name, Split(output / name), dataset)
    return ExamplesFacts(
        dataset=dataset.facts.name,
        image_shape=dataset.facts.image_shape,
        class_names=dataset.facts.class_names,
        num_examples=sizes,
        normalization=_normalization(params.normalization, Split(output / "train")),
        synthetic=dataset.facts.synthetic,
        resampling=dataset.facts.resampling,
        background=dataset.facts.background,
        max_image_pixels=dataset.facts.max_image_pixels,
    )


def _expect_classes(name: str, split: Split, dataset: Dataset) -> None:
    """Refuse a split whose images are all of one class: every model would be right."""
    counts = np.zeros(len(dataset.facts.class_names), np.int64)
    for _, labels in split.shards:
        counts += np.bincount(labels, minlength=len(counts))
    found = np.flatnonzero(counts)
    if len(found) < 2:
        received = f"{len(split)} images"
        if len(found):
            received += f" that are all of the class {dataset.facts.class_names[found[0]]!r}"
        raise StepError(
            f"Expected images of at least 2 classes in the {name} split of {dataset.facts.name}; received {received}. "
            "Correct the dataset, or choose another."
        )


def _held_out(labels: np.ndarray, count: int, kind: Literal["last", "stratified"]) -> np.ndarray:
    """Return which training images are held out for validation, bool ``[n]``."""
    if kind == "last":
        return held_out(labels, np.bincount(labels[len(labels) - count :]))
    counts = np.bincount(labels)
    exact = counts * (count / len(labels))
    quotas = np.floor(exact).astype(int)  # the largest remainders get what is left
    quotas[np.argsort(quotas - exact, kind="stable")[: count - quotas.sum()]] += 1
    return held_out(labels, quotas)


def _expect_trained_classes(labels: np.ndarray, in_validation: np.ndarray, dataset: Dataset) -> None:
    """Refuse a class that is only in the validation split, as in a dataset that is sorted by class."""
    names = dataset.facts.class_names
    own = (labels == label for label in range(len(names)))
    if missing := [name for name, rows in zip(names, own, strict=True) if rows.any() and in_validation[rows].all()]:
        raise StepError(
            f"Expected each class of the validation split in the training split, too; received {len(missing)} that are "
            f"only in the last {in_validation.sum()} images of {dataset.facts.name}: {', '.join(missing[:10])}. Set "
            "transform.validation_split=stratified."
        )


def _read(split: Split, chosen: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of a split's images and labels, all or those that are chosen."""
    start = 0
    for images, labels in split.batches():
        if chosen is None or (taken := chosen[start : start + len(labels)]).all():
            yield images, labels
        elif taken.any():
            yield images[taken], labels[taken]
        start += len(labels)


def _normalization(kind: Literal["unit", "standard"], train: Split) -> Normalization:
    if kind == "unit":
        return Normalization(kind=kind, mean=0.0, deviation=255.0)
    counts = np.zeros(256, np.int64)  # exact in any order: the histogram gives mean and deviation
    for images, _ in train.batches():
        counts += np.bincount(images.ravel(), minlength=256)
    values, total = np.arange(256), int(counts.sum())
    mean = int(counts @ values) / total
    deviation = float(np.sqrt(float(counts @ (values - mean) ** 2) / total))
    if deviation == 0.0:
        raise StepError(
            f"Expected training pixels that differ; received {total} pixels that all equal {mean}. "
            "Use transform.normalization=unit or check the dataset."
        )
    return Normalization(kind=kind, mean=mean, deviation=deviation)
