"""Ingest: brings images and labels in, from the tfds catalog or a folder, as arrays of one size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from components.ingestion.image_folder import ingest_folder
from components.ingestion.params import FOLDER, Params
from components.ingestion.tfds_catalog import ingest_catalog
from ridgeline.artifacts.dataset import Dataset, DatasetFacts
from ridgeline.component import ParameterError, Source, SourceFolder, component


def find_sources(params: Params) -> Mapping[str, SourceFolder]:
    """Return the folders that `ingest` reads: the images, or the downloaded files of a tfds dataset.

    Args:
        params: The parameters of `ingest`.

    Raises:
        ParameterError: If the dataset is a folder and ``image_dir`` is empty.
    """
    if params.dataset == FOLDER:
        if not params.image_dir:
            raise ParameterError(
                "Parameter ingest.image_dir: expected the folder of the images of ingest.dataset=folder; received "
                "none. Set it, or RIDGELINE_IMAGE_DIR."
            )
        return {"image_dir": SourceFolder(params.image_dir)}
    if params.manual_dir and not params.dataset.startswith("synthetic_"):
        return {"manual_dir": SourceFolder(params.manual_dir, outside_links=True)}
    return {}


@component(output=Dataset, sources=find_sources)
def ingest(
    params: Params, output: Path, sources: Mapping[str, Source], previous: Dataset | None = None
) -> DatasetFacts:
    """Prepare a dataset of the tfds catalog, or a folder of images, as uint8 arrays of one size.

    Args:
        params: Which dataset to prepare.
        output: Empty directory to write a `Dataset` into.
        sources: The folder ``image_dir`` or ``manual_dir``, as it was listed.
        previous: The last dataset, if only files of the folder changed since: its images are not decoded again.

    Returns:
        The dataset's facts.

    Raises:
        StepError: If the dataset is unavailable, or is not one of uint8 images of one size with labels of at least two
            classes.
    """
    if params.dataset == FOLDER:
        return ingest_folder(params, sources["image_dir"], output, previous)
    return ingest_catalog(params, output)
