"""`Schema`: what every version of a dataset must look like."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ridgeline.artifacts.base import Artifact, Facts

SCHEMA = "schema.json"


class Range(Facts):
    """The lowest and the highest value that are allowed, in pixel values, 0 to 255."""

    min: float = Field(ge=0, le=255)
    max: float = Field(ge=0, le=255)

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"expected min up to max; received min {self.min} and max {self.max}")
        return self


class SchemaFacts(Facts):
    """What the examples must look like.

    Attributes:
        class_names: The classes, in label order.
        image_shape: ``(h, w)`` or ``(h, w, c)``.
        min_class_examples: Fewest training images, by class name; 0 for a class that is not named.
        brightness: Of the mean pixel value of a split.
        contrast: Of the mean standard deviation of an image's pixels in a split.
    """

    class_names: tuple[str, ...] = Field(min_length=2)
    image_shape: tuple[int, ...] = Field(min_length=2, max_length=3)
    min_class_examples: dict[str, int]
    brightness: Range
    contrast: Range

    @model_validator(mode="after")
    def _names_its_classes(self) -> Self:
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"class_names: expected each class once; received {list(self.class_names)}")
        if unknown := sorted(self.min_class_examples.keys() - set(self.class_names)):
            raise ValueError(f"min_class_examples: expected classes of class_names; received {unknown}")
        return self


class Schema(Artifact[SchemaFacts]):
    """A schema, for people to copy and edit.

    On disk::

        schema.json    the facts
    """

    facts_type = SchemaFacts
