"""`Predictions`: what a served model predicts for each file of a folder, as Parquet."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ridgeline.artifacts.base import Artifact, Facts, file_entry

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

PREDICTIONS, COVERED = "predictions.parquet", "covered.parquet"
BATCH_ROWS = 10_000


class Row(NamedTuple):
    """What is predicted for one file.

    Attributes:
        path: The file's name relative to the folder, with ``/``.
        content: Its SHA-256; in an object store, its ETag and size.
        class_id: The most probable class; None for a file that can't be read.
        class_name: The name of that class.
        probability: Its probability, in [0, 1].
        error: Why the file has no class; None if it has one.
    """

    path: str
    content: str
    class_id: int | None
    class_name: str | None
    probability: float | None
    error: str | None


class PredictionsFacts(Facts):
    """What is known of the predictions.

    Attributes:
        model_name: The model's name in the registry.
        version: Its version; None if the step ran outside the registry.
        model_digest: Digest of the trained model.
        num_files: Number of files, which is the number of rows.
        num_unreadable: Number of rows with an error instead of a class.
        classes: Number of files of each predicted class, by its name.
        num_covered: Number of files that this artifact and those that it adds to have rows for.
        earlier: Digest of the predictions that this artifact adds to; None if it has a row for every file.
        synthetic: Whether the model was trained on images that the project drew itself.
    """

    model_name: str
    version: int | None
    model_digest: str
    num_files: int
    num_unreadable: int
    classes: dict[str, int]
    num_covered: int
    earlier: str | None = None
    synthetic: bool = False


class Predictions(Artifact[PredictionsFacts]):
    """The predictions for a folder of images.

    On disk::

        predictions.parquet    a row for each file, in the order of the paths: path, content, class_id, class_name,
                               probability, error, model, version, model_digest
        covered.parquet        path and content of the files that earlier predictions have rows for; only if these add
                               to earlier ones
    """

    facts_type = PredictionsFacts

    @property
    def parquet(self) -> Path:
        """The Parquet file with the rows."""
        return self.path / PREDICTIONS

    def covered(self) -> Iterator[tuple[str, str]]:
        """Yield path and content of each file that has a row here or in the predictions that these add to."""
        import pyarrow.parquet as pq

        for name in (COVERED, PREDICTIONS):
            if (self.path / name).exists():
                with pq.ParquetFile(self.path / name) as file:
                    for batch in file.iter_batches(BATCH_ROWS, columns=["path", "content"]):
                        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        {
            "path": pa.string(),
            "content": pa.string(),
            "class_id": pa.int64(),
            "class_name": pa.string(),
            "probability": pa.float32(),
            "error": pa.string(),
            "model": pa.string(),
            "version": pa.int64(),
            "model_digest": pa.string(),
        }
    )


def write_part(folder: Path, number: int, rows: Sequence[Row], facts: PredictionsFacts) -> Path:
    """Write rows as one Parquet file, by one rename: a kill or a power cut leaves a whole file or none.

    Args:
        folder: Where the file is created.
        number: The part's number, for `find_part`.
        rows: The rows.
        facts: Give the model, its version and its digest.

    Returns:
        The file. Its name states its SHA-256.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict(zip(Row._fields, map(list, zip(*rows, strict=True)), strict=True))
    same = {"model": facts.model_name, "version": facts.version, "model_digest": facts.model_digest}
    columns |= {name: [value] * len(rows) for name, value in same.items()}
    unfinished = folder / f".part-{number:05}"
    try:
        with unfinished.open("wb") as file:
            pq.write_table(pa.table(columns, _schema()), file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"part-{number:05}-{file_entry(unfinished).sha256}.parquet"
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def find_part(folder: Path, number: int) -> Path | None:
    """Return the file that `write_part` wrote; None if there is none. A damaged one is deleted.

    Args:
        folder: As for `write_part`.
        number: As for `write_part`.
    """
    for path in folder.glob(f"part-{number:05}-*.parquet"):
        if path.stem.endswith(f"-{file_entry(path).sha256}"):
            return path
        log.warning("damaged, its rows are predicted again: %s", path)
        path.unlink()
    return None


def join(parts: Iterable[Path], path: Path) -> dict[str, int]:
    """Write Parquet files as one, a row group each.

    Args:
        parts: Files that `write_part` wrote.
        path: The file to create.

    Returns:
        The number of rows of each class, by name, and of those without one under the empty name.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    counts: dict[str, int] = {}
    with pq.ParquetWriter(path, _schema()) as writer:
        for part in parts:
            table = pq.read_table(part)
            writer.write_table(table, row_group_size=len(table))
            for count in pc.value_counts(table["class_name"]).to_pylist():
                name = count["values"] or ""
                counts[name] = counts.get(name, 0) + count["counts"]
    return counts


def write_covered(path: Path, earlier: Predictions) -> int:
    """Write which files earlier predictions have rows for.

    Args:
        path: The file to create.
        earlier: The earlier predictions.

    Returns:
        The number of files.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files, total = earlier.covered(), 0
    with pq.ParquetWriter(path, schema := pa.schema({"path": pa.string(), "content": pa.string()})) as writer:
        while batch := list(itertools.islice(files, BATCH_ROWS)):
            paths, contents = zip(*batch, strict=True)
            writer.write_table(pa.table({"path": paths, "content": contents}, schema))
            total += len(batch)
    return total
