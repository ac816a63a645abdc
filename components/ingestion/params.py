"""The parameters of `ingest`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ridgeline.component import Params as StepParams
from ridgeline.component import shown_as
from ridgeline.image_form import Form
from ridgeline.preparation import Resampling

FOLDER = "folder"
DATASET_PATTERN = r"^[a-z][a-z0-9_]*(/[A-Za-z0-9][A-Za-z0-9_.+-]*)?(:\d+\.\d+\.\d+)?$"


Side = Annotated[int, Field(ge=1, le=4_096)]


def _as_size(value: Any) -> Any:
    """Return one number, or text as ``32,48``, as height and width; JSON has no tuples."""
    if isinstance(value, str) and re.fullmatch(r"[\d\s,]+", value):
        value = [int(part) if part.strip() else None for part in value.split(",")]
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    return tuple(value) * (2 if len(value) == 1 else 1) if isinstance(value, list | tuple) else value


def _as_words(value: Any) -> Any:
    """Return text as a shell's words, and check that each is an option."""
    try:
        words = shlex.split(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(
            f"beam_pipeline_options: expected words as in a shell; received others ({error}). Correct the quotes."
        ) from None
    if not isinstance(words, list | tuple):
        return words
    if others := [word for word in words if not str(word).startswith("--")]:
        raise ValueError(
            f"beam_pipeline_options: expected options of Beam as --name or --name=value; received {len(others)} others "
            f"among {len(words)}. Write each as one word."
        )
    return tuple(words)  # JSON has no tuples


class Params(StepParams):
    """Which dataset to prepare, and how its images become equal in size and colour."""

    dataset: str = Field(
        "fashion_mnist:3.0.1",
        pattern=DATASET_PATTERN,
        title="Dataset",
        description="tfds image-classification dataset, as name:version, name/config:version or name alone for the "
        "newest version; or folder: the images in the image directory.",
    )
    name: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]*$",
        max_length=64,
        title="Name",
        description="Name of the dataset's own, by which its model is served: lower-case letters, digits and _. "
        "Empty: the name in tfds. A folder needs one.",
    )
    manual_dir: Path | None = Field(
        None,
        exclude=True,
        title="Manual directory",
        description="Folder with the downloaded files of a tfds dataset, for machines without a network.",
    )
    image_dir: str | None = Field(
        None,
        exclude=True,
        title="Image directory",
        description="For folder: a path or URL, with train/CLASS/ and test/CLASS/, with CLASS/, or with labels.csv.",
    )
    image_size: Annotated[tuple[Side, Side], BeforeValidator(_as_size)] | None = Field(
        None,
        title="Image size",
        description="Height and width in pixels, 1 to 4096, as [32, 32] or one number for both. Other images are "
        "resized, without regard to their proportions. Empty: all images must have one size.",
    )
    resampling: Resampling = Field(
        "bilinear",
        title="Resampling",
        description="How images are resized; all but nearest are antialiased.",
    )
    color_mode: Literal["grayscale", "rgb"] | None = Field(
        None,
        title="Color mode",
        description="grayscale: one channel. rgb: three. Empty: as in tfds; rgb for a folder.",
        json_schema_extra=shown_as(grayscale="grayscale: one channel", rgb="rgb: three channels"),
    )
    background: int = Field(
        255, ge=0, le=255, title="Background", description="Grey level behind transparent pixels: 0 black, 255 white."
    )
    test_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        title="Test share",
        description="For a folder that does not state the splits: the share of each class that is held out for the "
        "test, above 0, below 1. Content and seed decide, so that further files move none.",
    )
    split_seed: int = Field(42, ge=0, title="Split seed", description="For the split by the test share.")
    min_class_images: int = Field(
        1,
        ge=1,
        title="Minimum images per class",
        description="For a folder: fewest images of each class in the training and in the test split, at least 1.",
    )
    max_unreadable_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        title="Maximum unreadable share",
        description="For a folder: share of unreadable images, 0 to below 1, that may be left out. With "
        "more, the run stops.",
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        title="Maximum pixels of an image",
        description="For a folder: larger images count as unreadable; they may exhaust the memory.",
    )

    beam_pipeline_options: Annotated[tuple[str, ...], BeforeValidator(_as_words)] = Field(
        (),
        exclude=True,
        title="Beam pipeline options",
        description="Options of Apache Beam, as --runner=FlinkRunner: its workers decode the images of a folder, and "
        "prepare a Beam dataset of tfds. Empty: processes of this machine.",
    )

    @property
    def form(self) -> Form:
        """What images become."""
        return Form(self.image_size, self.resampling, self.color_mode, self.background, self.max_image_pixels)

    @model_validator(mode="after")
    def _folder_has_a_name(self) -> Self:
        if self.dataset == FOLDER and not self.name:
            raise ValueError(
                f"name: expected the name by which the model is served, since dataset={FOLDER} has none; received "
                f"{self.name!r}. Set one, such as name=product_photos: each folder has a champion of its own."
            )
        return self
