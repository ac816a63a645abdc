"""Write predictions where a person wants them: one Parquet file, or a folder that gets a file for each run."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ridgeline.artifacts.predictions import Predictions
from ridgeline.component import ParameterError
from ridgeline.files import make_folder, move
from ridgeline.store import Store, StoreError

DIGITS = 16  # of the artifact's digest in a file's name


def expect_output(output: Path, folder: str, each_run: bool) -> None:
    """Check where predictions are to be written, before any are made.

    Args:
        output: The file; with `each_run`, the folder.
        folder: The folder of the images.
        each_run: Whether each run adds a file.

    Raises:
        ParameterError: If it is in the folder of the images, or a folder in place of a file or the reverse.
    """
    if "://" not in folder and output.resolve().is_relative_to(Path(folder).resolve()):
        raise ParameterError(
            f"Expected an output outside the folder of the images, {folder}; received {output}. It would count as an "
            "image in the next run."
        )
    if each_run and (output.is_file() or output.suffix == ".parquet"):
        raise ParameterError(
            f"Expected a folder for the predictions of new files; received the file {output}. Each run adds a file to "
            "it: name the folder."
        )
    if not each_run and output.is_dir():
        raise ParameterError(f"Expected a file for the predictions; received the folder {output}. Name a file in it.")


def write_output(store: Store, ref: str, output: Path, each_run: bool) -> list[Path]:
    """Copy predictions to their output. Each file appears whole, by one rename.

    Args:
        store: Holds the predictions.
        ref: Store-relative name of the predictions.
        output: The file, which is replaced; with `each_run`, a folder: it gets a file for these predictions and for
            those that they add to, unless it has them. So a run that was killed before this is made up for.
        each_run: Whether `output` is a folder.

    Returns:
        The new or replaced files.

    Raises:
        ArtifactError: If the predictions are missing or damaged.
        StoreError: If the disk is full, or the output can't be written.
    """
    newest = store.open(ref, Predictions)
    try:
        if not each_run:
            make_folder(output.absolute().parent)
            _copy(newest.parquet, output)
            return [output]
        make_folder(output.absolute())
        files = []
        for added in _series(store, newest):
            file = output / f"predictions-{added.digest[:DIGITS]}.parquet"
            if not file.exists():
                _copy(added.parquet, file)
                files.append(file)
        return files
    except OSError as error:
        raise StoreError(
            f"Cannot write predictions to {output}: {error.strerror or error}. Free disk space there, or name another "
            f"output, and run again. They are kept in {newest.parquet}."
        ) from error


def _series(store: Store, newest: Predictions) -> Iterator[Predictions]:
    """Yield predictions, and those that they add to, as far as they were not deleted since."""
    yield newest
    while newest.facts.earlier and store.holds(ref := f"{Predictions.__name__}/{newest.facts.earlier}"):
        yield (newest := store.open(ref, Predictions))


def _copy(source: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        shutil.copyfile(source, unfinished)
        move(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
