"""Write predictions where a person wants them: one Parquet file, or a folder that gets a file for each run."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from ridgeline.artifacts.predictions import Predictions
from ridgeline.component import Component, ParameterError, Params
from ridgeline.files import make_folder, move
from ridgeline.store import Execution, Store, StoreError

DIGITS = 16  # of the artifact's digest in a file's name


def expect_output(output: Path, step: Component, params: Params) -> None:
    """Check where predictions are to be written, before any are made.

    Args:
        output: The file; for a step that adds to earlier predictions, the folder to which each run adds a file.
        step: The step that predicts.
        params: Its parameters.

    Raises:
        ParameterError: If it is in the folder of the images, or a folder in place of a file or the reverse; or if there
            is no folder of images.
    """
    each_run = step.adds(params)
    for folder in (str(source.location) for source in step.sources(params).values()):
        if "://" not in folder and output.resolve().is_relative_to(Path(folder).resolve()):
            raise ParameterError(
                f"Expected an output outside the folder of the images, {folder}; received {output}. It would count as "
                "an image in the next run."
            )
    if each_run and (output.is_file() or output.suffix == ".parquet"):
        raise ParameterError(
            f"Expected a folder for the predictions of new files; received the file {output}. Each run adds a file to "
            "it: name the folder."
        )
    if not each_run and output.is_dir():
        raise ParameterError(f"Expected a file for the predictions; received the folder {output}. Name a file in it.")


def write_output(store: Store, step: Component, params: Params, execution: Execution, output: Path) -> list[Path]:
    """Copy the predictions of an execution to their output. Each file appears whole, by one rename.

    If it was skipped, since there are no new files, the predictions are those that it would have added to.

    Args:
        store: Holds the predictions.
        step: The step that predicts.
        params: Its parameters.
        execution: Its execution.
        output: The file, which is replaced; for a step that adds to earlier predictions, a folder: it gets a file for
            these predictions, unless it has one. What they add to is written before, back to the first that it has: a
            run may have been killed before it wrote its file.

    Returns:
        The new or replaced files.

    Raises:
        ArtifactError: If the predictions are missing or damaged.
        StoreError: If the disk is full, or the output can't be written.
    """
    ref = execution.output or execution.inputs.get(step.earlier or "")
    if ref is None:
        return []
    newest = asked = store.open(ref, Predictions)
    try:
        if not step.adds(params):
            make_folder(output.absolute().parent)
            _copy(newest.parquet, output)
            return [output]
        make_folder(output.absolute())
        missing = []
        while not (file := output / f"predictions-{newest.digest[:DIGITS]}.parquet").exists():
            missing.append((newest.parquet, file))
            earlier = f"{Predictions.__name__}/{newest.facts.earlier}"
            if not newest.facts.earlier or not store.holds(earlier):  # it may have been deleted since
                break
            newest = store.open(earlier, Predictions)
        for source, file in reversed(missing):
            _copy(source, file)
        return [file for _, file in reversed(missing)]
    except OSError as error:
        raise StoreError(
            f"Cannot write predictions to {output}: {error.strerror or error}. Free disk space there, or name another "
            f"output, and run again. They are kept in {asked.parquet}."
        ) from error


def _copy(source: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        shutil.copyfile(source, unfinished)
        move(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
