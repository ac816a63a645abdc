"""Infer: predicts the class of each image in a folder with a served model."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from components.ingestion.decoding_stream import DecodingStream, batches_of
from ridgeline.artifacts.predictions import (
    COVERED,
    PREDICTIONS,
    Predictions,
    PredictionsFacts,
    Row,
    join,
    write_covered,
    write_rows,
)
from ridgeline.artifacts.pushed_model import PushedModel, read_form
from ridgeline.component import (
    ParameterError,
    ServedParams,
    Source,
    SourceFolder,
    StepError,
    StepSkipped,
    component,
)

log = logging.getLogger(__name__)

Predicted = tuple[int | None, str | None, float | None, str | None]
SOURCE = "images"
PART_BATCHES = 64  # a killed step repeats at most this many


def _absolute(folder: str | None) -> str | None:
    """Return a folder's absolute path; of a URL, itself without a last ``/``."""
    if not folder or "://" in folder:
        return folder and folder.rstrip("/")
    return str(Path(folder).expanduser().absolute())


class Params(ServedParams):
    """Which model predicts, and for which images."""

    folder: Annotated[str, AfterValidator(_absolute)] | None = Field(
        None,
        title="Folder",
        description="Folder of the images, with its subfolders: a path, or a URL such as s3://bucket/prefix. It has no "
        "default.",
    )
    new_files_only: bool = Field(
        False,
        title="New files only",
        description="Predict only for files without a row in the last predictions of this model name and folder, and "
        "in those that they add to: new paths, and paths with other content.",
    )

    @model_validator(mode="after")
    def _folder_has_no_password(self) -> Self:
        if self.folder and "@" in self.folder.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "folder: expected a URL without a user and a password, since records state it; received one with "
                "these. Give them to the driver, for example in AWS_ACCESS_KEY_ID."
            )
        return self


def find_sources(params: Params) -> Mapping[str, SourceFolder]:
    """Return the folder of the images.

    Raises:
        ParameterError: If it is not set.
    """
    if not params.folder:
        raise ParameterError("Parameter infer.folder: expected the folder of the images; received none. Set it.")
    return {SOURCE: SourceFolder(params.folder)}


@component(
    output=Predictions,
    sources=find_sources,
    adds_to=("model", "folder"),
    uses_earlier=lambda params: params.new_files_only,
)
def infer(
    pushed: PushedModel,
    params: Params,
    output: Path,
    sources: Mapping[str, Source],
    scratch: Path | None,
    earlier: Predictions | None = None,
) -> PredictionsFacts:
    """Predict the class of each image in a folder with a served model; write a table in Parquet.

    Args:
        pushed: The served version.
        params: Its number, and the folder.
        output: Empty directory to write `Predictions` into.
        sources: The folder as it was listed.
        scratch: Holds the finished parts of the table. A killed step resumes after them.
        earlier: The predictions that these add to: files that they have rows for are left out.

    Returns:
        The number of files, and of each class.

    Raises:
        StepError: If the folder has no file, or the SavedModel can't be used.
        StepSkipped: If only new files are wanted, and there are none.
    """
    source = sources[SOURCE]
    wanted = dict(source.files)
    for file, content in earlier.covered() if earlier else ():
        if wanted.get(file) == content:
            del wanted[file]
    if not wanted and params.new_files_only:
        raise StepSkipped(f"no new files in {source.location}: earlier predictions have rows for all of them")
    if not wanted:
        raise StepError(f"Expected images in {source.location}; received no file. Name another folder.")
    model = pushed.facts
    facts = PredictionsFacts(
        model_name=model.model_name,
        version=params.version,
        model_digest=model.model_digest,
        num_files=len(wanted),
        num_unreadable=0,
        classes={},
        num_covered=len(wanted),
        earlier=earlier.digest if earlier else None,
        synthetic=model.synthetic,
    )
    parts = _write_parts(pushed, facts, source, list(wanted), scratch or output)
    counts = join(parts, output / PREDICTIONS)
    if earlier:
        facts = facts.model_copy(update={"num_covered": len(wanted) + write_covered(output / COVERED, earlier)})
    if scratch is None:
        for part in parts:
            part.unlink()
    classes = {name: counts.get(name, 0) for name in model.class_names}
    log.info("%d files, of which %d are unreadable", len(wanted), len(wanted) - sum(classes.values()))
    return facts.model_copy(update={"classes": classes, "num_unreadable": len(wanted) - sum(classes.values())})


def _write_parts(
    pushed: PushedModel, facts: PredictionsFacts, source: Source, files: list[str], folder: Path
) -> list[Path]:
    """Write the rows of files in parts, always the same ones; those that are there already are left as they are."""
    shape = pushed.facts.image_shape
    batches = list(batches_of(files, shape))
    groups = [batches[start : start + PART_BATCHES] for start in range(0, len(batches), PART_BATCHES)]
    parts = [folder / f"part-{number:05}.parquet" for number in range(len(groups))]
    missing = [(part, group) for part, group in zip(parts, groups, strict=True) if not part.exists()]
    if len(missing) < len(parts):
        log.info("resuming: %d of %d parts are there", len(parts) - len(missing), len(parts))
    todo = [batch for _, group in missing for batch in group]
    with DecodingStream(source, read_form(pushed.saved_model, shape), shape, sum(map(len, todo))) as stream:
        decoded = stream.decode(todo)
        classifier = Classifier(pushed) if todo else None  # takes a while: the first batches are decoded meanwhile
        for part, group in missing:
            rows: list[Row] = []
            for batch, (images, errors) in zip(group, itertools.islice(decoded, len(group)), strict=True):
                predicted = classifier.predict(images) if classifier and len(images) else iter(())
                rows += (
                    Row(file, source.files[file], *((None, None, None, error) if error else next(predicted)))
                    for file, error in zip(batch, errors, strict=True)
                )
            write_rows(part, rows, facts)
            log.info("%d of %d parts", parts.index(part) + 1, len(parts))
    return parts


class Classifier:
    """A served version, loaded.

    Args:
        pushed: The served version.

    Raises:
        StepError: If TensorFlow can't load it.
    """

    def __init__(self, pushed: PushedModel) -> None:
        import tensorflow as tf

        try:
            self._loaded = tf.saved_model.load(str(pushed.saved_model))  # its signature does not keep its variables
            self._serve = self._loaded.signatures["serving_default"]
        except Exception as error:  # of many kinds
            raise StepError(
                f"Cannot load the SavedModel of {pushed.ref}: {type(error).__name__}: {error}. Use another version."
            ) from error
        self._names = pushed.facts.class_names

    def predict(self, images: np.ndarray) -> Iterator[Predicted]:
        """Yield what `Row` states of each image: class, its name and probability, or an error in their place.

        Args:
            images: uint8 ``[n, h, w]`` or ``[n, h, w, c]``.
        """
        import tensorflow as tf

        found = self._serve(images=tf.constant(images))
        probabilities, ids = found["probabilities"].numpy(), found["class_id"].numpy().tolist()
        finite, highest = np.isfinite(probabilities).all(axis=1).tolist(), probabilities.max(axis=1).tolist()
        for class_id, is_finite, probability in zip(ids, finite, highest, strict=True):
            if is_finite:
                yield class_id, self._names[class_id], probability, None
            else:
                yield None, None, None, "the model's probabilities are not finite numbers"
