"""Transform: splits off validation data, learns the normalization, and writes memory-mapped arrays."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ridgeline.artifacts.dataset import Dataset
from ridgeline.artifacts.examples import Examples, ExamplesFacts, Normalization, Split, write_split
from ridgeline.component import Params as StepParams
from ridgeline.component import StepError, component, shown_as

log = logging.getLogger(__name__)

BATCH_SIZE = 2_000


class Params(StepParams):
    """How to split and normalize."""

    validation_examples: int = Field(
        5_000,
        ge=1,
        title="Validation examples",
        description="Number of training images, from the last, that are held out for validation; at least 1.",
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

    The validation split is tfds's ``train[-n:]``, training is ``train[:-n]``, in tfds's stable order. Pixels
    stay uint8; what normalization learned is written into the facts and becomes part of the model's graph.

    Args:
        dataset: The prepared dataset.
        params: How to split and normalize.
        output: Empty directory to write `Examples` into.

    Returns:
        The examples' facts.

    Raises:
        StepError: If no training image would be left, the training or the test images are all of one class, or all
            pixels are equal under ``standard``.
    """
    import tensorflow_datasets as tfds

    available, held_out = dataset.facts.splits["train"].num_examples, params.validation_examples
    if held_out >= available:
        raise StepError(
            f"Expected transform.validation_examples below the {available} training images of "
            f"{dataset.facts.name}; received {held_out}. Hold out fewer."
        )
    builder = tfds.builder_from_directory(dataset.builder_dir)
    sizes = {
        "train": available - held_out,
        "validation": held_out,
        "test": dataset.facts.splits["test"].num_examples,
    }
    slices = {"train": f"train[:-{held_out}]", "validation": f"train[-{held_out}:]", "test": "test"}
    for name, size in sizes.items():
        write_split(output / name, _read(builder, slices[name]), size, dataset.facts.image_shape)
        log.info("%s: %d images from %s", name, size, slices[name])
        if name != "validation":  # any number of images may be held out, even 1
            _expect_classes(name, Split(output / name), dataset)
    return ExamplesFacts(
        dataset=dataset.facts.name,
        image_shape=dataset.facts.image_shape,
        class_names=dataset.facts.class_names,
        num_examples=sizes,
        normalization=_normalization(params.normalization, Split(output / "train")),
        synthetic=dataset.facts.synthetic,
    )


def _expect_classes(name: str, split: Split, dataset: Dataset) -> None:
    """Refuse a split whose images are all of one class: every model would be right."""
    found = np.unique(split.labels) if len(split) else np.empty(0, np.int64)
    if len(found) < 2:
        received = f"{len(split)} images"
        if len(found):
            received += f" that are all of the class {dataset.facts.class_names[found[0]]!r}"
        raise StepError(
            f"Expected images of at least 2 classes in the {name} split of {dataset.facts.name}; received {received}. "
            "Correct the dataset, or choose another."
        )


def _read(builder: Any, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    import tensorflow_datasets as tfds

    config = tfds.ReadConfig(interleave_cycle_length=1)  # the files one after another: the order of the examples
    for batch in tfds.as_numpy(builder.as_dataset(split=split, batch_size=BATCH_SIZE, read_config=config)):
        yield batch["image"], batch["label"]


def _normalization(kind: Literal["unit", "standard"], train: Split) -> Normalization:
    if kind == "unit":
        return Normalization(kind=kind, mean=0.0, deviation=255.0)
    counts = np.zeros(256, np.int64)  # exact in any order: the histogram gives mean and deviation
    for images, _ in train.shards:
        for start in range(0, len(images), BATCH_SIZE):
            counts += np.bincount(images[start : start + BATCH_SIZE].ravel(), minlength=256)
    values, total = np.arange(256), int(counts.sum())
    mean = int(counts @ values) / total
    deviation = float(np.sqrt(float(counts @ (values - mean) ** 2) / total))
    if deviation == 0.0:
        raise StepError(
            f"Expected training pixels that differ; received {total} pixels that all equal {mean}. "
            "Use transform.normalization=unit or check the dataset."
        )
    return Normalization(kind=kind, mean=mean, deviation=deviation)
